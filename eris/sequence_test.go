// SPDX-License-Identifier: GPL-3.0-or-later

package eris

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
)

// library is many contents in one store.
type library struct {
	*memory
	contents [][]byte
	wants    []Want
}

// newLibrary encodes contents of the given lengths, in the recommended block size if size is 0.
func newLibrary(t testing.TB, size BlockSize, lengths ...int) *library {
	l := &library{memory: newMemory()}
	for i, n := range lengths {
		content := randomContent(byte(i), n)
		capability, m := mustEncode(t, content, EncodeOptions{BlockSize: size})
		l.add(m)
		l.contents = append(l.contents, content)
		l.wants = append(l.wants, Want{capability, int64(n)})
	}
	return l
}

// mixedLengths is a little of everything, as in a tree of files.
func mixedLengths() []int {
	random := rand.New(rand.NewPCG(1, 2))
	lengths := []int{0, 1, 1023, 1024, 16383, 16384, 32767, 32768, 3 << 20, 0, 0, 5}
	for range 300 {
		lengths = append(lengths, random.IntN(1<<(4+random.IntN(15))))
	}
	return append(lengths, 100000, 0)
}

// check returns a function for readSequence that compares.
func (l *library) check(t *testing.T) (each func(ContentInfo, []byte), done func()) {
	n := 0
	return func(info ContentInfo, content []byte) {
			if info.Index != n || info.Capability != l.wants[n].Capability || !bytes.Equal(content, l.contents[n]) {
				t.Errorf("content %d: wrong index %d, capability, or bytes", n, info.Index)
			}
			n++
		}, func() {
			if n != len(l.wants) {
				t.Errorf("%d contents instead of %d", n, len(l.wants))
			}
		}
}

func TestSequence(t *testing.T) { allWays(t, testSequence) }

func testSequence(t *testing.T, way way) {
	small := newLibrary(t, BlockSize1KiB, 0, 5, 1024, 20000, 70000, 300000, 3, 1, 40000, 1000000, 16384, 16384, 32768, 300000, 16384, 1023)
	mixed := newLibrary(t, 0, mixedLengths()...)
	for name, l := range map[string]*library{"small": small, "mixed": mixed} {
		for _, window := range []Window{{}, {Bytes: 1}, {Requests: 1, Bytes: 1}, {Requests: 7, Bytes: 100 << 10}, {Requests: 1000, Bytes: 1 << 30}} {
			t.Run(fmt.Sprintf("%s/%+v", name, window), func(t *testing.T) {
				each, done := l.check(t)
				if err := readSequence(t.Context(), way.of(l), l.wants, 1<<40, window, each); err != nil {
					t.Fatal(err)
				}
				done()
			})
		}
	}
	large := newLibrary(t, 0, 100, 16<<20, 100) // level 2
	each, done := large.check(t)
	if err := readSequence(t.Context(), way.of(large), large.wants, 1<<40, Window{}, each); err != nil {
		t.Error(err)
	}
	done()
	if err := readSequence(t.Context(), way.of(small), nil, 0, Window{}, nil); err != nil {
		t.Errorf("no contents: %v", err)
	}
}

// delayed answers after a time that depends on the reference, so that blocks come in any order.
func delayed(blocks Blocks, most time.Duration) Blocks {
	return blocksFunc(func(ctx context.Context, ref Reference, size BlockSize, dst []byte) ([]byte, error) {
		delay := most * time.Duration(ref[0]) / 255
		if delay > 0 {
			select {
			case <-time.After(delay):
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		block, err := blocks.Get(ctx, ref, size, dst)
		return append(dst, block...), err
	})
}

func TestSequenceOutOfOrder(t *testing.T) { allWays(t, testSequenceOutOfOrder) }

func testSequenceOutOfOrder(t *testing.T, way way) {
	l := newLibrary(t, BlockSize1KiB, 0, 5, 1024, 20000, 70000, 300000, 3, 1, 40000, 500000, 16384, 1023)
	for _, window := range []Window{{}, {Requests: 1}, {Requests: 5, Bytes: 1}, {Requests: 50, Bytes: 40 << 10}} {
		synctest.Test(t, func(t *testing.T) {
			each, done := l.check(t)
			if err := readSequence(t.Context(), way.of(delayed(l, 50*time.Millisecond)), l.wants, 1<<40, window, each); err != nil {
				t.Fatal(err)
			}
			done()
		})
	}
}

// roundTrip is a source with a fixed delay, which watches how many requests are in flight.
type roundTrip struct {
	Blocks
	delay     time.Duration
	now, most atomic.Int64
	calls     atomic.Int64
}

func (r *roundTrip) Get(ctx context.Context, ref Reference, size BlockSize, dst []byte) ([]byte, error) {
	r.calls.Add(1)
	r.most.Store(max(r.most.Load(), r.now.Add(1)))
	defer r.now.Add(-1)
	time.Sleep(r.delay)
	return r.Blocks.Get(ctx, ref, size, dst)
}

// In virtual time, in which computing takes none, a full window of requests makes reading take (blocks / requests) round
// trips. Anything above that is a pipe that ran dry: at the boundary of a node, of a content, or at the start.
func TestPipeStaysFull(t *testing.T) { steadyWays(t, testPipeStaysFull) }

func testPipeStaysFull(t *testing.T, way way) {
	lengths := func(n, each int) []int { return slices.Repeat([]int{each}, n) }
	for _, test := range []struct {
		name     string
		size     BlockSize
		lengths  []int
		requests int
		extra    float64 // round trips allowed above the ideal
	}{
		// A level costs a round trip at the start, and the ends of windows are not exactly full.
		{"one content of level 4", BlockSize1KiB, []int{5_000_000}, 64, 12},
		{"one content of level 4, wide window", BlockSize1KiB, []int{5_000_000}, 512, 16},
		{"one content of level 2, large blocks", BlockSize32KiB, []int{20 << 20}, 16, 6},
		{"many of one block", BlockSize1KiB, lengths(5000, 100), 64, 4},
		{"many of one block, wide window", BlockSize1KiB, lengths(5000, 100), 2000, 1},
		{"many of ten blocks", BlockSize1KiB, lengths(1000, 10_000), 64, 8},
		{"many of level 2", BlockSize1KiB, lengths(100, 100_000), 64, 16},
		{"many of some large blocks", 0, lengths(50, 300_000), 16, 8},
		{"long ones between short ones", 0, slices.Concat(lengths(200, 50), []int{17 << 20}, lengths(200, 50), []int{3 << 20}, lengths(10, 20000)), 16, 12},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := newLibrary(t, test.size, test.lengths...)
			synctest.Test(t, func(t *testing.T) {
				const delay = time.Second
				source := &roundTrip{Blocks: l, delay: delay}
				start := time.Now()
				if err := readSequence(t.Context(), way.of(source), l.wants, 1<<40, Window{Requests: test.requests, Bytes: 64 << 20}, nil); err != nil {
					t.Fatal(err)
				}
				took := time.Since(start).Seconds() / delay.Seconds()
				ideal := float64(source.calls.Load()) / float64(test.requests)
				t.Logf("%.1f round trips for %d blocks, ideal %.1f", took, source.calls.Load(), ideal)
				if took > ideal+test.extra {
					t.Errorf("%.1f round trips, which is %.1f above the ideal", took, took-ideal)
				}
				if source.most.Load() > int64(test.requests) {
					t.Errorf("%d requests at a time", source.most.Load())
				}
			})
		})
	}
}

// watcher counts the different pieces of memory that a reader offers.
type watcher struct {
	Blocks
	mu     sync.Mutex
	memory map[*byte]int
}

func (w *watcher) Get(ctx context.Context, ref Reference, size BlockSize, dst []byte) ([]byte, error) {
	if len(dst) != 0 || cap(dst) < int(size) {
		return nil, fmt.Errorf("dst has length %d and capacity %d", len(dst), cap(dst))
	}
	w.mu.Lock()
	w.memory[unsafe.SliceData(dst)] = int(size)
	w.mu.Unlock()
	return w.Blocks.Get(ctx, ref, size, dst)
}

// However long the content, a window bounds the memory.
func TestWindowBoundsMemory(t *testing.T) { steadyWays(t, testWindowBoundsMemory) }

func testWindowBoundsMemory(t *testing.T, way way) {
	for _, size := range bothSizes {
		f := newForge(size)
		inner, path := f.full(1)[0], f.last()
		level := map[BlockSize]int{BlockSize1KiB: 4, BlockSize32KiB: 2}[size]
		for l := 1; l < level; l++ {
			inner, path = f.node(l, repeat(inner, size.Arity())...), f.node(l, append(repeat(inner, size.Arity()-1), path)...)
		}
		many := newLibrary(t, 0, slices.Repeat([]int{100, 20000, 70000}, 300)...)
		one := f.capability(level, f.node(level, append(repeat(inner, 2), path)...)) // 12 MiB, or 48 MiB
		for name, test := range map[string]struct {
			blocks *memory
			wants  []Want
			levels int
		}{
			"one long content": {f.memory, []Want{{one, 1 << 40}}, level},
			"many contents":    {many.memory, many.wants, 1},
		} {
			for _, window := range []Window{{Requests: 64, Bytes: 2 << 20}, {Requests: 256, Bytes: 512 << 10}} {
				w := &watcher{Blocks: test.blocks, memory: make(map[*byte]int)}
				if err := readSequence(t.Context(), way.of(w), test.wants, 1<<40, window, nil); err != nil {
					t.Fatal(err)
				}
				used := 0
				for _, n := range w.memory {
					used += n
				}
				// Nodes ahead: see Window. Memory of either block size is kept for blocks of this size.
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

// A reader that stops taking leaves stops the requests, too, within the window, and gives new room when leaves are released
// by whomever.
func TestWindowWithoutReader(t *testing.T) { steadyWays(t, testWindowWithoutReader) }

func testWindowWithoutReader(t *testing.T, way way) {
	for name, lengths := range map[string][]int{
		"one content":       {3_000_000},
		"of one block":      slices.Repeat([]int{100}, 3000),
		"of several blocks": slices.Repeat([]int{10_000}, 300),
	} {
		l := newLibrary(t, BlockSize1KiB, lengths...)
		synctest.Test(t, func(t *testing.T) {
			window := Window{Requests: 64, Bytes: 400 << 10}
			w := &watcher{Blocks: l, memory: make(map[*byte]int)}
			source := &counting{Blocks: w}
			s := NewSequence(t.Context(), way.of(source), slices.Values(l.wants), 1<<40, window)
			defer s.Close()
			var leaves []Leaf
			for len(leaves) < 40 {
				leaf, err := s.Leaf()
				if err == io.EOF {
					if _, err = s.Next(); err == nil {
						continue
					}
				}
				if err != nil {
					t.Fatal(err)
				}
				leaves = append(leaves, leaf)
			}
			synctest.Wait()
			used := 0
			for _, n := range w.memory {
				used += n
			}
			if most := int(window.Bytes) + 30*1024; used > most || used < int(window.Bytes)/3 {
				t.Errorf("%s: %d bytes of memory, expected about %d", name, used, most)
			}
			before := source.calls.Load()
			for _, leaf := range leaves {
				leaf.Release()
			}
			synctest.Wait()
			if source.calls.Load() == before {
				t.Errorf("%s: releasing leaves did not let requests go on", name)
			}
		})
	}
}

// While a reader waits for one late leaf, the contents behind it are fetched as far as the window allows, and that is further
// than the iterator was advanced when the waiting began.
func TestFetchesBehindLateLeaf(t *testing.T) { steadyWays(t, testFetchesBehindLateLeaf) }

func testFetchesBehindLateLeaf(t *testing.T, way way) {
	l := newLibrary(t, BlockSize1KiB, append([]int{2000}, slices.Repeat([]int{100}, 3000)...)...)
	late := NewEncrypter(ConvergenceSecret{}).EncryptLeaf(make([]byte, 1024), l.contents[0][:1024]).Reference
	synctest.Test(t, func(t *testing.T) {
		answer := make(chan struct{})
		source := &counting{Blocks: blocksFunc(func(ctx context.Context, ref Reference, size BlockSize, dst []byte) ([]byte, error) {
			if ref == late {
				<-answer
			}
			return l.Get(ctx, ref, size, dst)
		})}
		each, done := l.check(t)
		var reading sync.WaitGroup
		reading.Go(func() {
			if err := readSequence(t.Context(), way.of(source), l.wants, 1<<40, Window{Requests: 64}, each); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		if n := source.calls.Load(); n != 3003 {
			t.Errorf("%d blocks were asked for, there are 3003", n)
		}
		close(answer)
		reading.Wait()
		done()
	})
}

func TestSequenceErrors(t *testing.T) { allWays(t, testSequenceErrors) }

func testSequenceErrors(t *testing.T, way way) {
	l := newLibrary(t, BlockSize1KiB, 100, 20000, 100_000, 5000, 0, 3000)
	failure := errors.New("line is down")
	for _, ref := range l.sorted() {
		for name, answer := range map[string]func(block []byte) ([]byte, error){
			"missing":       func([]byte) ([]byte, error) { return nil, fmt.Errorf("gone: %w", ErrNotFound) },
			"other":         func([]byte) ([]byte, error) { return nil, failure },
			"block: bit":    func(b []byte) ([]byte, error) { b = bytes.Clone(b); b[500] ^= 4; return b, nil },
			"block: none":   func([]byte) ([]byte, error) { return nil, nil },
			"block: short":  func(b []byte) ([]byte, error) { return b[:1023], nil },
			"block: long":   func(b []byte) ([]byte, error) { return append(bytes.Clone(b), 0), nil },
			"block: double": func(b []byte) ([]byte, error) { return append(bytes.Clone(b), b...), nil },
			"block: large":  func([]byte) ([]byte, error) { return make([]byte, BlockSize32KiB), nil },
		} {
			source := blocksFunc(func(ctx context.Context, r Reference, size BlockSize, dst []byte) ([]byte, error) {
				block, err := l.Get(ctx, r, size, dst)
				if r == ref && err == nil {
					return answer(block)
				}
				return block, err
			})
			n := 0
			err := readSequence(t.Context(), way.of(source), l.wants, 1<<40, Window{Requests: 3}, func(info ContentInfo, content []byte) {
				if !bytes.Equal(content, l.contents[n]) {
					t.Errorf("content %d is wrong", n)
				}
				n++
			})
			kind, _, _ := bytes.Cut([]byte(name), []byte(":"))
			if errorKind(err) != string(kind) || name == "other" && !errors.Is(err, failure) {
				t.Errorf("%s: error %v", name, err)
			}
			var blockError *BlockError
			if errors.As(err, &blockError) && blockError.Reference != ref {
				t.Errorf("%s: error about %v instead of %v", name, blockError.Reference, ref)
			}
			if err != nil && !bytes.Contains([]byte(err.Error()), []byte(ref.String())) {
				t.Errorf("%s: error %q does not name the block", name, err)
			}
		}
	}
}

func TestSequenceLimits(t *testing.T) { allWays(t, testSequenceLimits) }

func testSequenceLimits(t *testing.T, way way) {
	l := newLibrary(t, 0, 100, 20000, 100, 40000)
	for _, total := range []int64{0, 99, 100, 20099, 20100, 20199, 20200, 60199} {
		if err := readSequence(t.Context(), way.of(l), l.wants, total, Window{}, nil); !errors.Is(err, ErrTooLarge) || errorKind(err) != "content" {
			t.Errorf("total of %d: error %v", total, err)
		}
	}
	if err := readSequence(t.Context(), way.of(l), l.wants, 60200, Window{}, nil); err != nil {
		t.Errorf("just enough: %v", err)
	}
	for i := range l.wants {
		wants := slices.Clone(l.wants)
		wants[i].Limit--
		if err := readSequence(t.Context(), way.of(l), wants, 1<<40, Window{}, nil); !errors.Is(err, ErrTooLarge) {
			t.Errorf("content %d is one byte too long: error %v", i, err)
		}
		wants[i].Limit = -1
		if err := readSequence(t.Context(), way.of(l), wants, 1<<40, Window{}, nil); !errors.Is(err, ErrTooLarge) {
			t.Errorf("content %d has a negative limit: error %v", i, err)
		}
		wants[i] = Want{}
		if err := readSequence(t.Context(), way.of(l), wants, 1<<40, Window{}, nil); errorKind(err) != "content" {
			t.Errorf("content %d has no capability: error %v", i, err)
		}
	}
}

// The length of a content is there before its leaves are, and what is not wanted can be passed over.
func TestSequenceSizesFirst(t *testing.T) { steadyWays(t, testSequenceSizesFirst) }

func testSequenceSizesFirst(t *testing.T, way way) {
	l := newLibrary(t, BlockSize1KiB, 100_000, 5, 200_000)
	synctest.Test(t, func(t *testing.T) {
		hold := make(chan struct{})
		paths := make(map[Reference]bool)
		for i, want := range l.wants {
			c, err := Open(t.Context(), l, want.Capability, want.Limit, Window{})
			if err != nil || c.Size() != int64(len(l.contents[i])) {
				t.Fatal(err)
			}
			paths[want.Capability.Root] = true
			for level := want.Capability.Level; level > 0; level-- {
				node, err := ParseNode(c.path[level])
				if err != nil {
					t.Fatal(err)
				}
				paths[node.Pair(node.Len()-1).Reference] = true
			}
		}
		source := blocksFunc(func(ctx context.Context, ref Reference, size BlockSize, dst []byte) ([]byte, error) {
			if !paths[ref] {
				<-hold
			}
			return l.Get(ctx, ref, size, dst)
		})
		s := NewSequence(t.Context(), way.of(source), slices.Values(l.wants), 1<<40, Window{})
		defer s.Close()
		if _, err := s.Leaf(); err != io.EOF {
			t.Errorf("Leaf before Next: %v", err)
		}
		if info, err := s.Next(); err != nil || info.Size != 100_000 || info.Index != 0 {
			t.Fatalf("%+v, %v", info, err)
		}
		close(hold)
		leaf, err := s.Leaf()
		if err != nil || !bytes.Equal(leaf.Bytes, l.contents[0][:1024]) {
			t.Fatal(err)
		}
		leaf.Release()
		leaf.Release() // does nothing
		for i := 1; i < 3; i++ {
			if info, err := s.Next(); err != nil || info.Index != i || info.Size != int64(len(l.contents[i])) {
				t.Fatalf("%+v, %v", info, err)
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

// Holding every leaf, or releasing them late, in another order and elsewhere, slows a reader down but does not stop it.
func TestSequenceReleases(t *testing.T) { allWays(t, testSequenceReleases) }

func testSequenceReleases(t *testing.T, way way) {
	l := newLibrary(t, BlockSize1KiB, 300_000, 5, 70_000, 3000)
	for _, release := range []string{"never", "elsewhere", "reversed"} {
		for _, window := range []Window{{}, {Requests: 3, Bytes: 1}, {Requests: 10, Bytes: 20 << 10}} {
			synctest.Test(t, func(t *testing.T) {
				s := NewSequence(t.Context(), way.of(delayed(l, time.Millisecond)), slices.Values(l.wants), 1<<40, window)
				defer s.Close()
				var held []Leaf
				var others sync.WaitGroup
				for i := range l.wants {
					if _, err := s.Next(); err != nil {
						t.Fatal(err)
					}
					var content []byte
					for {
						leaf, err := s.Leaf()
						if err == io.EOF {
							break
						}
						if err != nil {
							t.Fatal(err)
						}
						content = append(content, leaf.Bytes...)
						switch release {
						case "elsewhere":
							others.Go(func() {
								time.Sleep(2 * time.Millisecond)
								leaf.Release()
							})
						case "reversed":
							if held = append(held, leaf); len(held) == 7 {
								for _, leaf := range slices.Backward(held) {
									leaf.Release()
								}
								held = nil
							}
						}
					}
					if !bytes.Equal(content, l.contents[i]) {
						t.Errorf("%s, %+v: content %d is wrong", release, window, i)
					}
				}
				others.Wait()
			})
		}
	}
}

// Leaves that are held are not written over.
func TestHeldLeavesStay(t *testing.T) { allWays(t, testHeldLeavesStay) }

func testHeldLeavesStay(t *testing.T, way way) {
	l := newLibrary(t, BlockSize1KiB, 100_000, 50, 100_000)
	s := NewSequence(t.Context(), way.of(l), slices.Values(l.wants), 1<<40, Window{Bytes: 10 << 10})
	defer s.Close()
	var held [][]byte
	for range l.wants {
		if _, err := s.Next(); err != nil {
			t.Fatal(err)
		}
		for {
			leaf, err := s.Leaf()
			if err != nil {
				break
			}
			held = append(held, leaf.Bytes)
		}
	}
	if got := bytes.Join(held, nil); !bytes.Equal(got, bytes.Join(l.contents, nil)) {
		t.Error("held leaves have changed")
	}
}

// A bubble ends only when every goroutine in it has: these tests would fail if anything were left behind.
func TestSequenceCancellation(t *testing.T) { steadyWays(t, testSequenceCancellation) }

func testSequenceCancellation(t *testing.T, way way) {
	l := newLibrary(t, BlockSize1KiB, 100, 300_000, 20_000, 100, 300_000)
	hang := func(after int64) Blocks {
		var calls atomic.Int64
		return blocksFunc(func(ctx context.Context, ref Reference, size BlockSize, dst []byte) ([]byte, error) {
			if calls.Add(1) > after {
				<-ctx.Done()
				return nil, fmt.Errorf("asking: %w", ctx.Err())
			}
			return l.Get(ctx, ref, size, dst)
		})
	}
	for after := int64(0); after < 700; after = after*3/2 + 1 {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if err := readSequence(ctx, way.of(hang(after)), l.wants, 1<<40, Window{Requests: 20}, nil); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("hanging after %d calls: %v", after, err)
			}
			for _, want := range l.wants {
				if _, err := decodeAll(ctx, l, want.Capability, want.Limit, Window{}); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("context has ended: %v", err)
				}
			}
		})
		synctest.Test(t, func(t *testing.T) {
			s := NewSequence(t.Context(), way.of(hang(after)), slices.Values(l.wants), 1<<40, Window{Requests: 20})
			if after > 100 {
				if _, err := s.Next(); err != nil {
					t.Error(err)
				}
			}
			s.Close()
			s.Close()
			if after > 100 {
				s.current = nil // whatever was ready may still be had; go on behind it
				s.ready = nil
			}
			if _, err := s.Next(); !errors.Is(err, errSequenceClosed) {
				t.Errorf("closed: %v", err)
			}
		})
	}
	// One that was never used.
	s := NewSequence(t.Context(), way.of(l), slices.Values(l.wants), 1<<40, Window{})
	s.Close()
}

// The failure of one request ends those in flight.
func TestFailureEndsRequests(t *testing.T) { steadyWays(t, testFailureEndsRequests) }

func testFailureEndsRequests(t *testing.T, way way) {
	l := newLibrary(t, BlockSize1KiB, 300_000)
	synctest.Test(t, func(t *testing.T) {
		var calls, ended atomic.Int64
		source := blocksFunc(func(ctx context.Context, ref Reference, size BlockSize, dst []byte) ([]byte, error) {
			switch n := calls.Add(1); {
			case n == 50:
				time.Sleep(time.Second)
				return nil, ErrNotFound
			case n > 50:
				<-ctx.Done()
				ended.Add(1)
				return nil, ctx.Err()
			}
			return l.Get(ctx, ref, size, dst)
		})
		err := readSequence(t.Context(), way.of(source), l.wants, 1<<40, Window{Requests: 30}, nil)
		if errorKind(err) != "missing" {
			t.Error(err)
		}
		if n := calls.Load() - 50; n == 0 || n != ended.Load() {
			t.Errorf("%d requests were in flight, %d of them ended", n, ended.Load())
		}
	})
}

// The iterator is not run to its end before there is anything to show, nor beyond the end of the sequence.
func TestSequenceIteratorIsLazy(t *testing.T) { steadyWays(t, testSequenceIteratorIsLazy) }

func testSequenceIteratorIsLazy(t *testing.T, way way) {
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
	s := NewSequence(t.Context(), way.of(l), endless, math.MaxInt64, Window{})
	defer s.Close()
	if pulled != 0 {
		t.Error("pulled before it was used")
	}
	for i := range 10_000 {
		info, err := s.Next()
		if err != nil || info.Index != i {
			t.Fatal(info, err)
		}
		leaf, err := s.Leaf()
		if err != nil || !bytes.Equal(leaf.Bytes, l.contents[0]) {
			t.Fatal(err)
		}
		leaf.Release()
		// What may be ahead: those that are open or being opened, which the window bounds, and those that wait.
		if ahead := pulled - i; ahead > 2*DefaultRequests+DefaultBytes/2/1024+3*refillBatch {
			t.Fatalf("%d contents ahead", ahead)
		}
	}
}

// FuzzSequence reads sequences of contents of random shapes through random windows from a source that takes random times,
// releasing leaves at random. A bubble in which nothing moves any more is a failure, and so is one that does not end.
func FuzzSequence(f *testing.F) {
	for seed := range uint64(30) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		random := rand.New(rand.NewPCG(seed, 3))
		size := []BlockSize{0, BlockSize1KiB, BlockSize1KiB, BlockSize32KiB}[random.IntN(4)]
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
		window := Window{Requests: 1 + random.IntN(1<<random.IntN(9)), Bytes: 1 + random.Int64N(1<<(10+random.IntN(12)))}
		delay := time.Duration(random.IntN(3)) * time.Millisecond
		hold := random.IntN(1 + random.IntN(50))
		skip := random.IntN(3) == 0
		synctest.Test(t, func(t *testing.T) {
			source := way(random.IntN(3)).of(delayed(l, delay))
			s := NewSequence(t.Context(), source, slices.Values(l.wants), 1<<40, window)
			defer s.Close()
			var held []Leaf
			for i := range l.wants {
				info, err := s.Next()
				if err != nil || info.Index != i || info.Size != int64(len(l.contents[i])) {
					t.Fatalf("content %d: %+v, %v", i, info, err)
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
					rest = rest[len(leaf.Bytes):]
					held = append(held, leaf)
					for len(held) > hold {
						j := random.IntN(len(held))
						held[j].Release()
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

func ExampleSequence() {
	store := newMemory()
	ctx := context.Background()
	var wants []Want
	for _, content := range []string{"one", "", "three"} {
		capability, err := Encode(ctx, strings.NewReader(content), store, EncodeOptions{})
		if err != nil {
			panic(err)
		}
		wants = append(wants, Want{Capability: capability, Limit: 100})
	}

	const total = 1000
	sequence := NewSequence(ctx, store, slices.Values(wants), total, Window{})
	defer sequence.Close()
	for {
		info, err := sequence.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			panic(err)
		}
		fmt.Printf("content %d has %d bytes:", info.Index, info.Size)
		for {
			leaf, err := sequence.Leaf()
			if err == io.EOF {
				break
			}
			if err != nil {
				panic(err)
			}
			fmt.Printf(" %q", leaf.Bytes)
			leaf.Release()
		}
		fmt.Println()
	}
	// Output:
	// content 0 has 3 bytes: "one"
	// content 1 has 0 bytes: ""
	// content 2 has 5 bytes: "three"
}
