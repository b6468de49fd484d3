// SPDX-License-Identifier: GPL-3.0-or-later

// Package eris implements ERIS 1.0.0, the Encoding for Robust Immutable Storage
// (https://eris.codeberg.page/spec/): content of any length becomes a set of encrypted blocks of one size, each named by
// the hash of its bytes, and a short read capability from which the content can be put together again.
//
// Where to start:
//
//   - [Encode] turns a reader into blocks and a [ReadCapability], on several cores; [Encoder] does the same for content that
//     is written piece by piece.
//   - [Open] reads one content: its length, any part of it ([Content.ReadAt]), or all of it in order ([Content.WriteTo]).
//   - [Sequence] reads many contents, in an order known beforehand, through one window of requests. It is the heart of the
//     decoder: [Content.WriteTo] is a Sequence of one.
//   - [Verify] and [Sum] are all that a store of blocks needs; [Encrypter], [Decrypt] and [ParseNode] are the format itself,
//     block by block.
//
// # Trust
//
// Nothing that a [Blocks] returns is believed: every block is checked against the reference it was asked by before it is
// used, every internal node is checked against its key and for the shape that an encoder gives it, and no content may be
// longer than the limit its reader sets. A source of blocks can therefore withhold content, but neither alter it, nor make
// the reader work or store without bound.
//
// A read capability whose level is 0 does not authenticate its own key: if the key is wrong, the result is noise, which the
// padding gives away in most cases but not in all. Capabilities must come from a place that is authenticated, or what was
// decoded must be checked by other means.
//
// Confidentiality is weak by design: with the null [ConvergenceSecret], anybody who has the content can compute its
// capability and its references, and so recognise who stores or fetches it.
//
// # Errors
//
// Three kinds of failure ask for different answers, and can be told apart:
//
//   - the source does not have the block: [ErrNotFound], as returned by the source. Another source may have it.
//   - the source gave other bytes: [*BlockError]. Another source may do better, and this one should be avoided.
//   - the content itself is at fault: [*ContentError]. No source can help.
package eris
