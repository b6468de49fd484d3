// SPDX-License-Identifier: GPL-3.0-or-later

// Package eris implements ERIS 1.0.0, the Encoding for Robust Immutable Storage
// (https://eris.codeberg.page/spec/): content of any length becomes a set of encrypted blocks of
// one size, each named by the hash of its bytes, and a short read capability from which the content
// can be put together again.
//
// Where to start:
//
//   - [Encode] turns a reader into blocks and a [ReadCapability], on several cores. Package
//     fetch/content does the reverse.
//   - [Verify] and [Sum] are all that a store of blocks needs; [SumAll] is for many at a time.
//   - [Decrypt], [ParseNode] and [Unpad] are the format itself, block by block.
//
// Confidentiality is weak by design: with the null [ConvergenceSecret], anybody who has the content
// can compute its capability and its references, and so recognise who stores or fetches it.
package eris
