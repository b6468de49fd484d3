// SPDX-License-Identifier: GPL-3.0-or-later

package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// memory is a store in memory, which counts, and fails as it is told.
type memory struct {
	mu         sync.Mutex
	blocks     map[eris.Reference][]byte
	gets, puts int
	getError   error
	putError   error
	hang       bool // puts wait for their context
}

func newMemory() *memory { return &memory{blocks: map[eris.Reference][]byte{}} }

func (m *memory) Verified() {}

func (m *memory) Get(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.gets++
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if m.getError != nil {
		return nil, m.getError
	}
	block, ok := m.blocks[ref]
	if !ok || len(block) != int(size) {
		return nil, fmt.Errorf("here: %w", eris.ErrNotFound)
	}
	return append(dst, block...), nil
}

func (m *memory) Put(ctx context.Context, ref eris.Reference, block []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.puts++
	if m.hang {
		m.mu.Unlock()
		<-ctx.Done()
		m.mu.Lock()
		return context.Cause(ctx)
	}
	if m.putError == nil {
		m.blocks[ref] = bytes.Clone(block)
	}
	return m.putError
}

func (m *memory) String() string { return "memory:" }
func (m *memory) Close() error   { return nil }

// add adds blocks from first to before last.
func (m *memory) add(first, last int) *memory {
	for i := first; i < last; i++ {
		ref, block := testBlock(i, mixed(i))
		m.blocks[ref] = block
	}
	return m
}

func mustGet(t *testing.T, blocks eris.Blocks, first, last int) {
	t.Helper()
	for i := first; i < last; i++ {
		ref, want := testBlock(i, mixed(i))
		memory := make([]byte, 0, mixed(i))
		if got, err := blocks.Get(t.Context(), ref, mixed(i), memory); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("block %d: %d bytes, %v", i, len(got), err)
		}
		clear(memory[:cap(memory)]) // it is the reader's, who decrypts in place
	}
}

// starter is a memory that answers without waiting.
type starter struct {
	*memory
	started int
}

func (s *starter) Starts() bool { return true }

func (s *starter) Start(ref eris.Reference, size eris.BlockSize, dst []byte, answered func()) eris.Request {
	s.mu.Lock()
	s.started++
	s.mu.Unlock()
	r := &answer{}
	r.block, r.err = s.Get(context.Background(), ref, size, dst)
	answered()
	return r
}

type answer struct {
	block []byte
	err   error
}

func (a *answer) Cancel()                  {}
func (a *answer) Finish() ([]byte, error)  { return a.block, a.err }
func (a *answer) Verified(err error) error { return err }

// What is started is kept, too, and what is in the cache is not asked for.
func TestThroughStarter(t *testing.T) {
	far := &starter{memory: newMemory().add(0, 100)}
	c := testOpen(t, t.TempDir(), 16<<20)
	blocks, ok := Through(c, far).(eris.Starter)
	if !ok || !blocks.Starts() || Through(c, far.memory).(eris.Starter).Starts() {
		t.Fatal("it does not pass on whether requests can be started")
	}
	start := func(i int) (eris.Request, []byte) {
		ref, want := testBlock(i, mixed(i))
		n := 0
		r := blocks.Start(ref, mixed(i), make([]byte, 0, mixed(i)), func() { n++ })
		if (r != nil) != (n == 1) {
			t.Errorf("block %d: %d answers", i, n)
		}
		return r, want
	}
	for i := range 100 {
		r, want := start(i)
		got, err := r.Finish()
		if err = r.Verified(err); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("block %d: %d bytes, %v", i, len(got), err)
		}
		clear(got)
	}
	c.flush()
	for i := range 100 {
		if r, _ := start(i); r != nil {
			t.Fatalf("block %d is asked for again", i)
		}
	}
	mustGet(t, blocks, 0, 100)
	if far.started != 100 || far.gets != 100 {
		t.Errorf("%d blocks were asked for, %d of them started", far.gets, far.started)
	}
	r, _ := start(100)
	_, err := r.Finish()
	if err = r.Verified(err); !errors.Is(err, eris.ErrNotFound) {
		t.Error(err)
	}
	// What is wrong is not kept.
	r, _ = start(99)
	if r != nil {
		t.Fatal("block 99 is asked for again")
	}
	ref, wrong := testBlock(200, mixed(200))
	wrong[5]++
	far.blocks[ref] = wrong
	r, _ = start(200)
	block, err := r.Finish()
	if err := r.Verified(errors.Join(err, eris.Verify(ref, block))); err == nil {
		t.Error("a wrong block is accepted")
	}
	c.flush()
	if c.Has(t.Context(), ref, mixed(200)) {
		t.Error("a wrong block is kept")
	}
}

func TestThrough(t *testing.T) {
	far := newMemory().add(0, 100)
	if Through(nil, far) != eris.VerifiedBlocks(far) {
		t.Error("no cache is something")
	}
	c := testOpen(t, t.TempDir(), 16<<20)
	blocks := Through(c, far)
	mustGet(t, blocks, 0, 100)
	c.flush()
	if far.gets != 100 {
		t.Errorf("%d requests for 100 blocks", far.gets)
	}
	mustGet(t, blocks, 0, 100)
	if far.gets != 100 {
		t.Errorf("%d requests for 100 blocks, twice", far.gets)
	}
	ref, _ := testBlock(100, small)
	if _, err := blocks.Get(t.Context(), ref, small, nil); !errors.Is(err, eris.ErrNotFound) {
		t.Error(err)
	}
	far.getError = errors.New("unreachable")
	if _, err := blocks.Get(t.Context(), ref, small, nil); !errors.Is(err, far.getError) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("enough")
	cancel(reason)
	ref, _ = testBlock(1, small)
	if _, err := blocks.Get(ctx, ref, small, nil); !errors.Is(err, reason) {
		t.Error(err)
	}
	// A cache that cannot be used costs nothing but what it would have saved.
	far = newMemory().add(0, 100)
	c = OpenLater("/dev/null/x", 1<<20, nil)
	defer c.Close()
	for range 2 {
		mustGet(t, Through(c, far), 0, 100)
	}
	if far.gets != 200 {
		t.Errorf("%d requests", far.gets)
	}
}

// A whole content, from far and then from the cache.
func TestThroughContent(t *testing.T) {
	far := newMemory()
	content := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	content[12345]++
	capability, err := eris.Encode(t.Context(), bytes.NewReader(content), far, eris.EncodeOptions{BlockSize: small})
	if err != nil {
		t.Fatal(err)
	}
	d := t.TempDir()
	for round := range 2 {
		c, err := Open(d, 16<<20)
		if err != nil {
			t.Fatal(err)
		}
		before := far.gets
		opened, err := eris.Open(t.Context(), Through(c, far), capability, int64(len(content)), eris.Window{})
		if err != nil {
			t.Fatal(err)
		}
		var got bytes.Buffer
		if _, err := opened.WriteTo(t.Context(), &got); err != nil || !bytes.Equal(got.Bytes(), content) {
			t.Errorf("round %d: %d bytes, %v", round, got.Len(), err)
		}
		if n := far.gets - before; n == 0 != (round == 1) {
			t.Errorf("round %d: %d requests", round, n)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestThroughStore(t *testing.T) {
	near, far := newMemory().add(0, 20), newMemory().add(0, 100)
	s := ThroughStore(near, far, func(err error) { t.Error(err) })
	mustGet(t, s, 0, 100)
	s.Close()
	if far.gets != 80 || near.puts != 80 {
		t.Errorf("%d requests for 80 blocks, %d puts", far.gets, near.puts)
	}
	s = ThroughStore(near, far, nil)
	mustGet(t, s, 0, 100)
	ref, _ := testBlock(100, small)
	if _, err := s.Get(t.Context(), ref, small, nil); !errors.Is(err, eris.ErrNotFound) {
		t.Error(err)
	}
	s.Close()
	if far.gets != 81 || near.puts != 80 {
		t.Errorf("%d requests for 80 blocks, %d puts", far.gets, near.puts)
	}
	mustGet(t, s, 0, 100) // nothing is put any more
	if near.puts != 80 {
		t.Errorf("%d puts", near.puts)
	}
}

// A store that fails is left alone for some time, or for good, and fails nothing.
func TestThroughStoreFails(t *testing.T) {
	failure := errors.New("unreachable")
	for name, test := range map[string]struct {
		prepare    func(near *memory)
		gets, puts int // of 100 blocks
		later      int // gets of another 100 blocks, after a pause
		told       int
	}{
		"unreachable": {func(m *memory) { m.getError, m.putError = failure, failure }, 1, 1, 1, 2},
		"read-only":   {func(m *memory) { m.putError = fmt.Errorf("no: %w", fetch.ErrReadOnly) }, 100, 1, 100, 0},
		"full":        {func(m *memory) { m.putError = failure }, 100, 1, 100, 1},
		"wrong bytes": {func(m *memory) { m.getError = &eris.BlockError{} }, 1, 0, 0, 1},
		"hangs":       {func(m *memory) { m.hang = true }, 100, 100, 100, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				near, far := newMemory(), newMemory().add(0, 200)
				test.prepare(near)
				var told []error
				s := ThroughStore(near, far, func(err error) { told = append(told, err) })
				get := func(first, last int) {
					for i := first; i < last; i++ {
						mustGet(t, s, i, i+1)
						synctest.Wait() // puts are done, or hang
					}
				}
				get(0, 100)
				if near.gets != test.gets || near.puts != test.puts {
					t.Errorf("%d gets instead of %d, %d puts instead of %d", near.gets, test.gets, near.puts, test.puts)
				}
				near.gets = 0
				time.Sleep(pause + time.Second)
				get(100, 200)
				if near.gets != test.later {
					t.Errorf("after a pause, %d gets instead of %d", near.gets, test.later)
				}
				if len(told) != test.told {
					t.Errorf("told %q", told)
				}
				start := time.Now()
				s.Close()
				if took := time.Since(start); took > closePatience {
					t.Errorf("Close took %v", took)
				}
			})
		})
	}
}

// A store that takes blocks slowly does not hold up those who get them, and never
// has more than some MiB on its way.
func TestThroughStoreSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := newMemory(), newMemory()
		near.hang = true
		s := ThroughStore(near, far, nil)
		start := time.Now()
		for i := range 1000 {
			ref, block := testBlock(i, large)
			far.blocks[ref] = block
			if _, err := s.Get(t.Context(), ref, large, nil); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		if took := time.Since(start); took > time.Second {
			t.Errorf("1000 blocks took %v", took)
		}
		if near.puts < 200 || near.puts*int(large) > storeBytes {
			t.Errorf("%d puts at a time", near.puts)
		}
		s.Close()
	})
}
