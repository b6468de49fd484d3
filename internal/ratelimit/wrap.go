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
	return &conn{newSides(c, in, out), c}
}

// A socket is what connections and sockets for datagrams have in common.
type socket interface {
	Close() error
	SetDeadline(time.Time) error
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
}

// sides are the two directions of a socket, whose deadlines and end they watch.
type sides struct {
	socket
	in, out side
	once    sync.Once
	closed  chan struct{}
}

func newSides(s socket, in, out *Limiter) *sides {
	return &sides{
		socket: s, closed: make(chan struct{}),
		in: side{limiter: in, done: make(chan struct{})}, out: side{limiter: out, done: make(chan struct{})},
	}
}

// Close ends all waiting and closes the socket.
func (s *sides) Close() error {
	s.once.Do(func() { close(s.closed) })
	s.in.set(time.Time{})
	s.out.set(time.Time{})
	return s.socket.Close()
}

func (s *sides) SetDeadline(t time.Time) error {
	s.in.set(t)
	s.out.set(t)
	return s.socket.SetDeadline(t)
}

func (s *sides) SetReadDeadline(t time.Time) error {
	s.in.set(t)
	return s.socket.SetReadDeadline(t)
}

func (s *sides) SetWriteDeadline(t time.Time) error {
	s.out.set(t)
	return s.socket.SetWriteDeadline(t)
}

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
	done  chan struct{} // closed when the deadline passes
}

// passed returns a channel that is closed when the deadline passes.
func (s *side) passed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
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

// conn is a connection with limits.
type conn struct {
	*sides
	conn net.Conn
}

func (c *conn) LocalAddr() net.Addr  { return c.conn.LocalAddr() }
func (c *conn) RemoteAddr() net.Addr { return c.conn.RemoteAddr() }

func (c *conn) Read(p []byte) (int, error) {
	if c.in.limiter != nil {
		p = p[:min(len(p), c.in.limiter.chunk)]
	}
	n, err := c.conn.Read(p)
	c.received(n)
	return n, err
}

func (c *conn) Write(p []byte) (int, error) {
	if c.out.limiter == nil {
		return c.conn.Write(p)
	}
	written := 0
	for {
		part := p[written:min(len(p), written+c.out.limiter.chunk)]
		if err := c.sending(len(part)); err != nil {
			return written, err
		}
		n, err := c.conn.Write(part)
		written += n
		if err != nil || written == len(p) {
			return written, err
		}
	}
}

// CloseWrite ends writing, where the connection below can, else it returns an error that wraps
// errors.ErrUnsupported.
func (c *conn) CloseWrite() error {
	if half, ok := c.conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
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
	return &packetConn{newSides(c, in, out), c}
}

type packetConn struct {
	*sides
	conn net.PacketConn
}

func (c *packetConn) LocalAddr() net.Addr { return c.conn.LocalAddr() }

func (c *packetConn) ReadFrom(p []byte) (int, net.Addr, error) {
	n, address, err := c.conn.ReadFrom(p)
	c.received(n)
	return n, address, err
}

func (c *packetConn) WriteTo(p []byte, address net.Addr) (int, error) {
	if err := c.sending(len(p)); err != nil {
		return 0, err
	}
	return c.conn.WriteTo(p, address)
}
