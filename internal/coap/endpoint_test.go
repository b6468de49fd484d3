// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// farPeer is a socket whose peer answers each datagram after a round trip, unless one of the two is
// lost.
type farPeer struct {
	net.PacketConn // for the methods that are not called
	line
	answers chan []byte
	sent    atomic.Int32
	held    atomic.Int32 // at most, on the way

	mu      sync.Mutex
	random  *rand.Rand
	taken   map[uint16]bool // requests that the peer takes its time for
	free    time.Time       // when the last answer in the queue will have been sent
	present int32           // on the way
}

// line is how a peer is reached.
type line struct {
	roundTrip time.Duration
	percent   int           // of datagrams that are lost, each way
	gap       time.Duration // that an answer takes for itself
	queue     time.Duration // that answers wait at most for their turn; further ones are lost
	unsteady  time.Duration // that one answer of a hundred is late
	slow      time.Duration // that the peer takes for one request of ten, of which it answers one copy
}

func (p *farPeer) Write(b []byte) (int, error) {
	p.sent.Add(1)
	m, err := parseDatagram(b)
	if err != nil {
		return 0, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for range 2 {
		if p.random.IntN(100) < p.percent {
			return len(b), nil
		}
	}
	answer := appendDatagramHead(nil, message.Acknowledgement, codes.Content, m.ID, m.Token)
	now := time.Now()
	if p.free.Before(now) {
		p.free = now
	}
	waits := p.free.Sub(now)
	if p.queue > 0 && waits > p.queue {
		return len(b), nil
	}
	p.free = p.free.Add(p.gap)
	if p.random.IntN(100) == 0 {
		waits += p.unsteady
	}
	if p.slow > 0 && m.ID%10 == 0 {
		if p.taken[m.ID] {
			return len(b), nil
		}
		waits += p.slow
		p.taken[m.ID] = true
	}
	p.present++
	p.held.Store(max(p.held.Load(), p.present))
	time.AfterFunc(p.roundTrip+waits+p.gap, func() {
		p.mu.Lock()
		p.present--
		p.mu.Unlock()
		p.answers <- answer
	})
	return len(b), nil
}

func (p *farPeer) ReadFrom(b []byte) (int, net.Addr, error) {
	answer, ok := <-p.answers
	if !ok {
		return 0, nil, net.ErrClosed
	}
	return copy(b, answer), nil, nil
}

func (p *farPeer) Read([]byte) (int, error) { return 0, io.EOF }
func (p *farPeer) RemoteAddr() net.Addr     { return nil }
func (p *farPeer) Close() error             { return nil }

// deaf is a socket on which nothing comes, and that cannot send.
type deaf struct {
	farPeer
	err error
}

func (d *deaf) Write([]byte) (int, error) { return 0, &net.OpError{Op: "write", Err: d.err} }

// TestWriteFails has the socket report errors: of no more use is it for all but "connection
// refused", which is about what was sent before.
func TestWriteFails(t *testing.T) {
	for err, over := range map[error]bool{
		syscall.ECONNREFUSED: false, syscall.ENETUNREACH: true, syscall.EINVAL: true, syscall.EADDRNOTAVAIL: true,
	} {
		socket := &deaf{farPeer{answers: make(chan []byte)}, err}
		e := NewEndpoint(nil, EndpointConfig{Timeout: time.Minute, Dial: func() (net.Conn, error) { return socket, nil }})
		e.lastHeard = time.Now()
		go e.Run()
		done := make(chan *Exchange, 1)
		e.Start(&Exchange{Store: NewRequests(WellKnownPath()), Size: 1024, Done: func(x *Exchange) { done <- x }})
		if x := <-done; !errors.Is(x.Err, err) {
			t.Errorf("%v: %v", err, x.Err)
		}
		if _, state := e.State(); (state != nil) != over {
			t.Errorf("after %v: %v", err, state)
		}
		e.Close(errClosed)
		close(socket.answers)
	}
}

// TestFarPeer makes requests by UDP to a peer that is farther away than the first wait for an
// answer, to some behind lines that lose much, carry much, carry little, or are unsteady, and to
// one that is slow itself.
func TestFarPeer(t *testing.T) {
	for name, test := range map[string]struct {
		line
		requests int
		mostSent int32
		mostHeld int32
		mostTime time.Duration
	}{
		"near":                 {line{roundTrip: 10 * time.Millisecond}, 300, 300, 300, time.Second},
		"far":                  {line{roundTrip: 900 * time.Millisecond}, 300, 320, 300, 30 * time.Second},
		"very far":             {line{roundTrip: 1800 * time.Millisecond}, 300, 320, 300, time.Minute},
		"much lost":            {line{roundTrip: 10 * time.Millisecond, percent: 30}, 300, 900, 300, time.Minute},
		"far, lossy":           {line{roundTrip: 600 * time.Millisecond, percent: 10}, 300, 600, 300, 100 * time.Second},
		"far, wide, lossy":     {line{roundTrip: 100 * time.Millisecond, gap: time.Millisecond, percent: 1}, 20000, 21000, 400, 30 * time.Second},
		"near, wide, lossy":    {line{roundTrip: time.Millisecond, gap: 80 * time.Microsecond, percent: 3}, 20000, 22000, 400, 5 * time.Second},
		"near, unsteady":       {line{roundTrip: time.Millisecond, gap: 80 * time.Microsecond, unsteady: 100 * time.Millisecond}, 20000, 20800, 400, 2 * time.Second},
		"near, slow":           {line{roundTrip: 5 * time.Millisecond, gap: time.Millisecond, slow: 1500 * time.Millisecond}, 10000, 16000, 400, 2 * time.Minute},
		"far, unsteady":        {line{roundTrip: 300 * time.Millisecond, unsteady: 80 * time.Millisecond}, 3000, 3000, 3000, 10 * time.Second},
		"far and wide":         {line{roundTrip: 300 * time.Millisecond, gap: 100 * time.Microsecond}, 20000, 20000, 4096, 10 * time.Second},
		"wide, busy":           {line{roundTrip: 50 * time.Microsecond, gap: 20 * time.Microsecond}, 20000, 20000, 100, time.Second},
		"slow, short queue":    {line{roundTrip: 20 * time.Millisecond, gap: 9 * time.Millisecond, queue: 50 * time.Millisecond}, 1000, 1200, 100, 11 * time.Second},
		"far, short queue":     {line{roundTrip: 300 * time.Millisecond, gap: time.Millisecond, queue: 50 * time.Millisecond}, 20000, 20500, 400, 30 * time.Second},
		"far, very long queue": {line{roundTrip: 300 * time.Millisecond, gap: time.Millisecond, queue: time.Hour}, 20000, 20100, 600, 30 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				peer := &farPeer{
					line: test.line, random: rand.New(rand.NewPCG(1, 2)), taken: make(map[uint16]bool), answers: make(chan []byte, test.requests),
				}
				e := NewEndpoint(nil, EndpointConfig{
					AckTimeout: 500 * time.Millisecond, Timeout: time.Minute,
					Dial: func() (net.Conn, error) { return peer, nil },
				})
				go e.Run()
				begin, store, done := time.Now(), NewRequests(WellKnownPath()), make(chan *Exchange)
				for range test.requests {
					e.Start(&Exchange{Store: store, Size: 1024, Done: func(x *Exchange) { done <- x }})
				}
				for answered := 0; answered < test.requests; {
					if x := <-done; x.Err == nil {
						answered++
					} else if !e.Start(x) { // as whoever wants the block does
						t.Fatal(x.Err)
					}
				}
				took, sent, held := time.Since(begin), peer.sent.Load(), peer.held.Load()
				t.Logf("%d messages, %d at a time, %v", sent, held, took)
				if sent > test.mostSent || held > test.mostHeld || took > test.mostTime {
					t.Errorf("%d requests took %d messages, %d at a time, and %v", test.requests, sent, held, took)
				}
				time.Sleep(time.Minute) // what is on the way arrives
				e.Close(errClosed)
				close(peer.answers)
			})
		})
	}
}

// TestFullSocket makes more requests than a socket may: further ones are refused, so that they are
// made on another one, but parts of what has begun are not; no message ID is used twice; and the
// socket is closed some time after the last answer.
func TestFullSocket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		peer := &farPeer{line: line{roundTrip: time.Millisecond}, random: rand.New(rand.NewPCG(1, 2)), answers: make(chan []byte, 100)}
		e := NewEndpoint(nil, EndpointConfig{Timeout: time.Minute, Dial: func() (net.Conn, error) { return peer, nil }})
		ended := make(chan error, 1)
		go func() { ended <- e.Run() }()
		store, done := NewRequests(WellKnownPath()), make(chan *Exchange)
		start := func(part uint32) bool {
			return e.Start(&Exchange{Store: store, Size: 1024, Block: Block{Number: part, Present: true}, Done: func(x *Exchange) { done <- x }})
		}
		for i := range messagesPerSocket {
			if !start(0) {
				t.Fatalf("request %d is refused", i)
			}
			if x := <-done; x.Err != nil {
				t.Fatal(x.Err)
			}
		}
		if _, err := e.State(); start(0) || err != ErrReleased {
			t.Errorf("a further request is taken, and the state is %v", err)
		}
		for range messagesPerSocket {
			if !start(1) {
				t.Fatal("a further part is refused")
			}
			if x := <-done; x.Err != nil {
				t.Fatal(x.Err)
			}
		}
		time.Sleep(2 * time.Minute)
		e.Lock()
		err := e.err
		e.Unlock()
		if err != ErrReleased {
			t.Errorf("two minutes after the last answer the end is %v", err)
		}
		close(peer.answers)
		<-ended
	})
}
