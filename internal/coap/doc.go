// SPDX-License-Identifier: GPL-3.0-or-later

// Package coap is the wire format of ERIS over CoAP: messages on streams (RFC 8323) and in datagrams (RFC 7252), options,
// block-wise transfer (RFC 7959), the resource "blocks" of an ERIS store, and the URLs of stores. It is shared by the client
// (fetch/coap) and the server (blockstore/coapserver); it opens no connections itself.
//
// Where to start: [ParseURL] for store URLs; [ParseHead], [AppendHead] and [Options] for messages; [Requests] for what a
// client sends and [Paths] for what a server understands; [Reader] and [Queue] for the two directions of a stream.
//
// # Why not all of go-coap
//
// Names of codes, options and message types are those of github.com/plgd-dev/go-coap/v3/message. Its coders are not used
// but to compare with in tests, for two reasons. They are lax: the stream coder takes tokens of 9 to 15 bytes, which RFC
// 8323, section 3.2, makes an error; both pass over critical options whose value has a wrong length, which RFC 7252, section
// 5.4.3, wants treated like unknown critical options; both take a payload marker without a payload, a format error by RFC
// 7252, section 3; and the head of a stream message can only be had once all of it is there, while a bound must be applied
// before anything is kept. And they are slow on the path that every block takes: BenchmarkDecode and BenchmarkEncode have
// the comparison, which is about ten to one.
//
// Nothing in this package believes a length that comes from outside before it has been compared with a bound.
package coap
