// SPDX-License-Identifier: GPL-3.0-or-later

// Package peers measures how blocks are found among many stores, each of which has a part of them.
package peers

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/bench/lines/link"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/content"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
)

const roundTrip = 50 * time.Millisecond

// foreign hides that a store can say what it has.
type foreign struct{ fetch.Source }

// network is some stores at the other ends of lines.
type network struct {
	stores    []*sourcetest.Backend
	addresses []string
}

// newNetwork starts n stores, which know what they have, or not.
func newNetwork(t *testing.T, n int, knowing bool) *network {
	w := &network{}
	for range n {
		backend := sourcetest.NewBackend()
		source := backend.Open(256)
		served := fetch.Source(source)
		if !knowing {
			served = foreign{source}
		}
		server := coapserver.New(coapserver.Config{Source: served, MaxGets: 256})
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		var group sync.WaitGroup
		group.Go(func() { server.Serve(listener, coapserver.Access{Get: true}) })
		up, down := link.Symmetric(roundTrip, 0)
		line, err := link.New("tcp", "", listener.Addr().String(), up, down)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			line.Close()
			server.Close()
			group.Wait()
			source.Close()
		})
		w.stores = append(w.stores, backend)
		w.addresses = append(w.addresses, line.Addr())
	}
	return w
}

// add encodes contents; each block goes to the stores that the function names.
func (w *network) add(t *testing.T, length int, size eris.BlockSize, seed byte, where func() []int) content.Want {
	var mu sync.Mutex
	sink := func(_ context.Context, ref eris.Reference, block []byte) error {
		mu.Lock()
		defer mu.Unlock()
		for _, i := range where() {
			w.stores[i].Set(ref, append([]byte(nil), block...))
		}
		return nil
	}
	random := rand.NewChaCha8([32]byte{seed, 77})
	c, err := eris.Encode(t.Context(), io.LimitReader(random, int64(length)), sink, eris.EncodeOptions{BlockSize: size})
	if err != nil {
		t.Fatal(err)
	}
	return content.Want{Capability: c, Limit: 1 << 40}
}

// result is what reading has taken.
type result struct {
	took             time.Duration
	blocks           int64
	requests, misses int64
}

func (r result) perBlock() float64 { return float64(r.requests) / float64(r.blocks) }

func (r result) String() string {
	return fmt.Sprintf("%v, %d blocks, %.2f requests per block, %d misses", r.took.Round(time.Millisecond), r.blocks, r.perBlock(), r.misses)
}

// open makes sources of all stores.
func (w *network) open(t *testing.T) (sources []fetch.Source) {
	for _, address := range w.addresses {
		s, err := coap.Open("coap+tcp://"+address, coap.Options{})
		if err != nil {
			t.Fatal(err)
		}
		sources = append(sources, s)
	}
	return sources
}

// read reads contents in their order by a pool that knows nothing of its sources.
func (w *network) read(t *testing.T, wants ...content.Want) (r result) {
	var members []pool.Member
	for _, s := range w.open(t) {
		members = append(members, pool.Member{Source: s})
	}
	p := pool.New(members, pool.Options{})
	r.took = read(t, p, p.Window(), wants)
	for _, m := range p.Stats() {
		r.requests += m.Requests
		r.misses += m.Misses
		r.blocks += m.Bytes
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	r.blocks /= int64(wants[0].Capability.BlockSize)
	return r
}

func read(t *testing.T, source fetch.Source, window fetch.Window, wants []content.Want) time.Duration {
	begin := time.Now()
	s := content.NewSequence(t.Context(), source, slices.Values(wants), 1<<50, window)
	defer s.Close()
	for range wants {
		if _, err := s.Next(); err != nil {
			t.Fatal(err)
		}
		for {
			leaf, err := s.Leaf()
			if err == io.EOF {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			leaf.Release()
		}
	}
	return time.Since(begin)
}

// oracle asks for each block who has it.
type oracle struct {
	fetch.Source // any
	owners       map[eris.Reference]fetch.Source
}

func (o oracle) Start(r *fetch.Request) { o.owners[r.Pair.Reference].Start(r) }

// direct returns how long it takes to ask the owner of each block.
func (w *network) direct(t *testing.T, wants []content.Want) time.Duration {
	o := oracle{owners: map[eris.Reference]fetch.Source{}}
	for i, s := range w.open(t) {
		defer s.Close()
		for ref := range w.stores[i].All() {
			o.owners[ref] = s
		}
	}
	return read(t, o, fetch.Window{Requests: 16384, Bytes: 24 << 20}, wants)
}

// random names one of n stores, by the same sequence in each run.
func random(n int) func() []int {
	r := rand.New(rand.NewPCG(1, uint64(n)))
	return func() []int { return []int{r.IntN(n)} }
}

func always(i int) func() []int { return func() []int { return []int{i} } }

// files encodes 200 files of ten blocks, each of which one of n stores has.
func (w *network) files(t *testing.T, n int) (wants []content.Want) {
	for i := range 200 {
		wants = append(wants, w.add(t, 300<<10, eris.BlockSize32KiB, byte(i), always(i*5%n)))
	}
	return wants
}

// limit is what reading may take.
type limit struct {
	perBlock float64
	misses   int64
	took     time.Duration // or more, on a busy machine:
	times    time.Duration // what it takes at the same time to ask the owner of each block
}

// check reads, each time by a pool that knows nothing, until it takes no more than it may, five
// times at most: on a busy machine who answers late is taken for one that may not have it.
func (l limit) check(t *testing.T, name string, w *network, wants ...content.Want) {
	t.Helper()
	for range 5 {
		most := max(l.took, l.times*w.direct(t, wants))
		r := w.read(t, wants...)
		t.Logf("%s: %v, of at most %v", name, r, most)
		if r.took <= most && r.perBlock() <= l.perBlock && r.misses <= l.misses {
			return
		}
	}
	t.Errorf("%s: it never takes at most %.2f requests per block, %d misses, and the time", name, l.perBlock, l.misses)
}

const any, anyTime = 1 << 40, time.Hour

// TestPeers reads what is spread over stores that know what they have.
func TestPeers(t *testing.T) {
	for _, n := range []int{1, 3, 8, 20} {
		w := newNetwork(t, n, true)
		want := w.add(t, 64<<20, eris.BlockSize32KiB, 1, random(n))
		// Who asks the owners takes all at once that it can, which is not what a pool may do to stores.
		limit{1.6, 300, 1500 * time.Millisecond, 4}.check(t, fmt.Sprint("64 MiB at ", n), w, want)
	}
	w := newNetwork(t, 20, true)
	limit{1.6, 300, 2 * time.Second, 4}.check(t, "4 MiB in 1 KiB at 20", w, w.add(t, 4<<20, eris.BlockSize1KiB, 2, random(20)))
	w = newNetwork(t, 20, true)
	limit{any, 25, 600 * time.Millisecond, 4}.check(t, "12 blocks at one of 20", w, w.add(t, 11<<15, eris.BlockSize32KiB, 3, always(13)))
	w = newNetwork(t, 8, true)
	limit{1.5, 300, 2 * time.Second, 4}.check(t, "200 files at 8", w, w.files(t, 8)...)
}

// TestForeign does the same with stores that cannot say what they have. The limits are what it took
// before anybody could; for whole files that are spread it is less.
func TestForeign(t *testing.T) {
	for n, most := range map[int]float64{1: 1, 3: 2.1, 8: 4.7, 20: 10.9} {
		w := newNetwork(t, n, false)
		limit{most, any, anyTime, 0}.check(t, fmt.Sprint("64 MiB at ", n), w, w.add(t, 64<<20, eris.BlockSize32KiB, 1, random(n)))
	}
	w := newNetwork(t, 20, false)
	limit{any, 30, 950 * time.Millisecond, 6}.check(t, "12 blocks at one of 20", w, w.add(t, 11<<15, eris.BlockSize32KiB, 3, always(13)))
	w = newNetwork(t, 8, false)
	limit{1.6, any, anyTime, 0}.check(t, "200 files at 8", w, w.files(t, 8)...)
}
