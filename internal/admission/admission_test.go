// SPDX-License-Identifier: GPL-3.0-or-later

package admission_test

import (
	"io"
	"net"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/admission"
)

// client is a connection that only has an address.
type client struct {
	net.Conn
	address string
	closed  bool
}

func (c *client) RemoteAddr() net.Addr {
	if c.address == "" {
		return &net.UnixAddr{}
	}
	a, err := net.ResolveTCPAddr("tcp", c.address)
	if err != nil {
		panic(err)
	}
	return a
}

func (c *client) Close() error {
	c.closed = true
	return nil
}

func TestGate(t *testing.T) {
	g := admission.New(6)
	var leave []func()
	enter := func(address string, want bool) {
		t.Helper()
		c := &client{address: address}
		l, ok := g.Enter(c)
		if ok != want || c.closed == want {
			t.Errorf("%q: let in %v, closed %v", address, ok, c.closed)
		}
		if ok {
			leave = append(leave, l)
		}
	}
	enter("192.0.2.1:1", true)
	enter("192.0.2.1:2", true)
	enter("[::ffff:192.0.2.1]:3", true)
	enter("192.0.2.1:4", false)
	enter("192.0.2.2:1", true)
	enter("[2001:db8::1]:1", true)
	leave[0]()
	enter("192.0.2.1:4", true)
	enter("[2001:db8::2]:1", true)
	enter("[2001:db8:1::1]:1", false) // there are six
	if s := g.Stats(); s != (admission.Stats{Open: 6, Accepted: 7, TurnedAway: 2}) {
		t.Errorf("%+v", s)
	}
	for _, l := range leave[1:] {
		l()
	}
	leave = nil
	for range 3 {
		enter("127.0.0.1:1", true)
		enter("", true)
	}
	enter("[::1]:1", false)
	for _, l := range leave {
		l()
	}
	leave = nil
	enter("[2001:db8::1]:1", true)
	enter("[2001:db8::2]:1", true)
	enter("[2001:db8::3]:1", true)
	enter("[2001:db8::4]:1", false) // one network
	enter("[2001:db8:0:1::4]:1", true)
}

// TestIdle lets new connections in where others are idle: the one that has been so the longest
// goes.
func TestIdle(t *testing.T) {
	g := admission.New(4)
	clients := map[string]*client{}
	leave := map[string]func(){}
	enter := func(address string, want bool) {
		t.Helper()
		c := &client{address: address}
		l, ok := g.Enter(c)
		if ok != want || c.closed == want {
			t.Errorf("%q: let in %v, closed %v", address, ok, c.closed)
		}
		clients[address], leave[address] = c, l
	}
	for _, address := range []string{"192.0.2.1:1", "192.0.2.1:2", "192.0.2.2:1", "192.0.2.3:1"} {
		enter(address, true)
	}
	enter("192.0.2.4:1", false) // all are busy
	g.SetIdle(clients["192.0.2.2:1"], true)
	g.SetIdle(clients["192.0.2.1:2"], true)
	g.SetIdle(clients["192.0.2.3:1"], true)
	g.SetIdle(clients["192.0.2.2:1"], true) // for no less long than before
	enter("192.0.2.1:3", true)              // a host that has half makes room itself
	if !clients["192.0.2.1:2"].closed || clients["192.0.2.2:1"].closed || clients["192.0.2.3:1"].closed {
		t.Error("another host made room")
	}
	enter("192.0.2.1:4", false)
	g.SetIdle(clients["192.0.2.2:1"], false)
	enter("192.0.2.5:1", true)
	if clients["192.0.2.2:1"].closed || !clients["192.0.2.3:1"].closed {
		t.Error("a busy connection made room, or none")
	}
	if s := g.Stats(); s != (admission.Stats{Open: 4, Accepted: 6, TurnedAway: 2, MadeRoom: 2}) {
		t.Errorf("%+v", s)
	}
	// Those that made room leave, too, and do not count twice.
	g.SetIdle(clients["192.0.2.3:1"], true)
	for _, l := range leave {
		if l != nil {
			l()
		}
	}
	g.Wait()
	if s := g.Stats(); s.Open != 0 {
		t.Errorf("%+v", s)
	}
}

func TestListener(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := admission.New(1)
	l := g.Listener(inner)
	defer l.Close()
	dial := func() net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	dial()
	first, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	away := dial()
	accepted := make(chan net.Conn)
	go func() {
		c, err := l.Accept()
		if err != nil {
			t.Error(err)
		}
		accepted <- c
	}()
	// The second is closed without having been served.
	if n, err := away.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("%d bytes, error %v", n, err)
	}
	first.Close()
	first.Close()
	second := dial()
	member := <-accepted
	// The second is idle, and makes room for the third.
	g.SetIdle(member, true)
	dial()
	third, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if n, err := second.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("%d bytes, error %v", n, err)
	}
	member.Close()
	third.Close()
	g.Wait()
	if s := g.Stats(); s != (admission.Stats{Accepted: 3, TurnedAway: 1, MadeRoom: 1}) {
		t.Errorf("%+v", s)
	}
}
