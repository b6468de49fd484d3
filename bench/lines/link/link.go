// SPDX-License-Identifier: GPL-3.0-or-later

// Package link simulates a network link for tests and benchmarks: a proxy in this process, for TCP
// and Unix sockets, that delays what passes through it, bounds its rate, stalls, and cuts
// connections. Start with [New].
//
// All connections of a link share its rate, as on a line. Each direction has a queue in front of
// the line, as routers have; when it is full, the sender has to wait. Time is that of the clock on
// the wall: what the machine cannot carry, the link cannot carry either. Bytes move in portions of
// up to 256 KiB, so that 1 Gbit/s takes some thousand wake-ups a second.
package link

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

// Direction is one direction of a link. The zero value passes everything on at once.
type Direction struct {
	// Delay is the time from one end to the other.
	Delay time.Duration
	// Rate is the most bytes per second; 0 stands for no bound.
	Rate int64
	// Queue is how many bytes wait at most to be sent at Rate. Default: what is sent in 20 ms, at
	// least 64 KiB.
	Queue int64
	// Loss is the share of packets of 1460 bytes that are lost, from 0 to 1. As over TCP, they come
	// one round trip later, and so does what is behind them; that TCP slows down as well is not
	// simulated.
	Loss float64
	// CutAfter is the number of bytes of a connection after which it is cut in both directions; 0
	// stands for never.
	CutAfter int64
	// StallAfter is the number of bytes of a connection after which no more of them pass, while the
	// connection stays; 0 stands for never.
	StallAfter int64
}

// Symmetric returns two equal directions with half of the round-trip time each, and the given rate
// in bytes per second.
func Symmetric(roundTrip time.Duration, rate int64) (up, down Direction) {
	d := Direction{Delay: roundTrip / 2, Rate: rate}
	return d, d
}

const (
	// largestPortion is how many bytes move at a time; at low rates, fewer, so that the rate is
	// kept in time as well.
	largestPortion  = 256 << 10
	smallestPortion = 1460
	packet          = 1460
	// maxUnderWay and maxPortions bound what is on the line, for each connection.
	maxUnderWay = 64 << 20
	maxPortions = 1 << 12
)

// Link is a proxy in front of one address. It is safe for concurrent use, and must be closed.
type Link struct {
	listener        net.Listener
	network, target string
	up, down        *line
	group           sync.WaitGroup

	mu     sync.Mutex
	closed bool
	conns  map[net.Conn]struct{}
}

// New starts a link to the given address; network is "tcp" or "unix". Connections are to be made to
// [Link.Addr]: with "tcp", a port of the loopback interface, otherwise the socket named by listen,
// which may be empty with "tcp". Up is the direction towards the target. Errors are those of
// listening.
func New(network, listen, target string, up, down Direction) (*Link, error) {
	if network == "tcp" && listen == "" {
		listen = "127.0.0.1:0"
	}
	listener, err := net.Listen(network, listen)
	if err != nil {
		return nil, err
	}
	l := &Link{
		listener: listener, network: network, target: target, conns: map[net.Conn]struct{}{},
		up: newLine(up, up.Delay+down.Delay), down: newLine(down, up.Delay+down.Delay),
	}
	l.group.Go(l.accept)
	return l, nil
}

// Addr returns where connections through the link are to be made.
func (l *Link) Addr() string { return l.listener.Addr().String() }

// Bytes returns how many bytes have entered the link towards the target and from it.
func (l *Link) Bytes() (up, down int64) { return l.up.passed(), l.down.passed() }

// Stall stops everything, or lets it go on. Connections stay, and new ones are taken, but nothing
// passes.
func (l *Link) Stall(stalled bool) {
	l.up.stall(stalled)
	l.down.stall(stalled)
}

// Cut ends all connections at once. New ones can be made.
func (l *Link) Cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.conns {
		c.Close()
	}
}

// Close ends the link with all of its connections, and waits for that.
func (l *Link) Close() error {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	err := l.listener.Close()
	l.Cut()
	l.up.close()
	l.down.close()
	l.group.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (l *Link) accept() {
	for {
		near, err := l.listener.Accept()
		if err != nil {
			return
		}
		far, err := net.Dial(l.network, l.target)
		if err != nil {
			near.Close()
			continue
		}
		l.mu.Lock()
		if l.closed {
			l.mu.Unlock()
			near.Close()
			far.Close()
			return
		}
		l.conns[near], l.conns[far] = struct{}{}, struct{}{}
		l.mu.Unlock()
		l.group.Go(func() { l.serve(near, far) })
	}
}

// serve carries one connection until both directions have ended.
func (l *Link) serve(near, far net.Conn) {
	for _, c := range []net.Conn{near, far} {
		if c, ok := c.(interface{ SetReadBuffer(int) error }); ok {
			c.SetReadBuffer(largestPortion) // or the kernel would be a longer queue than that of the line
		}
	}
	var group sync.WaitGroup
	cut := func() {
		near.Close()
		far.Close()
	}
	group.Go(func() { l.up.carry(far, near, cut) })
	group.Go(func() { l.down.carry(near, far, cut) })
	group.Wait()
	cut()
	l.mu.Lock()
	delete(l.conns, near)
	delete(l.conns, far)
	l.mu.Unlock()
}

// line is one direction of all connections.
type line struct {
	Direction
	portion   int
	roundTrip time.Duration
	memory    sync.Pool
	ctx       context.Context // ends with close
	close     func()

	mu      sync.Mutex
	total   int64
	free    time.Time // when the last byte in the queue will have been sent
	latest  time.Time // when the last byte will have come
	random  *rand.Rand
	stalled chan struct{} // closed when things go on; nil if they do
}

func newLine(d Direction, roundTrip time.Duration) *line {
	l := &line{Direction: d, roundTrip: roundTrip, portion: largestPortion, random: rand.New(rand.NewPCG(1, 2))}
	l.ctx, l.close = context.WithCancel(context.Background())
	if d.Rate > 0 {
		l.portion = int(min(largestPortion, max(smallestPortion, d.Rate/500)))
		if l.Queue <= 0 {
			l.Queue = max(64<<10, d.Rate/50)
		}
	}
	l.memory.New = func() any {
		b := make([]byte, l.portion)
		return &b
	}
	return l
}

func (l *line) passed() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.total
}

func (l *line) stall(stalled bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case stalled && l.stalled == nil:
		l.stalled = make(chan struct{})
	case !stalled && l.stalled != nil:
		close(l.stalled)
		l.stalled = nil
	}
}

// enter takes n bytes, and returns when they come out at the other end, and how long the sender has
// to wait before it may send more.
func (l *line) enter(n int) (arrival time.Time, wait time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total += int64(n)
	now := time.Now()
	sent := now
	if l.Rate > 0 {
		if l.free.Before(now) {
			l.free = now
		}
		l.free = l.free.Add(time.Duration(float64(n) / float64(l.Rate) * float64(time.Second)))
		sent = l.free
		wait = sent.Sub(now) - time.Duration(float64(l.Queue)/float64(l.Rate)*float64(time.Second))
	}
	arrival = sent.Add(l.Delay)
	if l.Loss > 0 {
		for rest := n; rest > 0; rest -= packet {
			if l.random.Float64() < l.Loss {
				arrival = arrival.Add(l.roundTrip)
				break
			}
		}
	}
	if arrival.Before(l.latest) {
		arrival = l.latest
	}
	l.latest = arrival
	return arrival, wait
}

// portion is a run of bytes on the line.
type portion struct {
	bytes   []byte
	memory  *[]byte // nil if the bytes are few and have memory of their own
	arrival time.Time
}

// wire is what is on the line of one connection, in one direction.
type wire struct {
	portions chan portion
	room     *semaphore.Weighted // bytes
	ctx      context.Context     // ends when nobody takes portions any more
}

// carry moves bytes from src to dst until either ends. If that is src, dst is told once everything
// has come there.
func (l *line) carry(dst, src net.Conn, cut func()) {
	ctx, cancel := context.WithCancel(l.ctx)
	w := wire{make(chan portion, maxPortions), semaphore.NewWeighted(maxUnderWay), ctx}
	var group sync.WaitGroup
	group.Go(func() {
		defer cancel()
		l.deliver(dst, w, cut)
	})
	l.receive(src, w)
	close(w.portions)
	group.Wait()
}

func (l *line) receive(src net.Conn, w wire) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		memory := l.memory.Get().(*[]byte)
		n, err := src.Read(*memory)
		if n > 0 {
			p := portion{bytes: (*memory)[:n], memory: memory}
			if n < len(*memory)/4 {
				p.bytes, p.memory = bytes.Clone(p.bytes), nil
				l.memory.Put(memory)
			}
			if w.room.Acquire(w.ctx, int64(n)) != nil {
				return
			}
			var wait time.Duration
			p.arrival, wait = l.enter(n)
			select {
			case w.portions <- p:
			case <-w.ctx.Done():
				return
			}
			if wait > 0 {
				timer.Reset(wait)
				select {
				case <-timer.C:
				case <-w.ctx.Done():
					return
				}
			}
		}
		if err != nil {
			return
		}
	}
}

func (l *line) deliver(dst net.Conn, w wire, cut func()) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	passed := int64(0)
	for p := range w.portions {
		if wait := time.Until(p.arrival); wait > 0 {
			timer.Reset(wait)
			select {
			case <-timer.C:
			case <-l.ctx.Done():
				return
			}
		}
		if !l.waitStall() {
			return
		}
		b := p.bytes
		stall := l.StallAfter > 0 && passed+int64(len(b)) >= l.StallAfter
		if stall {
			b = b[:l.StallAfter-passed]
		}
		end := l.CutAfter > 0 && passed+int64(len(b)) >= l.CutAfter
		if end {
			b = b[:l.CutAfter-passed]
		}
		if _, err := dst.Write(b); err != nil {
			cut()
			return
		}
		passed += int64(len(b))
		if end {
			cut()
			return
		}
		w.room.Release(int64(len(p.bytes)))
		if stall {
			l.swallow(w)
			return
		}
		if p.memory != nil {
			l.memory.Put(p.memory)
		}
	}
	if c, ok := dst.(interface{ CloseWrite() error }); ok {
		c.CloseWrite()
	}
}

// swallow takes what comes to nobody, until the connection or the link ends.
func (l *line) swallow(w wire) {
	for {
		select {
		case p, ok := <-w.portions:
			if !ok {
				return
			}
			w.room.Release(int64(len(p.bytes)))
		case <-l.ctx.Done():
			return
		}
	}
}

// waitStall waits while everything is stalled. It reports whether the link goes on.
func (l *line) waitStall() bool {
	l.mu.Lock()
	stalled := l.stalled
	l.mu.Unlock()
	if stalled == nil {
		return true
	}
	select {
	case <-stalled:
		return true
	case <-l.ctx.Done():
		return false
	}
}
