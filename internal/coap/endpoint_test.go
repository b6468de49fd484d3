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
	roundTrip      time.Duration
	percent        int // of datagrams that are lost, each way
	answers        chan []byte
	sent           atomic.Int32

	mu     sync.Mutex
	random *rand.Rand
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
	time.AfterFunc(p.roundTrip, func() { p.answers <- answer })
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
// answer, and to one behind a line that loses much.
func TestFarPeer(t *testing.T) {
	const requests = 300
	for name, test := range map[string]struct {
		roundTrip time.Duration
		percent   int
		mostSent  int32
		mostTime  time.Duration
	}{
		"near":       {10 * time.Millisecond, 0, requests, time.Second},
		"far":        {900 * time.Millisecond, 0, requests + 20, 30 * time.Second},
		"very far":   {1800 * time.Millisecond, 0, requests + 20, time.Minute},
		"much lost":  {10 * time.Millisecond, 30, 3 * requests, time.Minute},
		"far, lossy": {600 * time.Millisecond, 10, 2 * requests, 100 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				peer := &farPeer{roundTrip: test.roundTrip, percent: test.percent, random: rand.New(rand.NewPCG(1, 2)), answers: make(chan []byte, 1000)}
				e := NewEndpoint(nil, EndpointConfig{
					AckTimeout: 500 * time.Millisecond, Timeout: time.Minute,
					Dial: func() (net.Conn, error) { return peer, nil },
				})
				go e.Run()
				begin, store, done := time.Now(), NewRequests(WellKnownPath()), make(chan *Exchange)
				for range requests {
					e.Start(&Exchange{Store: store, Size: 1024, Done: func(x *Exchange) { done <- x }})
				}
				for answered := 0; answered < requests; {
					if x := <-done; x.Err == nil {
						answered++
					} else if !e.Start(x) { // as whoever wants the block does
						t.Fatal(x.Err)
					}
				}
				took, sent := time.Since(begin), peer.sent.Load()
				t.Logf("%d messages, %v", sent, took)
				if sent > test.mostSent || took > test.mostTime {
					t.Errorf("%d requests took %d messages and %v", requests, sent, took)
				}
				time.Sleep(time.Minute) // what is on the way arrives
				e.Close(errClosed)
				close(peer.answers)
			})
		})
	}
}
