// SPDX-License-Identifier: GPL-3.0-or-later

package ratelimit

import (
	"context"
	"io"
	"net"
)

// Reader returns a reader of r whose bytes count. When ctx is done while bytes that were read wait
// to be let through, Read returns them with the cause of ctx.
func Reader(ctx context.Context, r io.Reader, l *Limiter) io.Reader {
	if l == nil {
		return r
	}
	return &reader{ctx, r, l}
}

type reader struct {
	ctx     context.Context
	r       io.Reader
	limiter *Limiter
}

func (r *reader) Read(p []byte) (int, error) {
	n, err := r.r.Read(r.limiter.part(p))
	if e := r.limiter.WaitN(r.ctx, n); e != nil {
		return n, e
	}
	return n, err
}

// Conn returns a connection over c that reads at most at the rate of in, and writes at most at that
// of out; the two may be the same, and either may be nil. Close ends waiting; a deadline that has
// passed meanwhile is found by the next use of c.
func Conn(c net.Conn, in, out *Limiter) net.Conn {
	if in == nil && out == nil {
		return c
	}
	return &conn{Conn: c, sides: newSides(in, out)}
}

// sides are the two directions of a socket. Waiting ends with ctx.
type sides struct {
	in, out *Limiter
	ctx     context.Context
	end     context.CancelCauseFunc
}

func newSides(in, out *Limiter) sides {
	ctx, end := context.WithCancelCause(context.Background())
	return sides{in, out, ctx, end}
}

// conn is a connection with limits.
type conn struct {
	net.Conn
	sides
}

// Read hands out what has been read even when waiting for it ends, for it must not be lost.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(c.in.part(p))
	_ = c.in.WaitN(c.ctx, n)
	return n, err
}

func (c *conn) Write(p []byte) (written int, err error) {
	for {
		part := c.out.part(p[written:])
		if err := c.out.WaitN(c.ctx, len(part)); err != nil {
			return written, err
		}
		n, err := c.Conn.Write(part)
		written += n
		if err != nil || written == len(p) {
			return written, err
		}
	}
}

// Close ends all waiting and closes the connection.
func (c *conn) Close() error {
	c.end(net.ErrClosed)
	return c.Conn.Close()
}

// Listener returns a listener whose connections share the limiters, as [Conn] has them.
func Listener(l net.Listener, in, out *Limiter) net.Listener {
	if in == nil && out == nil {
		return l
	}
	return &listener{l, in, out}
}

type listener struct {
	net.Listener
	in, out *Limiter
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return Conn(c, l.in, l.out), nil
}

// PacketConn returns a socket for datagrams over c that receives at most at the rate of in, and
// sends at most at that of out; either may be nil. What comes faster fills the buffer of the
// socket, and is then lost, as datagrams may be. Close ends waiting.
func PacketConn(c net.PacketConn, in, out *Limiter) net.PacketConn {
	if in == nil && out == nil {
		return c
	}
	return &packetConn{c, newSides(in, out)}
}

type packetConn struct {
	net.PacketConn
	sides
}

func (c *packetConn) ReadFrom(p []byte) (int, net.Addr, error) {
	n, address, err := c.PacketConn.ReadFrom(p)
	_ = c.in.WaitN(c.ctx, n)
	return n, address, err
}

func (c *packetConn) WriteTo(p []byte, address net.Addr) (int, error) {
	if err := c.out.WaitN(c.ctx, len(p)); err != nil {
		return 0, err
	}
	return c.PacketConn.WriteTo(p, address)
}

// Close ends all waiting and closes the socket.
func (c *packetConn) Close() error {
	c.end(net.ErrClosed)
	return c.PacketConn.Close()
}
