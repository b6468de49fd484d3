// SPDX-License-Identifier: GPL-3.0-or-later

// Package admission bounds what a server does at a time, in all and for one host, so that no single
// client can keep all others out, nor many that do nothing: connections by a [Gate], and what is
// costly by [Slots].
package admission

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// shares counts what there is at a time, in all and of each host. A host is an IPv4 address or an
// IPv6 network of 64 bits, which is what one subscriber gets at least (RFC 6177); the zero value
// is that of whatever counts for none.
type shares struct {
	most, perHost int
	all           int
	hosts         map[netip.Prefix]*int
}

func newShares(most int) shares {
	return shares{most: most, perHost: max(1, most/2), hosts: map[netip.Prefix]*int{}}
}

// add counts one more, and returns where those of its host are counted.
func (s *shares) add(host netip.Prefix) *int {
	s.all++
	n, ok := s.hosts[host]
	if !ok {
		n = new(int)
		s.hosts[host] = n
	}
	*n++
	return n
}

func (s *shares) remove(host netip.Prefix) {
	s.all--
	n := s.hosts[host]
	if *n--; *n == 0 {
		delete(s.hosts, host)
	}
}

// full reports whether a host has as many as it may have.
func (s *shares) full(host netip.Prefix) bool {
	n, ok := s.hosts[host]
	return ok && host.IsValid() && *n >= s.perHost
}

// hostOf returns what counts as the host of an address, or the zero value for none.
func hostOf(ip netip.Addr) netip.Prefix {
	ip = ip.Unmap().WithZone("")
	bits := 64
	if ip.Is4() {
		bits = 32
	}
	host, _ := ip.Prefix(bits) // fails for no address, which is of no host
	return host
}

// Host returns what counts as one host in text, given the address of a client, as in [http.Request]
// or of a datagram: an IPv4 address, or an IPv6 network of 64 bits. It is empty for what has no IP
// address, like clients on Unix sockets.
func Host(remote string) string {
	address, err := netip.ParseAddrPort(remote)
	if err != nil {
		return ""
	}
	return hostOf(address.Addr()).String()
}

// addressOf returns the IP address of an address, or the zero value.
func addressOf(address net.Addr) netip.Addr {
	if tcp, ok := address.(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// A Gate is a listener that lets connections in as long as there is room, or another one is idle.
// It is safe for concurrent use.
type Gate struct {
	net.Listener
	*Counts
	public bool // it does not listen on this machine alone
	log    func(error)
	open   sync.WaitGroup

	mu     sync.Mutex
	shares shares
	inside map[*Conn]struct{}
	waited time.Time // when it will not count any more that it has waited

	seldom   Seldom
	unlogged int // of those turned away
}

// A Conn is a connection that a gate has let in. It leaves when it is closed.
type Conn struct {
	net.Conn
	gate     *Gate
	host     netip.Prefix
	siblings *int      // connections of the host
	idle     time.Time // from when on it is idle; zero if it is not
	leave    func()

	// By HTTP: requests that are under way, those of them that wait for the client, and until when
	// that counts as doing its part.
	requests, waiting int
	flows             time.Time
}

// Stats counts connections.
type Stats struct {
	Connections int64 `json:"connections"` // at the moment
	Accepted    int64 `json:"accepted"`    // so far
	TurnedAway  int64 `json:"turnedAway"`  // so far, because all others were busy
}

// Counts are the counts of one or more gates. The zero value is ready.
type Counts struct{ connections, accepted, turnedAway atomic.Int64 }

// Stats returns the counts.
func (c *Counts) Stats() Stats {
	return Stats{Connections: c.connections.Load(), Accepted: c.accepted.Load(), TurnedAway: c.turnedAway.Load()}
}

// New returns a gate for so many connections at a time, of which one host may have half, but at
// least one. Listener is where they come from. If it listens on a loopback address, whoever comes
// from there counts for no host, for that may be a proxy for many; a proxy on the same machine must
// therefore use such an address. Connections are added to the counts. Log, if not nil, is told once
// a minute at most that connections were turned away, or cannot be accepted; it must not wait.
func New(most int, listener net.Listener, counts *Counts, log func(error)) *Gate {
	if log == nil {
		log = func(error) {}
	}
	return &Gate{
		Listener: listener,
		Counts:   counts,
		public:   listener != nil && !addressOf(listener.Addr()).IsLoopback(),
		log:      log,
		shares:   newShares(most),
		inside:   map[*Conn]struct{}{},
		seldom:   Seldom{Every: time.Minute},
	}
}

// host returns what counts as the host of a connection.
func (g *Gate) host(conn net.Conn) netip.Prefix {
	ip := addressOf(conn.RemoteAddr())
	if ip.IsLoopback() {
		if !g.public {
			return netip.Prefix{}
		}
		ip = netip.AddrFrom4([4]byte{127, 0, 0, 1}) // all of it is one host
	}
	return hostOf(ip)
}

// Accept implements net.Listener. What it returns is a [*Conn]. Where no more files may be open, an
// idle connection makes room, as in [Gate.Enter]; while there is none, and after other failures but
// the end of the listener, it tries again.
func (g *Gate) Accept() (net.Conn, error) {
	for wait := time.Millisecond; ; wait = min(2*wait, time.Second) {
		conn, err := g.Listener.Accept()
		switch {
		case err == nil:
			wait = time.Millisecond
			if c, ok := g.Enter(conn); ok {
				return c, nil
			}
		case errors.Is(err, net.ErrClosed):
			return nil, err
		case !g.outlasts(err):
			time.Sleep(wait)
		}
	}
}

// outlasts reports whether there is room again after a connection could not be accepted.
func (g *Gate) outlasts(err error) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	full := errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
	room := full && g.makeRoom(anyOf, time.Time{})
	if !room {
		g.seldom.Log(g.log, fmt.Errorf("accepting a connection: %w", err))
	}
	return room
}

// Enter lets a connection in, or closes it. Where there is no room it closes an idle connection, of
// the same host if it is that which has too many, else of the one that has the most: that which has
// been idle the longest. For one that has been so for some time it waits a tenth of a second, if it
// has not waited much lately.
func (g *Gate) Enter(conn net.Conn) (c *Conn, ok bool) {
	host, until := g.host(conn), time.Now().Add(leastIdle)
	g.mu.Lock()
	defer g.mu.Unlock()
	ok = true
	for ok && g.shares.full(host) {
		ok = g.makeRoom(func(c *Conn) bool { return c.host == host }, until)
	}
	for ok && g.shares.all >= g.shares.most {
		ok = g.makeRoom(anyOf, until)
	}
	if !ok {
		g.turnedAway.Add(1)
		g.unlogged++
		if g.seldom.Log(g.log, fmt.Errorf("%d connections turned away: all of %d, or half of them for one host, are busy", g.unlogged, g.shares.most)) {
			g.unlogged = 0
		}
		conn.Close()
		return nil, false
	}
	g.accepted.Add(1)
	g.connections.Add(1)
	c = &Conn{Conn: conn, gate: g, host: host, siblings: g.shares.add(host)}
	g.inside[c] = struct{}{}
	g.open.Add(1)
	c.leave = sync.OnceFunc(func() {
		defer g.open.Done()
		g.mu.Lock()
		defer g.mu.Unlock()
		g.remove(c)
	})
	return c, true
}

// Close closes the connection, which leaves.
func (c *Conn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}

// SetIdle says whether nothing is being done for a connection at the moment, so that it may make
// room for others; at first something is.
func (c *Conn) SetIdle(idle bool) {
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	now := time.Now()
	switch {
	case !idle:
		c.idle = time.Time{}
	case c.idle.IsZero() || c.idle.After(now):
		c.idle = now
	}
}

// leastIdle is for how long a connection had better have been idle before it makes room: whoever
// has just come, or has just had an answer, is about to send a request.
const leastIdle = 100 * time.Millisecond

// While the gate waits for one, all wait who have not been accepted yet, whatever host they come
// from. So it waits for mostWaited in all, and then for a tenth of the time: many who come at once
// are let in one after the other, and a host that floods it holds up no other for long.
const (
	mostWaited  = 3 * time.Second
	waitedShare = 10
)

// makeRoom closes the connection that [Gate.Enter] says, of those that may go, or waits for it to
// have been idle long enough, until then at most, or to leave. It reports whether there is one. The
// caller holds the lock, which is released while it waits.
func (g *Gate) makeRoom(may func(*Conn) bool, until time.Time) bool {
	var first *Conn
	most := 0 // connections of its host
	now := time.Now()
	for c := range g.inside {
		if c.idle.IsZero() || c.idle.After(now) || !may(c) {
			continue
		}
		if n := *c.siblings; first == nil || n > most || n == most && c.idle.Before(first.idle) {
			first, most = c, n
		}
	}
	if first == nil {
		return false
	}
	wait := min(leastIdle-now.Sub(first.idle), until.Sub(now))
	if wait > 0 && g.waited.Sub(now) <= (mostWaited-wait)*waitedShare {
		g.waited = now.Add(max(0, g.waited.Sub(now)) + wait*waitedShare)
		g.mu.Unlock()
		time.Sleep(wait)
		g.mu.Lock()
		return true
	}
	g.remove(first)
	conn := first.Conn
	if secure, ok := conn.(*tls.Conn); ok {
		conn = secure.NetConn() // to take leave can last seconds
	}
	conn.Close()
	return true
}

func anyOf(*Conn) bool { return true }

// remove takes a connection out of all counts, once.
func (g *Gate) remove(c *Conn) {
	if _, ok := g.inside[c]; ok {
		delete(g.inside, c)
		g.connections.Add(-1)
		g.shares.remove(c.host)
	}
}

// Wait waits until all connections have left. No others may come meanwhile.
func (g *Gate) Wait() { g.open.Wait() }

// The bounds of what [Gate.Server] returns.
const (
	headerTimeout  = 30 * time.Second
	requestTimeout = time.Minute
	idleTimeout    = 2 * time.Minute
	maxHeader      = 16 << 10
	// A body flows while so many bytes of it come within flowTime, and an answer while more of it can
	// be written.
	flowBytes = 4 << 10
	flowTime  = 3 * time.Second
)

// Server returns an HTTP server for the listener of the gate, whose idle connections make room, and
// those on which bodies of requests, or that answers are taken, are waited for and do not flow. The
// header of a request has 30 seconds and 16 KiB, its body a minute, and so has what the handler
// writes, unless it sets other deadlines; a connection waits 2 minutes for a further request. What
// goes wrong between clients and net/http is not logged. Fields may be changed before it serves.
func (g *Gate) Server(handler http.Handler) *http.Server {
	return &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			x := &exchange{ResponseWriter: w, ReadCloser: r.Body, ctx: r.Context(), conn: ConnOf(r), more: r.ContentLength != 0}
			if x.more {
				r = r.WithContext(r.Context()) // for net/http looks at the body of its own
				r.Body = x
			}
			x.conn.count(1, 0, false)
			defer func() { x.conn.count(-1, -x.waiting, false) }()
			handler.ServeHTTP(x, r)
		}),
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, conn)
		},
		ConnState: func(conn net.Conn, state http.ConnState) {
			conn.(*Conn).SetIdle(state == http.StateNew || state == http.StateIdle)
		},
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       requestTimeout,
		WriteTimeout:      requestTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          log.New(io.Discard, "", 0),
	}
}

// count counts requests and those that wait for the client, which has done its part just now if
// flows is set: while these are all, the connection is idle once nothing has flowed for some time.
// Net/http says that it is when the last one has ended, but does not wait for handlers of requests
// that the client has given up by HTTP/2, and waits for what they have not read of a body.
func (c *Conn) count(requests, waiting int, flows bool) {
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	c.requests += requests
	c.waiting += waiting
	now := time.Now()
	if flows {
		c.flows = now.Add(flowTime)
	}
	switch {
	case c.requests > c.waiting:
		c.idle = time.Time{}
	case c.idle.IsZero() || flows:
		c.idle = now
		if c.flows.After(now) {
			c.idle = c.flows
		}
	}
}

// An exchange is the body of a request, and where its answer goes. Who answers without the body
// does not wait for it: its length may be unknown, and there is none.
type exchange struct {
	http.ResponseWriter
	io.ReadCloser
	ctx     context.Context // ends when the client gives the request up
	conn    *Conn
	more    bool // the body has not come whole
	waiting int  // 1 from the first call of Read until then
	flowed  int  // bytes of the body that have not been counted
}

// Read implements io.Reader.
func (x *exchange) Read(p []byte) (n int, err error) {
	if x.more && x.waiting == 0 {
		x.waiting = 1
		x.conn.count(0, 1, false)
	}
	n, err = x.ReadCloser.Read(p)
	x.flowed += n
	switch {
	case !x.more:
	case err == io.EOF:
		x.more, x.waiting = false, 0
		x.conn.count(0, -1, true)
	case x.flowed >= flowBytes:
		x.flowed = 0
		x.conn.count(0, 0, true)
	}
	return n, err
}

// Write implements io.Writer.
func (x *exchange) Write(p []byte) (n int, err error) {
	if x.waiting == 0 {
		x.conn.count(0, 1, false)
		defer func() { x.conn.count(0, -1, n > 0 && x.ctx.Err() == nil) }()
	}
	return x.ResponseWriter.Write(p)
}

// Unwrap is for [http.ResponseController].
func (x *exchange) Unwrap() http.ResponseWriter { return x.ResponseWriter }

// connKey is the key of the connection in the context of a request.
type connKey struct{}

// ConnOf returns the connection that a request to what [Gate.Server] returns has come by; it is nil
// for others.
func ConnOf(r *http.Request) *Conn {
	c, _ := r.Context().Value(connKey{}).(*Conn)
	return c
}

// Unfinished has clients and proxies see that an answer is not whole whose end is that of the
// connection, as HTTP/1.0 has it where the length is not known: until whole is called, that end is
// a reset, whatever ends the handler or this process. Proxies would keep what they take for whole.
// The request is one to what [Gate.Server] returns; for others nothing is done.
func Unfinished(r *http.Request) (whole func()) {
	if c := ConnOf(r); c != nil && !r.ProtoAtLeast(1, 1) {
		if tcp, ok := c.Conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // fails where the client has gone
			return func() { _ = tcp.SetLinger(-1) }
		}
	}
	return func() {}
}

// stopTime is how long clients get when a server stops.
const stopTime = 5 * time.Second

// Serve has a server of the gate serve what that accepts, until the listener fails or ctx is done;
// then what has been requested is answered, if that does not take long, and all connections end.
func (g *Gate) Serve(ctx context.Context, server *http.Server) error {
	some, none := context.WithCancel(context.Background()) // whether there are connections
	defer none()
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		graceful, cancel := context.WithTimeout(some, stopTime)
		defer cancel()
		_ = server.Shutdown(graceful)
		server.Close()
	})
	err := server.Serve(g)
	if stop() {
		server.Close()
		g.open.Wait()
		return err
	}
	g.open.Wait()
	none()
	<-ended
	return nil
}

// Seldom is for what is to be done at most about once per second, or per Every, such as to log what
// strangers make go wrong. The zero value is ready; it is safe for concurrent use.
type Seldom struct {
	Every time.Duration // 0 is a second
	last  atomic.Int64
}

// Due reports whether it is time, and takes it for done then.
func (s *Seldom) Due() bool {
	now, last := time.Now().Unix(), s.last.Load()
	due := now < last || now-last >= max(1, int64(s.Every/time.Second)) // a clock may be set back
	return due && s.last.CompareAndSwap(last, now)
}

// DueFor is Due for what went wrong with a request; it never is if the client has gone.
func (s *Seldom) DueFor(r *http.Request) bool { return r.Context().Err() == nil && s.Due() }

// Log hands an error to the log, unless there was one just now. It reports whether it has.
func (s *Seldom) Log(log func(error), err error) (logged bool) {
	logged = s.Due()
	if logged {
		log(err)
	}
	return logged
}

// FromPageHere reports whether a request may be answered though it changes something or begins a
// conversation: whether it is of no browser, which would say where its page comes from (Origin), or
// names as its host the address that it came to, localhost if that is of this machine, or one of
// names. The name of any other host can be made to lead here, so that its pages seem to be ours.
func FromPageHere(r *http.Request, names []string) bool {
	here, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	local := addressOf(here)
	if r.Header.Get("Origin") == "" || !local.IsValid() {
		return true
	}
	u := url.URL{Host: strings.ToLower(r.Host)}
	host := u.Hostname()
	if ip, err := netip.ParseAddr(host); err == nil {
		return ip.Unmap().WithZone("") == local.WithZone("")
	}
	return host == "localhost" && local.IsLoopback() || slices.Contains(names, host)
}

// Slots bound how many things are done at a time that cost much, of which one host may have half,
// but at least one. They are safe for concurrent use.
type Slots struct {
	mu     sync.Mutex
	shares shares
	freed  chan struct{} // closed when a slot has become free
}

// NewSlots returns so many slots.
func NewSlots(most int) *Slots {
	return &Slots{shares: newShares(most), freed: make(chan struct{})}
}

// Acquire waits for a slot, until ctx ends, whose cause it returns then. Remote is the address of
// the client, as in [http.Request]; this machine counts for no host, for it may be a proxy. Release
// must be called, once.
func (s *Slots) Acquire(ctx context.Context, remote string) (release func(), err error) {
	for {
		release, freed := s.acquire(remote)
		if release != nil {
			return release, nil
		}
		select {
		case <-freed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// TryAcquire is Acquire, but does not wait: if there is no slot it returns nil.
func (s *Slots) TryAcquire(remote string) (release func()) {
	release, _ = s.acquire(remote)
	return release
}

// acquire returns a slot, or nil and what is closed when one has become free.
func (s *Slots) acquire(remote string) (release func(), freed <-chan struct{}) {
	address, _ := netip.ParseAddrPort(remote)
	host := hostOf(address.Addr())
	if address.Addr().Unmap().IsLoopback() {
		host = netip.Prefix{}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.shares.all >= s.shares.most || s.shares.full(host) {
		return nil, s.freed
	}
	s.shares.add(host)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.shares.remove(host)
		close(s.freed)
		s.freed = make(chan struct{})
	}, nil
}
