// SPDX-License-Identifier: GPL-3.0-or-later

package ratelimit

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"
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
	n, err := r.r.Read(p[:min(len(p), r.limiter.chunk)])
	if e := r.limiter.WaitN(r.ctx, n); e != nil {
		return n, e
	}
	return n, err
}

// Conn returns a connection over c that reads at most at the rate of in, and writes at most at that
// of out; the two may be the same, and either may be nil. Deadlines and Close end waiting as they
// end everything else. Of the methods that some connections have beside those of net.Conn, it has
// CloseWrite only.
func Conn(c net.Conn, in, out *Limiter) net.Conn {
	if in == nil && out == nil {
		return c
	}
	l := &conn{Conn: c}
	l.init(in, out)
	return l
}

// sides are the two directions of a connection.
type sides struct {
	in, out side
	once    sync.Once
	closed  chan struct{}
}

func (s *sides) init(in, out *Limiter) {
	s.closed = make(chan struct{})
	s.in.limiter, s.out.limiter = in, out
}

func (s *sides) close() { s.once.Do(func() { close(s.closed) }) }

// received waits until bytes that have been read may be handed out. They are handed out even if a
// deadline passes, for they must not be lost: who reads again then meets the deadline.
func (s *sides) received(n int) {
	if s.in.limiter != nil && n > 0 {
		s.in.limiter.wait(n, s.in.passed(), s.closed)
	}
}

// sending waits until bytes may be written.
func (s *sides) sending(n int) error {
	if s.out.limiter == nil || n == 0 || s.out.limiter.wait(n, s.out.passed(), s.closed) {
		return nil
	}
	s.out.limiter.Return(n)
	select {
	case <-s.closed:
		return net.ErrClosed
	default:
		return os.ErrDeadlineExceeded
	}
}

// A side is one direction, with the deadline that its users have set.
type side struct {
	limiter *Limiter

	mu    sync.Mutex
	timer *time.Timer
	done  chan struct{} // closed when the deadline passes; nil if none was set yet
}

// passed returns a channel that is closed when the deadline passes.
func (s *side) passed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done == nil {
		s.done = make(chan struct{})
	}
	return s.done
}

// set sets the deadline; the zero time is none.
func (s *side) set(t time.Time) {
	if s.limiter == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.timer != nil {
		s.timer.Stop()
		s.timer = nil
	}
	if s.done == nil {
		s.done = make(chan struct{})
	}
	select {
	case <-s.done:
		s.done = make(chan struct{})
	default:
	}
	if t.IsZero() {
		return
	}
	if d := time.Until(t); d <= 0 {
		close(s.done)
	} else {
		done := s.done
		var timer *time.Timer
		timer = time.AfterFunc(d, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.timer == timer { // no other deadline has been set meanwhile
				s.timer = nil
				close(done)
			}
		})
		s.timer = timer
	}
}

func (s *sides) setDeadline(t time.Time) { s.in.set(t); s.out.set(t) }

// conn is a connection with limits.
type conn struct {
	net.Conn
	sides
}

func (c *conn) Read(p []byte) (int, error) {
	if c.in.limiter != nil {
		p = p[:min(len(p), c.in.limiter.chunk)]
	}
	n, err := c.Conn.Read(p)
	c.received(n)
	return n, err
}

func (c *conn) Write(p []byte) (int, error) {
	if c.out.limiter == nil {
		return c.Conn.Write(p)
	}
	written := 0
	for {
		part := p[written:min(len(p), written+c.out.limiter.chunk)]
		if err := c.sending(len(part)); err != nil {
			return written, err
		}
		n, err := c.Conn.Write(part)
		written += n
		if err != nil || written == len(p) {
			return written, err
		}
	}
}

func (c *conn) Close() error {
	c.close()
	c.in.set(time.Time{})
	c.out.set(time.Time{})
	return c.Conn.Close()
}

// CloseWrite ends writing, where the connection below can, else it returns an error that wraps
// errors.ErrUnsupported.
func (c *conn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

func (c *conn) SetDeadline(t time.Time) error {
	c.setDeadline(t)
	return c.Conn.SetDeadline(t)
}

func (c *conn) SetReadDeadline(t time.Time) error {
	c.in.set(t)
	return c.Conn.SetReadDeadline(t)
}

func (c *conn) SetWriteDeadline(t time.Time) error {
	c.out.set(t)
	return c.Conn.SetWriteDeadline(t)
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
// socket, and is then lost, as datagrams may be. Deadlines and Close end waiting as they end
// everything else.
func PacketConn(c net.PacketConn, in, out *Limiter) net.PacketConn {
	if in == nil && out == nil {
		return c
	}
	l := &packetConn{PacketConn: c}
	l.init(in, out)
	return l
}

type packetConn struct {
	net.PacketConn
	sides
}

func (c *packetConn) ReadFrom(p []byte) (int, net.Addr, error) {
	n, address, err := c.PacketConn.ReadFrom(p)
	c.received(n)
	return n, address, err
}

func (c *packetConn) WriteTo(p []byte, address net.Addr) (int, error) {
	if err := c.sending(len(p)); err != nil {
		return 0, err
	}
	return c.PacketConn.WriteTo(p, address)
}

func (c *packetConn) Close() error {
	c.close()
	c.in.set(time.Time{})
	c.out.set(time.Time{})
	return c.PacketConn.Close()
}

func (c *packetConn) SetDeadline(t time.Time) error {
	c.setDeadline(t)
	return c.PacketConn.SetDeadline(t)
}

func (c *packetConn) SetReadDeadline(t time.Time) error {
	c.in.set(t)
	return c.PacketConn.SetReadDeadline(t)
}

func (c *packetConn) SetWriteDeadline(t time.Time) error {
	c.out.set(t)
	return c.PacketConn.SetWriteDeadline(t)
}
