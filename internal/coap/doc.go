// SPDX-License-Identifier: GPL-3.0-or-later

// Package coap is ERIS over CoAP for client and server alike: connections on streams (RFC 8323) and
// sockets of UDP (RFC 7252), block-wise transfer (RFC 7959), and the resource "blocks" of an ERIS
// store. It is shared by fetch/coap, which makes connections and requests, and
// blockstore/coapserver, which accepts and serves them; over one connection each side may request.
//
// Where to start: [Conn] for streams, [NewWebSocket] for those over WebSockets, and [Endpoint] for
// UDP; [Exchange] for a request that we make, which both keep in one table; [Handler] and [Packet]
// for those of the peer. Below a Conn are the two directions of a stream, reader and queue.
//
// # Why not all of go-coap
//
// Names of codes, options and message types are those of github.com/plgd-dev/go-coap/v3/message.
// Its coders only serve tests, to compare with. They are lax: they take tokens of 9 to 15 bytes on
// streams (an error by RFC 8323, section 3.2), critical options whose value has a wrong length
// (like unknown ones by RFC 7252, section 5.4.3), and a payload marker without a payload (a format
// error by section 3). They know the head of a message on a stream only once all of it is there,
// while a bound must be applied before anything is kept. And they take ten times as long.
//
// Nothing in this package believes a length that comes from outside before it has been compared
// with a bound.
package coap
