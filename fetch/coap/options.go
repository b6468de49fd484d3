// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"cmp"
	"context"
	"net"
	"time"

	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// Options says how a [Store] behaves. Zero fields stand for the defaults.
type Options struct {
	// HopLimit, if not 0, says in all requests for blocks how many servers they may go through that
	// ask others for what they do not have (RFC 8768), the first one among them. With 1 it answers
	// from what it has itself.
	HopLimit uint8

	// Window is the most requests on a stream that are without an answer at a time; further ones
	// wait for their turn. Default 16384, at most 65536.
	Window int

	// RequestTimeout is for how long a connection may make no progress with what was requested: no
	// answer, and no 4 KiB of anything large. The connection is then taken for dead. Default 30 s.
	RequestTimeout time.Duration

	// IdleTimeout is for how long a connection without requests is kept. Default 5 min.
	IdleTimeout time.Duration

	// DialTimeout is how long making a connection may take, including TLS and WebSockets, and then
	// until the peer says what it can receive. Default 5 s.
	DialTimeout time.Duration

	// Dial, if not nil, makes the stream, on which RFC 8323 is then spoken. Its context ends after
	// DialTimeout.
	Dial func(ctx context.Context) (net.Conn, error)

	// Datagram is for coap over UDP: Window, AckTimeout and MaxRetransmit.
	Datagram wire.EndpointConfig
}

func (o Options) withDefaults() Options {
	o.Window = cmp.Or(o.Window, 16384)
	o.RequestTimeout = cmp.Or(o.RequestTimeout, 30*time.Second)
	o.IdleTimeout = cmp.Or(o.IdleTimeout, 5*time.Minute)
	o.DialTimeout = cmp.Or(o.DialTimeout, 5*time.Second)
	return o
}
