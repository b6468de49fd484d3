// SPDX-License-Identifier: GPL-3.0-or-later

package content

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// mixedLengths is a little of everything, as in a tree of files.
func mixedLengths() []int {
	random := rand.New(rand.NewPCG(1, 2))
	lengths := []int{0, 1, 1023, 1024, 16383, 16384, 32767, 32768, 3 << 20, 0, 0, 5}
	for range 300 {
		lengths = append(lengths, random.IntN(1<<(4+random.IntN(15))))
	}
	return append(lengths, 100000, 0)
}

func TestSequence(t *testing.T) { bothWays(t, testSequence) }

func testSequence(t *testing.T, open openFunc) {
	small := newLibrary(t, eris.BlockSize1KiB, 0, 5, 1024, 20000, 70000, 300000, 3, 1, 40000, 1000000, 16384, 16384, 32768, 300000, 16384, 1023)
	mixed := newLibrary(t, 0, mixedLengths()...)
	for name, l := range map[string]*library{"small": small, "mixed": mixed} {
		for _, window := range []fetch.Window{{}, {Bytes: 1}, {Requests: 1, Bytes: 1}, {Requests: 7, Bytes: 100 << 10}, {Requests: 1000, Bytes: 1 << 30}} {
			t.Run(fmt.Sprintf("%s/%+v", name, window), func(t *testing.T) {
				l.check(t, open(t, l.Get), window)
			})
		}
	}
	large := newLibrary(t, 0, 100, 16<<20, 100) // level 2
	large.check(t, open(t, large.Get), fetch.Window{})
	if err := readSequence(t.Context(), open(t, small.Get), nil, 0, fetch.Window{}, nil); err != nil {
		t.Errorf("no contents: %v", err)
	}
}

// In virtual time, in which computing takes none, a full window of requests makes reading take
// (blocks / requests) round trips. Anything above that is a pipe that ran dry: at the boundary of a
// node, of a content, or at the start.
func TestPipeStaysFull(t *testing.T) {
	lengths := func(n, each int) []int { return slices.Repeat([]int{each}, n) }
	for _, test := range []struct {
		name     string
		size     eris.BlockSize
		lengths  []int
		requests int
		extra    float64 // round trips allowed above the ideal
	}{
		// A level costs a round trip at the start, and the ends of windows are not exactly full.
		{"one content of level 4", eris.BlockSize1KiB, []int{5_000_000}, 64, 12},
		{"one content of level 4, wide window", eris.BlockSize1KiB, []int{5_000_000}, 512, 16},
		{"one content of level 2, large blocks", eris.BlockSize32KiB, []int{20 << 20}, 16, 6},
		{"many of one block", eris.BlockSize1KiB, lengths(5000, 100), 64, 4},
		{"many of one block, wide window", eris.BlockSize1KiB, lengths(5000, 100), 2000, 1},
		{"many of ten blocks", eris.BlockSize1KiB, lengths(1000, 10_000), 64, 8},
		{"many of level 2", eris.BlockSize1KiB, lengths(100, 100_000), 64, 16},
		{"many of some large blocks", 0, lengths(50, 300_000), 16, 8},
		{"long ones between short ones", 0, slices.Concat(lengths(200, 50), []int{17 << 20}, lengths(200, 50), []int{3 << 20}, lengths(10, 20000)), 16, 12},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := newLibrary(t, test.size, test.lengths...)
			synctest.Test(t, func(t *testing.T) {
				const delay = time.Second
				var now, most, calls atomic.Int64
				source := open(t, func(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
					calls.Add(1)
					most.Store(max(most.Load(), now.Add(1)))
					defer now.Add(-1)
					time.Sleep(delay)
					return l.Get(ctx, ref, size, dst)
				})
				start := time.Now()
				must(t, readSequence(t.Context(), source, l.wants, 1<<40, fetch.Window{Requests: test.requests, Bytes: 64 << 20}, nil))
				took := time.Since(start).Seconds() / delay.Seconds()
				ideal := float64(calls.Load()) / float64(test.requests)
				t.Logf("%.1f round trips for %d blocks, ideal %.1f", took, calls.Load(), ideal)
				if took > ideal+test.extra {
					t.Errorf("%.1f round trips, which is %.1f above the ideal", took, took-ideal)
				}
				if most.Load() > int64(test.requests) {
					t.Errorf("%d requests at a time", most.Load())
				}
			})
		})
	}
}

// watcher counts the requests of a reader, and the different pieces of memory that it offers.
type watcher struct {
	fetch.Source
	t        testing.TB
	mu       sync.Mutex
	requests int
	pieces   map[*byte]int
}

func watch(t testing.TB, source fetch.Source) *watcher {
	return &watcher{Source: source, t: t, pieces: make(map[*byte]int)}
}

func (w *watcher) Start(r *fetch.Request) {
	if len(r.Dst) != 0 || cap(r.Dst) < int(r.Size) {
		w.t.Errorf("dst has length %d and capacity %d", len(r.Dst), cap(r.Dst))
	}
	w.mu.Lock()
	w.requests++
	w.pieces[unsafe.SliceData(r.Dst)] = int(r.Size)
	w.mu.Unlock()
	w.Source.Start(r)
}

// used returns the number of requests and of bytes so far.
func (w *watcher) used() (requests, bytes int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range w.pieces {
		bytes += n
	}
	return w.requests, bytes
}

// As long as nobody waits, a quarter of the window is used, and all of it as soon as somebody does:
// in virtual time, the rest takes a quarter of the time.
func TestWindowWaited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const roundTrip = 100 * time.Millisecond
		l := newLibrary(t, eris.BlockSize1KiB, 400<<10, 400<<10)
		var waited atomic.Bool
		var inFlight, most atomic.Int64
		get := distant(verified(l.Get), roundTrip)
		source := open(t, func(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
			n := inFlight.Add(1)
			defer inFlight.Add(-1)
			if !waited.Load() {
				most.Store(max(most.Load(), n))
			}
			return get(ctx, ref, size, dst)
		})
		window := fetch.Window{Requests: 80, Bytes: 64 << 20, Waited: waited.Load}
		begin := time.Now()
		var took []time.Duration
		must(t, readSequence(t.Context(), source, l.wants, 1<<40, window, func([]byte) {
			took = append(took, time.Since(begin))
			begin = time.Now()
			waited.Store(true)
		}))
		if most.Load() > 80/4 {
			t.Errorf("%d requests are in flight that nobody waits for", most.Load())
		}
		if took[1]*3 > took[0] {
			t.Errorf("the contents took %v while nobody waited, and %v then", took[0], took[1])
		}
	})
}

// However long the content, a window bounds the memory.
func TestWindowBoundsMemory(t *testing.T) {
	for _, size := range bothSizes {
		f := newForge(size)
		inner, path := f.full(1)[0], f.last()
		level := map[eris.BlockSize]int{eris.BlockSize1KiB: 4, eris.BlockSize32KiB: 2}[size]
		for l := 1; l < level; l++ {
			inner, path = f.node(l, repeat(inner, size.Arity())...), f.node(l, append(repeat(inner, size.Arity()-1), path)...)
		}
		many := newLibrary(t, 0, slices.Repeat([]int{100, 20000, 70000}, 300)...)
		one := f.capability(level, f.node(level, append(repeat(inner, 2), path)...)) // 12 MiB, or 48 MiB
		for name, test := range map[string]struct {
			get    getFunc
			wants  []Want
			levels int
		}{
			"one long content": {f.Get, []Want{{Capability: one, Limit: 1 << 40}}, level},
			"many contents":    {many.Get, many.wants, 1},
		} {
			for _, window := range []fetch.Window{{Requests: 64, Bytes: 2 << 20}, {Requests: 256, Bytes: 512 << 10}} {
				w := watch(t, open(t, test.get))
				must(t, readSequence(t.Context(), w, test.wants, 1<<40, window, nil))
				_, used := w.used()
				// Nodes ahead: see Window. Memory of either block size is kept for blocks of this
				// size.
				most := int(window.Bytes)
				for l := 1; l <= test.levels; l++ {
					most += (l*window.Requests/size.Arity() + 3) * int(size)
				}
				if name == "many contents" {
					most += int(window.Bytes)
				}
				if used > most {
					t.Errorf("%v, %s, %+v: %d bytes of memory, expected at most %d", size, name, window, used, most)
				}
			}
		}
	}
}

// A reader that stops taking leaves stops the requests, too, within the window, and gives new room
// when leaves are released by whomever.
func TestWindowWithoutReader(t *testing.T) {
	for name, lengths := range map[string][]int{
		"one content":       {3_000_000},
		"of one block":      slices.Repeat([]int{100}, 3000),
		"of several blocks": slices.Repeat([]int{10_000}, 300),
	} {
		l := newLibrary(t, eris.BlockSize1KiB, lengths...)
		synctest.Test(t, func(t *testing.T) {
			window := fetch.Window{Requests: 64, Bytes: 400 << 10}
			w := watch(t, open(t, l.Get))
			s := NewSequence(t.Context(), w, slices.Values(l.wants), 1<<40, window)
			defer s.Close()
			var leaves []*Leaf
			for len(leaves) < 40 {
				leaf, err := s.Leaf()
				if err == io.EOF {
					if _, err = s.Next(); err == nil {
						continue
					}
				}
				must(t, err)
				leaves = append(leaves, leaf)
			}
			synctest.Wait()
			before, used := w.used()
			if most := int(window.Bytes) + 30*1024; used > most || used < int(window.Bytes)/3 {
				t.Errorf("%s: %d bytes of memory, expected about %d", name, used, most)
			}
			for _, leaf := range leaves {
				leaf.Release()
			}
			synctest.Wait()
			if after, _ := w.used(); after == before {
				t.Errorf("%s: releasing leaves did not let requests go on", name)
			}
		})
	}
}

// While a reader waits for one late leaf, the contents behind it are fetched as far as the window
// allows, and that is further than the iterator was advanced when the waiting began.
func TestFetchesBehindLateLeaf(t *testing.T) {
	l := newLibrary(t, eris.BlockSize1KiB, append([]int{2000}, slices.Repeat([]int{100}, 3000)...)...)
	var late eris.Reference // of the first leaf, which a shorter content has, too
	_, shorter := mustEncode(t, l.contents[0][:1024], eris.EncodeOptions{})
	for ref := range shorter.All() {
		if l.Has(ref) {
			late = ref
		}
	}
	synctest.Test(t, func(t *testing.T) {
		answer := make(chan struct{})
		w := watch(t, open(t, func(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
			if ref == late {
				<-answer
			}
			return l.Get(ctx, ref, size, dst)
		}))
		var reading sync.WaitGroup
		reading.Go(func() { l.check(t, w, fetch.Window{Requests: 64}) })
		synctest.Wait()
		if n, _ := w.used(); n != 3003 {
			t.Errorf("%d blocks were requested, there are 3003", n)
		}
		close(answer)
		reading.Wait()
	})
}

func TestSequenceErrors(t *testing.T) { bothWays(t, testSequenceErrors) }

func testSequenceErrors(t *testing.T, open openFunc) {
	l := newLibrary(t, eris.BlockSize1KiB, 100, 20000, 100_000, 5000, 0, 3000)
	failure := errors.New("line is down")
	for ref := range l.All() {
		for name, answer := range map[string]func(block []byte) ([]byte, error){
			"missing":      func([]byte) ([]byte, error) { return nil, fmt.Errorf("gone: %w", eris.ErrNotFound) },
			"other":        func([]byte) ([]byte, error) { return nil, failure },
			"block: none":  func([]byte) ([]byte, error) { return nil, nil },
			"block: short": func(b []byte) ([]byte, error) { return b[:1023], nil },
			"block: long":  func(b []byte) ([]byte, error) { return append(bytes.Clone(b), 0), nil },
			"block: large": func([]byte) ([]byte, error) { return make([]byte, eris.BlockSize32KiB), nil },
		} {
			source := getFunc(func(ctx context.Context, r eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
				block, err := l.Get(ctx, r, size, dst)
				if r == ref && err == nil {
					return answer(block)
				}
				return block, err
			})
			n := 0
			err := readSequence(t.Context(), open(t, source), l.wants, 1<<40, fetch.Window{Requests: 3}, func(content []byte) {
				if !bytes.Equal(content, l.contents[n]) {
					t.Errorf("content %d is wrong", n)
				}
				n++
			})
			kind, _, _ := strings.Cut(name, ":")
			if errorKind(err) != kind || name == "other" && !errors.Is(err, failure) {
				t.Errorf("%s: error %v", name, err)
			}
			var blockError *eris.BlockError
			if errors.As(err, &blockError) && blockError.Reference != ref {
				t.Errorf("%s: error about %v instead of %v", name, blockError.Reference, ref)
			}
			if err != nil && !strings.Contains(err.Error(), ref.String()) {
				t.Errorf("%s: error %q does not name the block", name, err)
			}
		}
	}
}

func TestSequenceLimits(t *testing.T) { bothWays(t, testSequenceLimits) }

func testSequenceLimits(t *testing.T, open openFunc) {
	l := newLibrary(t, 0, 100, 20000, 100, 40000)
	for _, total := range []int64{0, 99, 100, 20099, 20100, 20199, 20200, 60199} {
		if err := readSequence(t.Context(), open(t, l.Get), l.wants, total, fetch.Window{}, nil); !errors.Is(err, ErrTooLarge) || errorKind(err) != "content" {
			t.Errorf("total of %d: error %v", total, err)
		}
	}
	if err := readSequence(t.Context(), open(t, l.Get), l.wants, 60200, fetch.Window{}, nil); err != nil {
		t.Errorf("just enough: %v", err)
	}
	for i := range l.wants {
		wants := slices.Clone(l.wants)
		wants[i].Limit--
		if err := readSequence(t.Context(), open(t, l.Get), wants, 1<<40, fetch.Window{}, nil); !errors.Is(err, ErrTooLarge) {
			t.Errorf("content %d is one byte too long: error %v", i, err)
		}
		wants[i].Limit = -1
		if err := readSequence(t.Context(), open(t, l.Get), wants, 1<<40, fetch.Window{}, nil); !errors.Is(err, ErrTooLarge) {
			t.Errorf("content %d has a negative limit: error %v", i, err)
		}
		wants[i] = Want{}
		if err := readSequence(t.Context(), open(t, l.Get), wants, 1<<40, fetch.Window{}, nil); errorKind(err) != "content" {
			t.Errorf("content %d has no capability: error %v", i, err)
		}
	}
}

// The length of a content is there before its leaves are, and what is not wanted can be passed
// over.
func TestSequenceSizesFirst(t *testing.T) {
	l := newLibrary(t, eris.BlockSize1KiB, 100_000, 5, 200_000)
	synctest.Test(t, func(t *testing.T) {
		hold := make(chan struct{})
		paths := make(map[eris.Reference]bool)
		for _, want := range l.wants {
			c := want.Capability
			pair := eris.Pair{Reference: c.Root, Key: c.Key}
			for level := c.Level; level > 0; level-- {
				paths[pair.Reference] = true
				plaintext := make([]byte, c.BlockSize)
				eris.Decrypt(plaintext, l.All()[pair.Reference], pair.Key, level)
				node, err := eris.ParseNode(plaintext)
				must(t, err)
				pair = node.Pair(node.Len() - 1)
			}
			paths[pair.Reference] = true
		}
		source := getFunc(func(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
			if !paths[ref] {
				<-hold
			}
			return l.Get(ctx, ref, size, dst)
		})
		s := NewSequence(t.Context(), open(t, source), slices.Values(l.wants), 1<<40, fetch.Window{})
		defer s.Close()
		if _, err := s.Leaf(); err != io.EOF {
			t.Errorf("Leaf before Next: %v", err)
		}
		if size, err := s.Next(); err != nil || size != 100_000 {
			t.Fatal(size, err)
		}
		close(hold)
		leaf, err := s.Leaf()
		if err != nil || !bytes.Equal(leaf.Bytes, l.contents[0][:1024]) {
			t.Fatal(err)
		}
		leaf.Retain()
		leaf.Release()
		leaf.Release()
		for i := 1; i < 3; i++ {
			if size, err := s.Next(); err != nil || size != int64(len(l.contents[i])) {
				t.Fatal(size, err)
			}
		}
		if leaf, err := s.Leaf(); err != nil || !bytes.Equal(leaf.Bytes, l.contents[2][:1024]) {
			t.Fatal(err)
		}
		for range 2 {
			if _, err := s.Next(); err != io.EOF {
				t.Errorf("at the end: %v", err)
			}
			if _, err := s.Leaf(); err != io.EOF {
				t.Errorf("at the end: %v", err)
			}
		}
	})
}

// silent is a source that responds to the first requests only. Further ones are done when they are
// cancelled.
type silent struct {
	get     getFunc
	most    int // responses
	failing int // which request fails at once; 0 for none

	mu        sync.Mutex
	requests  int
	waiting   map[*fetch.Request]bool
	cancelled int
}

func (s *silent) Start(r *fetch.Request) {
	s.mu.Lock()
	s.requests++
	n := s.requests
	if n > s.most && n != s.failing {
		s.waiting[r] = true
		s.mu.Unlock()
		if n == s.failing+1 {
			time.Sleep(time.Nanosecond) // until the failure is known
		}
		return
	}
	s.mu.Unlock()
	if r.Block, r.Err = s.get(context.Background(), r.Pair.Reference, r.Size, r.Dst); n == s.failing {
		r.Err = eris.ErrNotFound
	}
	r.Done(r)
}

func (s *silent) Cancel(r *fetch.Request) { s.end(r, context.Canceled) }
func (s *silent) String() string          { return "silent:" }
func (s *silent) Close() error            { return nil }

// end ends a request, if it has not ended.
func (s *silent) end(r *fetch.Request, err error) {
	s.mu.Lock()
	waiting := s.waiting[r]
	delete(s.waiting, r)
	if waiting && err == context.Canceled {
		s.cancelled++
	}
	s.mu.Unlock()
	if waiting {
		r.Err = err
		r.Done(r)
	}
}

// endOne has one of the requests that wait fail.
func (s *silent) endOne() {
	s.mu.Lock()
	for r := range s.waiting {
		s.mu.Unlock()
		s.end(r, eris.ErrNotFound)
		return
	}
	s.mu.Unlock()
}

// Whatever ends a sequence, all that is in flight is cancelled, and nothing waits for a silent
// source. A bubble ends only when every goroutine in it has: it would not if anything were left
// behind.
func TestSilentSource(t *testing.T) {
	l := newLibrary(t, eris.BlockSize1KiB, 100, 300_000, 20_000, 100, 300_000)
	gone := errors.New("nobody waits any more")
	for _, test := range []struct {
		name string
		end  func(cancel context.CancelCauseFunc, s *Sequence, source *silent)
		want error
	}{
		{"close", func(_ context.CancelCauseFunc, s *Sequence, _ *silent) { s.fetcher.close() }, errClosed},
		{"context", func(cancel context.CancelCauseFunc, _ *Sequence, _ *silent) { cancel(gone) }, gone},
		{"failure", func(_ context.CancelCauseFunc, _ *Sequence, source *silent) { source.endOne() }, eris.ErrNotFound},
		{"failure while others start", nil, eris.ErrNotFound},
	} {
		cancelled := 0
		for most := 0; most < 700; most = most*3/2 + 1 {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancelCause(t.Context())
				defer cancel(nil)
				source := &silent{get: l.Get, most: most, waiting: make(map[*fetch.Request]bool)}
				if test.end == nil {
					source.failing = most + 1
				}
				s := NewSequence(ctx, source, slices.Values(l.wants), 1<<40, fetch.Window{Requests: 20})
				result := make(chan error, 1)
				go func() {
					for {
						if _, err := s.Next(); err != nil {
							result <- err
							return
						}
					}
				}()
				synctest.Wait()
				begin := time.Now()
				if test.end != nil {
					test.end(cancel, s, source)
				}
				if err := <-result; !errors.Is(err, test.want) {
					t.Errorf("%s after %d responses: error %v", test.name, most, err)
				}
				s.Close()
				s.Close()
				cancelled += source.cancelled
				if took := time.Since(begin); took > 1 || len(source.waiting) != 0 {
					t.Errorf("%s after %d responses: took %v, %d requests were not cancelled", test.name, most, took, len(source.waiting))
				}
				if _, err := s.Next(); err == nil || err == io.EOF {
					t.Errorf("%s after %d responses: closed, but %v", test.name, most, err)
				}
				if test.name == "context" {
					if _, err := readAll(ctx, source, l.wants[1].Capability, 1<<40, fetch.Window{}); err != gone {
						t.Errorf("context has ended: %v", err)
					}
				}
			})
		}
		if cancelled < 20 {
			t.Errorf("%s: %d requests were cancelled in all", test.name, cancelled)
		}
	}
	// One that was never used.
	s := NewSequence(t.Context(), open(t, l.Get), slices.Values(l.wants), 1<<40, fetch.Window{})
	s.Close()
}

// The iterator is not run to its end before there is anything to show, nor beyond the end of the
// sequence.
func TestSequenceIteratorIsLazy(t *testing.T) {
	l := newLibrary(t, 0, 100)
	pulled := 0
	endless := iter.Seq[Want](func(yield func(Want) bool) {
		for {
			pulled++
			if !yield(l.wants[0]) {
				return
			}
		}
	})
	s := NewSequence(t.Context(), open(t, l.Get), endless, math.MaxInt64, fetch.Window{})
	defer s.Close()
	if pulled != 0 {
		t.Error("pulled before it was used")
	}
	for i := range 10_000 {
		if _, err := s.Next(); err != nil {
			t.Fatal(err)
		}
		leaf, err := s.Leaf()
		if err != nil || !bytes.Equal(leaf.Bytes, l.contents[0]) {
			t.Fatal(err)
		}
		leaf.Release()
		// What may be ahead: those that are open or being opened, which the window bounds, and
		// those that wait.
		if ahead := pulled - i; ahead > 2*defaultRequests+defaultBytes/2/1024+3*refillBatch {
			t.Fatalf("%d contents ahead", ahead)
		}
	}
}

// FuzzSequence reads sequences of contents of random shapes through random windows from a source
// that takes random times. Leaves are released at random, elsewhere, or never, and stay as they are
// until then. A bubble in which nothing moves any more is a failure, and so is one that does not
// end.
func FuzzSequence(f *testing.F) {
	for seed := range uint64(60) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		random := rand.New(rand.NewPCG(seed, 3))
		size := []eris.BlockSize{0, eris.BlockSize1KiB, eris.BlockSize1KiB, eris.BlockSize32KiB}[random.IntN(4)]
		lengths := make([]int, random.IntN(40))
		most := 1 << (5 + random.IntN(14))
		for i := range lengths {
			switch random.IntN(4) {
			case 0:
				lengths[i] = 1024 * random.IntN(most/1024+1) // ends in a leaf of padding
			case 1:
				lengths[i] = 16 * 1024 * (1 + random.IntN(most/16384+1)) // and in a node with but one leaf
			default:
				lengths[i] = random.IntN(most)
			}
		}
		l := newLibrary(t, size, lengths...)
		window := fetch.Window{Requests: 1 + random.IntN(1<<random.IntN(9)), Bytes: 1 + random.Int64N(1<<(10+random.IntN(12)))}
		delay := time.Duration(random.IntN(3)) * time.Millisecond
		hold := random.IntN(1 + random.IntN(50))
		skip, never := random.IntN(3) == 0, random.IntN(10) == 0
		synctest.Test(t, func(t *testing.T) {
			source := []openFunc{open, openImmediate}[random.IntN(2)](t, delayed(l.Get, delay))
			s := NewSequence(t.Context(), source, slices.Values(l.wants), 1<<40, window)
			defer s.Close()
			type holding struct {
				*Leaf
				want []byte
			}
			var held []holding
			for i := range l.wants {
				if size, err := s.Next(); err != nil || size != int64(len(l.contents[i])) {
					t.Fatalf("content %d: %d bytes, %v", i, size, err)
				}
				rest := l.contents[i]
				for {
					leaf, err := s.Leaf()
					if err == io.EOF {
						if len(rest) > 0 {
							t.Fatalf("content %d: %d bytes are missing", i, len(rest))
						}
						break
					}
					if err != nil || !bytes.HasPrefix(rest, leaf.Bytes) {
						t.Fatalf("content %d: wrong bytes, or %v", i, err)
					}
					held = append(held, holding{leaf, rest[:len(leaf.Bytes)]})
					rest = rest[len(leaf.Bytes):]
					for len(held) > hold && !never {
						j := random.IntN(len(held))
						if !bytes.Equal(held[j].Bytes, held[j].want) {
							t.Fatal("a leaf that is held has changed")
						}
						go held[j].Release()
						held = slices.Delete(held, j, j+1)
					}
					if random.IntN(10) == 0 {
						time.Sleep(time.Millisecond)
					}
					if skip && random.IntN(20) == 0 {
						break
					}
				}
			}
			if _, err := s.Next(); err != io.EOF {
				t.Fatalf("at the end: %v", err)
			}
		})
	})
}
