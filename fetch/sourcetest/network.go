// SPDX-License-Identifier: GPL-3.0-or-later

package sourcetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// A Network is one in memory, without buffers, for tests in a bubble of [testing/synctest]: time
// goes on there while everybody waits for it. The zero value is ready. It is safe for concurrent
// use.
type Network struct {
	mu        sync.Mutex
	listeners map[string]*networkListener
}

// Listen returns a listener at a new address.
func (n *Network) Listen() net.Listener {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.listeners == nil {
		n.listeners = map[string]*networkListener{}
	}
	l := &networkListener{make(chan net.Conn), make(chan struct{}), sync.Once{}, fmt.Sprintf("192.0.2.%d:80", len(n.listeners)+1)}
	n.listeners[l.address] = l
	return l
}

// Dial connects to a listener once that accepts; it is as that of [net.Dialer].
func (n *Network) Dial(ctx context.Context, _, address string) (net.Conn, error) {
	n.mu.Lock()
	l := n.listeners[address]
	n.mu.Unlock()
	if l == nil {
		return nil, errors.New("nobody listens at " + address)
	}
	here, there := net.Pipe()
	select {
	case l.conns <- there:
		return here, nil
	case <-l.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

type networkListener struct {
	conns   chan net.Conn
	closed  chan struct{}
	once    sync.Once
	address string
}

func (l *networkListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *networkListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *networkListener) Addr() net.Addr  { return l }
func (l *networkListener) Network() string { return "tcp" }
func (l *networkListener) String() string  { return l.address }

// Far returns a function that connects as [net.Dialer] does, but what the other end sends comes as
// much later as a round trip takes. It is for measurements: deadlines of reading are not heeded.
func Far(roundTrip time.Duration) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		c := &farConn{Conn: conn, portions: make(chan portion, 1<<12)}
		go func() {
			defer close(c.portions)
			for err == nil {
				var n int
				b := make([]byte, 64<<10)
				n, err = conn.Read(b)
				c.portions <- portion{b[:n], time.Now().Add(roundTrip)}
			}
		}()
		return c, nil
	}
}

type farConn struct {
	net.Conn
	portions chan portion
	rest     []byte
}

// portion is a run of bytes, and when it comes out at this end.
type portion struct {
	bytes []byte
	due   time.Time
}

func (c *farConn) SetReadDeadline(time.Time) error { return nil }

func (c *farConn) Read(p []byte) (int, error) {
	for len(c.rest) == 0 {
		next, ok := <-c.portions
		if !ok {
			return 0, io.EOF
		}
		time.Sleep(time.Until(next.due))
		c.rest = next.bytes
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}
