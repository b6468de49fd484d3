// SPDX-License-Identifier: GPL-3.0-or-later

package sourcetest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
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
