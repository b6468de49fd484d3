// SPDX-License-Identifier: GPL-3.0-or-later

// Package lines measures what reading blocks over long lines takes.
package lines

import (
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/bench/lines/link"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/sourcestate"
)

// blocks are in memory, in the order in which they are wanted.
type blocks struct {
	instant
	size eris.BlockSize
	refs []eris.Reference
}

// instant is a source that takes no time.
type instant struct {
	name   string
	blocks map[eris.Reference][]byte
}

func (s instant) String() string      { return s.name }
func (instant) Close() error          { return nil }
func (instant) Cancel(*fetch.Request) {}
func (s instant) Start(r *fetch.Request) {
	r.Block = s.blocks[r.Pair.Reference]
	r.Done(r)
}

// makeBlocks returns blocks of so many bytes together.
func makeBlocks(size eris.BlockSize, length int64) *blocks {
	b := &blocks{instant: instant{"memory:", map[eris.Reference][]byte{}}, size: size}
	random := rand.NewChaCha8([32]byte{byte(size >> 10)})
	for range length / int64(size) {
		block := make([]byte, size)
		random.Read(block)
		ref := eris.Sum(block)
		b.refs, b.blocks[ref] = append(b.refs, ref), block
	}
	return b
}

// serve serves blocks by CoAP over TCP on loopback, and returns the address.
func serve(tb testing.TB, source fetch.Source) string {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	return serveOn(tb, listener, source)
}

func serveOn(tb testing.TB, listener net.Listener, source fetch.Source) string {
	server := coapserver.New(coapserver.Config{Source: source, MaxGets: 256})
	var group sync.WaitGroup
	group.Go(func() { server.Serve(listener, coapserver.Access{Get: true}) })
	tb.Cleanup(func() {
		server.Close()
		group.Wait()
	})
	return listener.Addr().String()
}

func open(tb testing.TB, address string, o coap.Options) fetch.Source {
	s, err := coap.Open("coap+tcp://"+address, o)
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

// peer is a source at the other end of a line.
type peer struct {
	roundTrip time.Duration
	rate      int64 // bytes per second; 0: no bound
	down      link.Direction
	spoiled   bool // its blocks are wrong

	address string
	options coap.Options
}

// start makes the line to a peer.
func (p *peer) start(tb testing.TB, b *blocks) {
	served := b.instant
	if p.spoiled {
		served.blocks = map[eris.Reference][]byte{}
		for ref := range b.blocks {
			served.blocks[ref] = b.blocks[b.refs[0]]
		}
	}
	address := serve(tb, served)
	up, down := link.Symmetric(p.roundTrip, p.rate)
	down.StallAfter, down.CutAfter, down.Loss = p.down.StallAfter, p.down.CutAfter, p.down.Loss
	l, err := link.New("tcp", "", address, up, down)
	if err != nil {
		tb.Fatal(err)
	}
	p.address = l.Addr()
	tb.Cleanup(func() { l.Close() })
}

// run is what reading blocks through a pool has taken.
type run struct {
	took   time.Duration
	steady float64 // bytes per second, after the first fifth
	stats  []pool.SourceStats
	window fetch.Window
}

// read gets all blocks from peers, whose sources it closes, in order: no more than the window is
// asked for and not yet handed out.
func (b *blocks) read(tb testing.TB, state *sourcestate.State, peers []*peer) (r run) {
	var members []pool.Member
	for _, p := range peers {
		members = append(members, pool.Member{Source: open(tb, p.address, p.options)})
	}
	p := pool.New(members, pool.Options{State: state})
	r.window = p.Window()
	in := min(r.window.Requests, int(r.window.Bytes/int64(b.size)))
	begin, fifth := time.Now(), time.Time{}
	done := make([]chan error, len(b.refs))
	memory := make([][]byte, in)
	for i := range len(b.refs) + in {
		if i >= in {
			if err := <-done[i-in]; err != nil {
				tb.Fatalf("block %d: %v", i-in, err)
			}
		}
		if i == len(b.refs)/5+in {
			fifth = time.Now()
		}
		if i < len(b.refs) {
			done[i] = make(chan error, 1)
			if memory[i%in] == nil {
				memory[i%in] = make([]byte, 0, b.size)
			}
			p.Start(&fetch.Request{
				Pair: eris.Pair{Reference: b.refs[i]}, Size: b.size, Dst: memory[i%in],
				Done: func(r *fetch.Request) { done[i] <- r.Err },
			})
		}
	}
	r.took = time.Since(begin)
	r.steady = float64(len(b.refs)) * 4 / 5 * float64(b.size) / time.Since(fifth).Seconds()
	r.stats = p.Stats()
	if err := p.Close(); err != nil {
		tb.Error(err)
	}
	return r
}

func (r run) String() string {
	s := fmt.Sprintf("%v, window %d/%d MiB", r.took.Round(time.Millisecond), r.window.Requests, r.window.Bytes>>20)
	for _, m := range r.stats {
		s += fmt.Sprintf("\n  %+v", m)
	}
	return s
}

// TestFaultyLines reads over lines that break or fall silent on the way, with real connections.
func TestFaultyLines(t *testing.T) {
	b := makeBlocks(eris.BlockSize32KiB, 6e6)
	good := func() *peer { return &peer{roundTrip: 4 * time.Millisecond, rate: 20e6} }
	faulty := func(down link.Direction) *peer {
		p := good()
		p.down = down
		return p
	}
	liar := good()
	liar.spoiled = true
	for _, v := range []struct {
		name  string
		peers []*peer
	}{
		{"cut", []*peer{faulty(link.Direction{CutAfter: 1e6})}},
		{"one is cut", []*peer{faulty(link.Direction{CutAfter: 1e6}), good()}},
		{"both are cut", []*peer{faulty(link.Direction{CutAfter: 1e6}), faulty(link.Direction{CutAfter: 2e6})}},
		{"one stalls", []*peer{faulty(link.Direction{StallAfter: 1e6}), good()}},
		{"loss", []*peer{faulty(link.Direction{Loss: 0.01}), faulty(link.Direction{Loss: 0.001})}},
		{"one lies", []*peer{liar, good()}},
	} {
		t.Run(v.name, func(t *testing.T) {
			for _, p := range v.peers {
				p.start(t, b)
			}
			t.Log(b.read(t, sourcestate.Open(""), v.peers))
		})
	}
}

// BenchmarkLine reads over lines of several lengths, and reports which part of the rate of the
// lines was reached: from the first request to the last byte by a process that knows nothing
// (cold), and by a later one (warm); and after the first fifth (steady).
func BenchmarkLine(b *testing.B) {
	const ms = time.Millisecond
	line := func(roundTrip time.Duration, rate int64) *peer { return &peer{roundTrip: roundTrip, rate: rate} }
	stalls := line(20*ms, 20e6)
	stalls.down.StallAfter = 20e6
	for _, v := range []struct {
		name   string
		size   eris.BlockSize
		length int64
		peers  []*peer
	}{
		{"32KiB/25/20ms", eris.BlockSize32KiB, 100e6, []*peer{line(20*ms, 25e6)}},
		{"32KiB/25/300ms", eris.BlockSize32KiB, 100e6, []*peer{line(300*ms, 25e6)}},
		{"1KiB/25/20ms", eris.BlockSize1KiB, 50e6, []*peer{line(20*ms, 25e6)}},
		{"1KiB/25/300ms", eris.BlockSize1KiB, 50e6, []*peer{line(300*ms, 25e6)}},
		{"32KiB/125/1ms", eris.BlockSize32KiB, 500e6, []*peer{line(1*ms, 125e6)}},
		{"32KiB/125/100ms", eris.BlockSize32KiB, 500e6, []*peer{line(100*ms, 125e6)}},
		{"1KiB/125/100ms", eris.BlockSize1KiB, 500e6, []*peer{line(100*ms, 125e6)}},
		{"20+5", eris.BlockSize32KiB, 100e6, []*peer{line(20*ms, 20e6), line(20*ms, 5e6)}},
		{"near5+far20", eris.BlockSize32KiB, 100e6, []*peer{line(10*ms, 5e6), line(100*ms, 20e6)}},
		{"one stalls", eris.BlockSize32KiB, 100e6, []*peer{line(20*ms, 20e6), stalls}},
	} {
		b.Run(v.name, func(b *testing.B) {
			all := makeBlocks(v.size, v.length)
			rate := 0.0
			for _, p := range v.peers {
				p.start(b, all)
				rate += float64(p.rate)
			}
			all.measure(b, v.length, rate, v.peers)
		})
	}
}

// measure reads all blocks by a process that knows nothing and by a later one.
func (all *blocks) measure(b *testing.B, length int64, rate float64, peers []*peer) {
	for b.Loop() {
		state := sourcestate.Open("")
		for _, name := range []string{"cold", "warm"} {
			r := all.read(b, state, peers)
			b.ReportMetric(float64(length)/rate/r.took.Seconds(), name)
			b.ReportMetric(r.steady/rate, name+"steady")
			b.Log(name, r)
		}
	}
}
