// SPDX-License-Identifier: GPL-3.0-or-later

package pool_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/link"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/sourcestate"
)

// memory is a store in memory.
type memory struct {
	mu     sync.RWMutex
	blocks map[eris.Reference][]byte
	gets   atomic.Int64
	spoil  atomic.Bool // answers are wrong
}

func newMemory() *memory { return &memory{blocks: map[eris.Reference][]byte{}} }

func (m *memory) Get(_ context.Context, ref eris.Reference, size eris.BlockSize, _ []byte) ([]byte, error) {
	m.gets.Add(1)
	m.mu.RLock()
	block, ok := m.blocks[ref]
	m.mu.RUnlock()
	if !ok || len(block) != int(size) {
		return nil, eris.ErrNotFound
	}
	if m.spoil.Load() {
		block = bytes.Clone(block)
		block[0] ^= 1
	}
	return block, nil
}

func (m *memory) Put(_ context.Context, ref eris.Reference, block []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.blocks[ref] = bytes.Clone(block)
	return nil
}

// encode returns a store with a content of the given length, in blocks of the given size.
func encode(tb testing.TB, size eris.BlockSize, length int64) (*memory, eris.ReadCapability) {
	m := newMemory()
	random := rand.NewChaCha8([32]byte{byte(size >> 10), byte(length), byte(length >> 8)})
	c, err := eris.Encode(context.Background(), io.LimitReader(random, length), m, eris.EncodeOptions{BlockSize: size})
	if err != nil {
		tb.Fatal(err)
	}
	return m, c
}

// peer is a source at the other end of a line.
type peer struct {
	roundTrip time.Duration
	rate      int64 // bytes per second; 0: no bound
	down      link.Direction
	blocks    *memory // nil: those of the run

	link   *link.Link
	source fetch.Source
}

// start makes the line to a peer.
func (p *peer) start(tb testing.TB, blocks *memory) {
	if p.blocks != nil {
		blocks = p.blocks
	}
	s := startServer(tb, blocks)
	up, down := link.Symmetric(p.roundTrip, p.rate)
	down.StallAfter, down.CutAfter, down.Loss = p.down.StallAfter, p.down.CutAfter, p.down.Loss
	l, err := link.New("tcp", "", s.address, up, down)
	if err != nil {
		tb.Fatal(err)
	}
	p.link, p.source = l, open(tb, l.Addr(), coap.Options{})
	tb.Cleanup(func() {
		p.source.Close()
		l.Close()
	})
}

// run is one content that is read through a pool.
type run struct {
	took, opened time.Duration
	steady       float64 // bytes per second, after the first fifth
	stats        []pool.SourceStats
	window       eris.Window
}

// read reads the whole content from peers and checks its length; that its bytes are right is what references are for.
func read(tb testing.TB, state *sourcestate.State, c eris.ReadCapability, length int64, peers []*peer, options pool.Options) run {
	var sources []fetch.Source
	for _, p := range peers {
		sources = append(sources, p.source)
	}
	options.State = state
	p := pool.New(sources, options)
	defer func() {
		if err := p.Close(); err != nil {
			tb.Error(err)
		}
	}()
	r := run{window: p.Window()}
	begin := time.Now()
	content, err := eris.Open(context.Background(), p, c, length, r.window)
	if err != nil {
		tb.Fatal(err)
	}
	r.opened = time.Since(begin)
	m := &meter{from: length / 5}
	n, err := content.WriteTo(context.Background(), m)
	if err != nil || n != length {
		tb.Fatalf("read %d bytes of %d: %v", n, length, err)
	}
	r.took = time.Since(begin)
	r.steady = float64(length-m.counted) / time.Since(m.since).Seconds()
	r.stats = p.Stats()
	return r
}

// meter notes when the given number of bytes has come.
type meter struct {
	from, total, counted int64
	since                time.Time
}

func (m *meter) Write(b []byte) (int, error) {
	m.total += int64(len(b))
	if m.since.IsZero() && m.total >= m.from {
		m.since, m.counted = time.Now(), m.total
	}
	return len(b), nil
}

func (r run) String() string {
	s := fmt.Sprintf("%v, opened %v, window %d/%d MiB", r.took.Round(time.Millisecond), r.opened.Round(time.Millisecond), r.window.Requests, r.window.Bytes>>20)
	for _, m := range r.stats {
		s += fmt.Sprintf("\n  %s: %d requests, %.1f MB, %d duplicates, %d misses, %d faults, %d failures, %v, %.1f MB/s, window %d KiB, %v",
			m.URL, m.Requests, float64(m.Bytes)/1e6, m.Duplicates, m.Misses, m.Faults, m.Failures, m.RoundTrip.Round(time.Millisecond), m.Rate/1e6, m.Window>>10, m.Err)
	}
	return s
}

// TestFaultyLines reads over lines that break or fall silent on the way, with real connections.
func TestFaultyLines(t *testing.T) {
	const length = 6e6
	blocks, c := encode(t, eris.BlockSize32KiB, length)
	good := func() *peer { return &peer{roundTrip: 4 * time.Millisecond, rate: 20e6} }
	faulty := func(down link.Direction) *peer {
		p := good()
		p.down = down
		return p
	}
	for _, v := range []struct {
		name  string
		peers []*peer
	}{
		{"cut", []*peer{faulty(link.Direction{CutAfter: 1e6})}},
		{"one is cut", []*peer{faulty(link.Direction{CutAfter: 1e6}), good()}},
		{"both are cut", []*peer{faulty(link.Direction{CutAfter: 1e6}), faulty(link.Direction{CutAfter: 2e6})}},
		{"one stalls", []*peer{faulty(link.Direction{StallAfter: 1e6}), good()}},
		{"loss", []*peer{faulty(link.Direction{Loss: 0.01}), faulty(link.Direction{Loss: 0.001})}},
	} {
		t.Run(v.name, func(t *testing.T) {
			for _, p := range v.peers {
				p.start(t, blocks)
			}
			t.Log(read(t, sourcestate.Open(""), c, length, v.peers, pool.Options{}))
		})
	}
}

// BenchmarkLine reads from one source over lines of several lengths, and reports which part of the rate of the line was
// reached: from the first request to the last byte by a process that knows nothing (cold), and by a later one (warm); the same as
// a part of what is possible; and after the first fifth, when the round trips are over that it takes to find out what to ask for
// (steady).
func BenchmarkLine(b *testing.B) {
	for _, v := range []struct {
		size   eris.BlockSize
		rate   int64 // bytes per second
		length int64
	}{
		{eris.BlockSize32KiB, 25e6, 100e6}, {eris.BlockSize1KiB, 25e6, 50e6}, {eris.BlockSize32KiB, 125e6, 500e6}, {eris.BlockSize1KiB, 125e6, 500e6},
	} {
		var blocks *memory
		var c eris.ReadCapability
		for _, roundTrip := range []int{1, 20, 100, 300} {
			b.Run(fmt.Sprintf("%v/%dMbit/%dms", v.size, v.rate/125e3, roundTrip), func(b *testing.B) {
				if blocks == nil {
					blocks, c = encode(b, v.size, v.length)
				}
				peers := []*peer{{roundTrip: time.Duration(roundTrip) * time.Millisecond, rate: v.rate}}
				peers[0].start(b, blocks)
				rate := float64(v.rate)
				for b.Loop() {
					state := sourcestate.Open("")
					for _, name := range []string{"cold", "warm"} {
						r := read(b, state, c, v.length, peers, pool.Options{})
						b.ReportMetric(float64(v.length)/rate/r.took.Seconds(), name)
						b.ReportMetric(r.ofPossible(v.length, rate, c, roundTrip), name+"possible")
						if name == "warm" {
							b.ReportMetric(r.steady/rate, "steady")
						}
						b.Log(name, r)
					}
				}
			})
		}
	}
}

// ofPossible returns which part of what is possible over a line was reached, in a transfer of the given length at a rate in
// bytes per second and a round-trip time in milliseconds: nobody can know what to ask for before one round trip for each level of the
// tree is over.
func (r run) ofPossible(length int64, rate float64, c eris.ReadCapability, roundTrip int) float64 {
	levels := time.Duration(c.Level+1) * time.Duration(roundTrip) * time.Millisecond
	return (possible(length, rate) + levels).Seconds() / r.took.Seconds()
}

// possible returns how long lines of the given rates, in bytes per second, take for so many bytes.
func possible(length int64, rates ...float64) time.Duration {
	sum := 0.0
	for _, r := range rates {
		sum += r
	}
	return time.Duration(float64(length) / sum * float64(time.Second))
}

// BenchmarkTwo reads from two sources of unequal speed, and reports which part of the sum was reached.
func BenchmarkTwo(b *testing.B) {
	const length = 100e6
	blocks, c := encode(b, eris.BlockSize32KiB, length)
	for _, v := range []struct {
		name   string
		first  peer
		second peer
	}{
		{"20+5", peer{roundTrip: 20 * time.Millisecond, rate: 20e6}, peer{roundTrip: 20 * time.Millisecond, rate: 5e6}},
		{"5+20", peer{roundTrip: 20 * time.Millisecond, rate: 5e6}, peer{roundTrip: 20 * time.Millisecond, rate: 20e6}},
		{"near20+far5", peer{roundTrip: 10 * time.Millisecond, rate: 20e6}, peer{roundTrip: 100 * time.Millisecond, rate: 5e6}},
		{"near5+far20", peer{roundTrip: 10 * time.Millisecond, rate: 5e6}, peer{roundTrip: 100 * time.Millisecond, rate: 20e6}},
	} {
		b.Run(v.name, func(b *testing.B) {
			peers := []*peer{&v.first, &v.second}
			for _, p := range peers {
				p.start(b, blocks)
			}
			for b.Loop() {
				state := sourcestate.Open("")
				for _, name := range []string{"cold", "warm"} {
					r := read(b, state, c, length, peers, pool.Options{})
					b.ReportMetric(possible(length, float64(v.first.rate), float64(v.second.rate)).Seconds()/r.took.Seconds(), name)
					b.ReportMetric(r.steady/float64(v.first.rate+v.second.rate), name+"steady")
					b.Log(name, r)
				}
			}
		})
	}
}

// BenchmarkStall has one of two sources stall at half of what it delivers, and reports how much longer it takes than the lines
// would need at best.
func BenchmarkStall(b *testing.B) {
	const length, rate = 100e6, 12.5e6
	blocks, c := encode(b, eris.BlockSize32KiB, length)
	for b.Loop() {
		peers := []*peer{{roundTrip: 20 * time.Millisecond, rate: rate}, {roundTrip: 20 * time.Millisecond, rate: rate}}
		peers[1].down.StallAfter = length / 4
		for _, p := range peers {
			p.start(b, blocks)
		}
		r := read(b, sourcestate.Open(""), c, length, peers, pool.Options{})
		best := possible(length/2, rate, rate) + possible(length/2, rate)
		b.ReportMetric(r.took.Seconds()/best.Seconds(), "ofbest")
		b.Log(r)
	}
}

// BenchmarkLiar has one of two sources give wrong bytes, and reports how much longer it takes than without it.
func BenchmarkLiar(b *testing.B) {
	const length, rate = 50e6, 25e6
	blocks, c := encode(b, eris.BlockSize32KiB, length)
	bad, _ := encode(b, eris.BlockSize32KiB, length)
	bad.spoil.Store(true)
	for b.Loop() {
		good := &peer{roundTrip: 20 * time.Millisecond, rate: rate}
		good.start(b, blocks)
		liar := &peer{roundTrip: 5 * time.Millisecond, rate: rate, blocks: bad}
		liar.start(b, blocks)
		alone := read(b, sourcestate.Open(""), c, length, []*peer{good}, pool.Options{})
		both := read(b, sourcestate.Open(""), c, length, []*peer{liar, good}, pool.Options{})
		b.ReportMetric(both.took.Seconds()/alone.took.Seconds(), "ofalone")
		b.Log(both)
	}
}
