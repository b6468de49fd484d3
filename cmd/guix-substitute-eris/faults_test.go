// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// A fault happens to a connection, or to a response.
type fault string

const (
	none fault = ""

	// On the way from the server, after some bytes.
	cut     fault = "cut"     // the connection ends
	reset   fault = "reset"   // it is reset
	pause   fault = "pause"   // nothing comes for a while
	corrupt fault = "corrupt" // bits are wrong now and then
	lose    fault = "lose"    // bytes are missing
	insert  fault = "insert"  // there are some too many
	refuse  fault = "refuse"  // it ends before it has begun
	stall   fault = "stall"   // nothing comes any more
	drip    fault = "drip"    // little comes
	deaf    fault = "deaf"    // half-open: nothing is read either
	busy    fault = "busy"    // 503, 5.00
	retry   fault = "retry"   // 503 with Retry-After
	missing fault = "missing" // 404, 4.04
	shorter fault = "shorter" // less than Content-Length says
	partial fault = "partial" // less than there is, with a Content-Length that agrees
	longer  fault = "longer"  // more than there is
)

// Those of a connection: short ones, and those that last. The others are of responses.
var (
	shortFaults   = []fault{cut, reset, pause, corrupt, lose, insert, refuse}
	lastingFaults = []fault{stall, drip, deaf}
	storeFaults   = []fault{busy, missing}
	serverFaults  = []fault{busy, retry, missing, shorter, partial, longer}
)

// faults draws faults from a seed: the same for the same thing that they happen to, and the same
// number of times that it has been used.
type faults struct {
	seed  uint64
	kinds []fault
	share float64       // of what has a fault
	end   chan struct{} // of everything

	mu   sync.Mutex
	used map[string]int
}

// draw returns what happens to something.
func (f *faults) draw(name string) (fault, *rand.Rand) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.used == nil {
		f.used = map[string]int{}
	}
	f.used[name]++
	h := fnv.New64a()
	fmt.Fprintf(h, "%s %d", name, f.used[name])
	random := rand.New(rand.NewPCG(f.seed, h.Sum64()))
	if len(f.kinds) == 0 || random.Float64() >= f.share {
		return none, random
	}
	return f.kinds[random.IntN(len(f.kinds))], random
}

// wait waits for some time, or until the end.
func (f *faults) wait(d time.Duration) {
	select {
	case <-time.After(d):
	case <-f.end:
	}
}

// faultyListener accepts connections that have faults.
type faultyListener struct {
	net.Listener
	*faults
}

func (l faultyListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		kind, random := l.draw("connection")
		if kind == refuse {
			conn.Close()
			continue
		}
		// Faults are in headers, in small responses, and in large ones.
		at := random.IntN([]int{300, 5000, 100000}[random.IntN(3)])
		return &faultyConn{Conn: conn, faults: l.faults, deaf: kind == deaf, kind: kind, left: at, random: random}, nil
	}
}

// faultyConn is a connection to which something happens after some bytes have been written.
type faultyConn struct {
	net.Conn
	*faults
	deaf   bool
	kind   fault // of what is written
	random *rand.Rand
	left   int // bytes until then
}

func (c *faultyConn) Read(b []byte) (int, error) {
	if c.deaf {
		<-c.end
		return 0, io.EOF
	}
	return c.Conn.Read(b)
}

func (c *faultyConn) Write(b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		if c.kind == none {
			c.left = len(b)
		}
		k := min(c.left, len(b)-n)
		if k > 0 {
			k, err = c.Conn.Write(b[n : n+k])
			c.left -= k
		} else {
			k, err = c.happen(b[n:])
		}
		n += k
	}
	return n, err
}

// happen does what happens to some bytes, and returns how many are dealt with.
func (c *faultyConn) happen(b []byte) (int, error) {
	kind := c.kind
	switch kind {
	case cut, reset:
		if tcp, ok := c.Conn.(*net.TCPConn); ok && kind == reset {
			tcp.SetLinger(0)
		}
		c.Close()
		return 0, net.ErrClosed
	case stall, deaf:
		<-c.end
		return 0, net.ErrClosed
	case drip:
		c.wait(50 * time.Millisecond)
		return c.Conn.Write(b[:min(len(b), 64)])
	case corrupt:
		c.left = c.random.IntN(50000)
		_, err := c.Conn.Write([]byte{b[0] ^ 1<<c.random.IntN(8)})
		return 1, err
	}
	c.kind = none
	switch kind {
	case pause:
		c.wait(time.Duration(c.random.IntN(800)) * time.Millisecond)
	case lose:
		return min(len(b), 1+c.random.IntN(3000)), nil
	case insert:
		junk := make([]byte, 1+c.random.IntN(3000))
		for i := range junk {
			junk[i] = byte(c.random.Uint32())
		}
		_, err := c.Conn.Write(junk)
		return 0, err
	}
	return 0, nil
}

// faultyStore is a source of blocks that does not have some, sometimes.
func faultyStore(store fetch.Source, f *faults) fetch.Source {
	return fetch.NewWorkers(store.String(), 8, func(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
		switch kind, _ := f.draw(ref.String()); kind {
		case busy:
			return nil, errors.New("busy")
		case missing:
			return nil, eris.ErrNotFound
		}
		return fetch.Get(ctx, store, ref, size, dst)
	})
}

// respond writes a response that may have a fault.
func (f *faults) respond(w http.ResponseWriter, r *http.Request, body []byte, plain func()) {
	kind, random := f.draw(r.URL.Path)
	amount := random.IntN(len(body))
	header := w.Header()
	switch kind {
	case busy:
		w.WriteHeader(http.StatusServiceUnavailable)
	case retry:
		header.Set("Retry-After", "1")
		w.WriteHeader(http.StatusServiceUnavailable)
	case missing:
		w.WriteHeader(http.StatusNotFound)
	case shorter:
		header.Set("Content-Length", fmt.Sprint(len(body)))
		w.Write(body[:amount])
	case partial:
		w.Write(body[:amount])
	case longer:
		w.Write(append(body[:len(body):len(body)], body[:amount]...))
	default:
		plain()
	}
}
