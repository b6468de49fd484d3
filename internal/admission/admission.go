// SPDX-License-Identifier: GPL-3.0-or-later

// Package admission bounds how many connections a server has, in all and from one host, so that no
// single client can keep all others out, nor many that do nothing. Start with [New].
package admission

import (
	"net"
	"net/netip"
	"sync"
)

// A Gate lets connections in as long as there is room, or another one is idle. It is safe for
// concurrent use.
type Gate struct {
	most, perHost int
	open          sync.WaitGroup

	mu       sync.Mutex
	stats    Stats
	hosts    map[netip.Prefix]int
	visitors map[net.Conn]*visitor
	clock    uint64 // how often a connection has become idle
}

// visitor is a connection that has been let in.
type visitor struct {
	host netip.Prefix
	idle uint64 // the clock when it became idle; 0 if it is not
}

// Stats counts connections.
type Stats struct {
	Open       int64 // at the moment
	Accepted   int64 // so far
	TurnedAway int64 // so far, because all others were busy
	MadeRoom   int64 // so far: those that were idle, and were closed for others
}

// New returns a gate for so many connections at a time, of which one host may have half, but at
// least one. A host is an IPv4 address or an IPv6 network of 64 bits, which is what one subscriber
// gets at least (RFC 6177). This machine counts for none: who comes from there may be a proxy for
// many.
func New(most int) *Gate {
	return &Gate{
		most:     most,
		perHost:  max(1, most/2),
		hosts:    map[netip.Prefix]int{},
		visitors: map[net.Conn]*visitor{},
	}
}

// Enter lets a connection in, or closes it and returns false. When it has come to its end, leave
// must be called, once. Where there is no room it closes the connection that has been idle the
// longest, of the same host if it is that which has too many.
func (g *Gate) Enter(conn net.Conn) (leave func(), ok bool) {
	host := hostOf(conn.RemoteAddr())
	g.mu.Lock()
	defer g.mu.Unlock()
	ok = g.hosts[host] < g.perHost || g.makeRoom(func(v *visitor) bool { return v.host == host })
	ok = ok && (g.stats.Open < int64(g.most) || g.makeRoom(func(*visitor) bool { return true }))
	if !ok {
		g.stats.TurnedAway++
		conn.Close()
		return nil, false
	}
	g.stats.Open++
	g.stats.Accepted++
	if host.IsValid() {
		g.hosts[host]++
	}
	v := &visitor{host: host}
	g.visitors[conn] = v
	g.open.Add(1)
	return func() {
		defer g.open.Done()
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.visitors[conn] == v {
			g.remove(conn, v)
		}
	}, true
}

// SetIdle says whether nothing is being done for a connection at the moment, so that it may make
// room for others; at first something is. The connection is one that was let in, or that Accept of
// a listener of the gate returned; others are ignored.
func (g *Gate) SetIdle(conn net.Conn, idle bool) {
	if m, ok := conn.(*member); ok {
		conn = m.Conn
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	v := g.visitors[conn]
	switch {
	case v == nil:
	case !idle:
		v.idle = 0
	case v.idle == 0:
		g.clock++
		v.idle = g.clock
	}
}

// makeRoom closes the connection that has been idle the longest, of those that may go. It reports
// whether there is one.
func (g *Gate) makeRoom(may func(*visitor) bool) bool {
	var oldest net.Conn
	for conn, v := range g.visitors {
		if v.idle != 0 && may(v) && (oldest == nil || v.idle < g.visitors[oldest].idle) {
			oldest = conn
		}
	}
	if oldest == nil {
		return false
	}
	g.stats.MadeRoom++
	g.remove(oldest, g.visitors[oldest])
	oldest.Close()
	return true
}

// remove takes a connection out of all counts.
func (g *Gate) remove(conn net.Conn, v *visitor) {
	g.stats.Open--
	if g.hosts[v.host]--; g.hosts[v.host] <= 0 {
		delete(g.hosts, v.host)
	}
	delete(g.visitors, conn)
}

// hostOf returns what counts as the host of an address, or the zero value for none.
func hostOf(address net.Addr) netip.Prefix {
	tcp, ok := address.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip := tcp.AddrPort().Addr().Unmap().WithZone("")
	if ip.IsLoopback() {
		return netip.Prefix{}
	}
	bits := 64
	if ip.Is4() {
		bits = 32
	}
	host, _ := ip.Prefix(bits) // fails for no address, which is of no host
	return host
}

// Stats returns the counts.
func (g *Gate) Stats() Stats {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.stats
}

// Wait waits until all connections have left. No others may come meanwhile.
func (g *Gate) Wait() { g.open.Wait() }

// Listener returns a listener that accepts what the gate lets in. Connections leave when they are
// closed.
func (g *Gate) Listener(l net.Listener) net.Listener { return &listener{l, g} }

type listener struct {
	net.Listener
	gate *Gate
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if leave, ok := l.gate.Enter(conn); ok {
			return &member{Conn: conn, leave: sync.OnceFunc(leave)}, nil
		}
	}
}

type member struct {
	net.Conn
	leave func()
}

func (m *member) Close() error {
	defer m.leave()
	return m.Conn.Close()
}

// Gates are those of a server, one for each listener that it has had. The zero value has none. They
// are safe for concurrent use.
type Gates struct {
	mu  sync.Mutex
	all []*Gate
}

// New returns a further gate: see [New].
func (g *Gates) New(most int) *Gate {
	gate := New(most)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.all = append(g.all, gate)
	return gate
}

// Stats returns the sums of the counts of all.
func (g *Gates) Stats() Stats {
	g.mu.Lock()
	defer g.mu.Unlock()
	var sum Stats
	for _, gate := range g.all {
		s := gate.Stats()
		sum.Open += s.Open
		sum.Accepted += s.Accepted
		sum.TurnedAway += s.TurnedAway
		sum.MadeRoom += s.MadeRoom
	}
	return sum
}
