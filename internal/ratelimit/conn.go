// SPDX-License-Identifier: GPL-3.0-or-later

package ratelimit

import (
	"context"
	"net"
	"sync"
	"time"
)

// Listener returns a listener on whose connections all bytes that are sent count.
func Listener(l net.Listener, limiter *Limiter) net.Listener {
	if limiter == nil {
		return l
	}
	return &listener{l, limiter}
}

type listener struct {
	net.Listener
	limiter *Limiter
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return Conn(c, l.limiter), nil
}

// Conn returns a connection on which all bytes that are sent count. For how long they wait for the
// limit is added to the deadline for writing.
func Conn(c net.Conn, limiter *Limiter) net.Conn {
	if limiter == nil {
		return c
	}
	return &conn{Conn: c, sender: newSender(limiter)}
}

// sender is what a connection or a socket waits by, until it is closed.
type sender struct {
	limiter *Limiter
	ctx     context.Context
	end     context.CancelCauseFunc
}

func newSender(limiter *Limiter) sender {
	ctx, end := context.WithCancelCause(context.Background())
	return sender{limiter, ctx, end}
}

type conn struct {
	net.Conn
	sender

	mu       sync.Mutex
	deadline time.Time // for writing
}

func (c *conn) Write(b []byte) (written int, err error) {
	for err == nil && written < len(b) {
		part := b[written:min(len(b), written+c.limiter.chunk)]
		var took time.Duration
		if took, err = c.limiter.Wait(c.ctx, len(part)); err != nil {
			break
		}
		if err = c.extend(took); err == nil {
			var n int
			n, err = c.Conn.Write(part)
			written += n
		}
	}
	return written, err
}

// extend puts the deadline for writing off.
func (c *conn) extend(by time.Duration) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if by == 0 || c.deadline.IsZero() {
		return nil
	}
	c.deadline = c.deadline.Add(by)
	return c.Conn.SetWriteDeadline(c.deadline)
}

func (c *conn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deadline = t
	return c.Conn.SetWriteDeadline(t)
}

func (c *conn) SetDeadline(t time.Time) error {
	if err := c.SetWriteDeadline(t); err != nil {
		return err
	}
	return c.SetReadDeadline(t)
}

func (c *conn) Close() error {
	c.end(net.ErrClosed)
	return c.Conn.Close()
}

// PacketConn returns a socket on which all bytes that are sent count.
func PacketConn(p net.PacketConn, limiter *Limiter) net.PacketConn {
	if limiter == nil {
		return p
	}
	return &packets{p, newSender(limiter)}
}

type packets struct {
	net.PacketConn
	sender
}

func (p *packets) WriteTo(b []byte, to net.Addr) (int, error) {
	if _, err := p.limiter.Wait(p.ctx, len(b)); err != nil {
		return 0, err
	}
	return p.PacketConn.WriteTo(b, to)
}

func (p *packets) Close() error {
	p.end(net.ErrClosed)
	return p.PacketConn.Close()
}
