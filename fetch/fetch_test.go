// SPDX-License-Identifier: GPL-3.0-or-later

package fetch_test

import (
	"bytes"
	"context"
	"errors"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

// A call is cancelled whenever that is asked for, also before it has begun, and ends once for each
// use, not before Start has returned.
func TestCall(t *testing.T) {
	var c fetch.Call
	source := &slowStart{Source: sourcetest.NewBackend().Open(1)}
	defer source.Close()
	ended := make(chan struct{}, 2)
	c.Init(source, func() { ended <- struct{}{} })
	for name, when := range map[string]struct{ before, within, behind bool }{
		"not": {}, "before": {before: true}, "within": {within: true}, "behind": {behind: true}, "each time": {true, true, true},
	} {
		cancel := func(now bool) {
			if now {
				c.Cancel()
			}
		}
		source.started = func() {
			cancel(when.within)
			if len(ended) != 0 {
				t.Errorf("%s: it ends before Start has returned", name)
			}
		}
		want := eris.ErrNotFound
		if source.silent = when.before || when.within || when.behind; source.silent {
			want = context.Canceled
		}
		c.Size, c.Dst = eris.BlockSize1KiB, make([]byte, 0, eris.BlockSize1KiB)
		cancel(when.before)
		c.Begin()
		cancel(when.behind)
		<-ended
		c.Cancel()
		if !errors.Is(c.Err, want) || len(ended) > 0 {
			t.Errorf("%s: it ends with %v, and %d times more", name, c.Err, len(ended))
		}
		c.Reset()
	}
}

// slowStart is a source whose Start takes a while, and which is silent if that is asked for.
type slowStart struct {
	fetch.Source
	silent  bool
	started func()
}

func (s *slowStart) Start(r *fetch.Request) {
	if !s.silent {
		s.Source.Start(r)
	}
	s.started()
}

func (s *slowStart) Cancel(r *fetch.Request) {
	if s.silent {
		s.silent = false
		r.Fail(context.Canceled)
	}
}

// A call that does not return must not keep its request from being cancelled, nor write to its
// memory later; and of requests that are cancelled while they wait for a worker nothing stays.
func TestWorkersDeaf(t *testing.T) {
	begun, end := make(chan struct{}), make(chan struct{})
	block := bytes.Repeat([]byte{1}, int(eris.BlockSize1KiB))
	source := fetch.NewWorkers("deaf:", 1, func(_ context.Context, _ eris.Reference, _ eris.BlockSize, dst []byte) ([]byte, error) {
		close(begun)
		<-end
		return append(dst, block...), nil
	})
	memory := make([]byte, len(block))
	done := make(chan struct{}, 1)
	start := func() *fetch.Request {
		r := &fetch.Request{Size: eris.BlockSize1KiB, Dst: memory[:0], Done: func(*fetch.Request) { done <- struct{}{} }}
		source.Start(r)
		return r
	}
	cancel := func(r *fetch.Request) {
		source.Cancel(r)
		<-done
		source.Cancel(r) // does nothing
		if !errors.Is(r.Err, context.Canceled) {
			t.Fatalf("the request ends with %v", r.Err)
		}
	}
	r := start()
	<-begun
	cancel(r)
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := heap()
	for range 100_000 {
		cancel(start())
	}
	if grown := heap() - before; grown > 1<<20 {
		t.Errorf("%d bytes are left of requests that were cancelled", grown)
	}
	close(end)
	testhelp.Must(t, source.Close())
	if !bytes.Equal(memory, make([]byte, len(memory))) {
		t.Error("memory was written to after Done")
	}
	r = start() // ends at once
	<-done
	source.Cancel(r) // does nothing
}

func TestVerify(t *testing.T) {
	var requests []*fetch.Request
	for i := range 200 {
		block := bytes.Repeat([]byte{byte(i)}, int([]eris.BlockSize{eris.BlockSize32KiB, eris.BlockSize1KiB, eris.BlockSize1KiB}[i%3]))
		r := &fetch.Request{Pair: eris.Pair{Reference: eris.Sum(block)}, Size: eris.BlockSize(len(block)), Block: block}
		switch i % 10 {
		case 1:
			block[i] ^= 1
		case 2:
			r.Block = block[1:]
		case 3:
			r.Err = eris.ErrNotFound
		}
		requests = append(requests, r)
	}
	fetch.Verify(requests)
	for i, r := range requests {
		wrong, ok := errors.AsType[*eris.BlockError](r.Err)
		if n := i % 10; ok != (n == 1 || n == 2) || ok && wrong.Reference != r.Pair.Reference || n == 3 && r.Err != eris.ErrNotFound || n > 3 && r.Err != nil {
			t.Errorf("%d: %v", i, r.Err)
		}
	}
}

// odd is a store of all blocks whose references begin with an odd number; it knows so many answers.
type odd int

func (o odd) Have(question []byte) []byte {
	n := 0
	return fetch.HaveBits(question, func(prefix []byte) (has, known bool) {
		n++
		return prefix[0]&1 == 1, n <= int(o)
	})
}

// TestHaveBits checks the bits of an answer, and one that was broken off.
func TestHaveBits(t *testing.T) {
	question := make([]byte, 11*fetch.HavePrefix)
	for _, i := range []int{0, 2, 7, 8, 10} {
		question[i*fetch.HavePrefix] = 1
	}
	if answer, ok := fetch.AnswerHave(odd(11), question); !ok || !bytes.Equal(answer, []byte{0b1010_0001, 0b1010_0000}) {
		t.Errorf("%b, %v", answer, ok)
	}
	for known, want := range map[int]int{10: 1, 8: 1, 7: 0, 0: 0} {
		if answer, _ := fetch.AnswerHave(odd(known), question); len(answer) != want {
			t.Errorf("%d known: %b", known, answer)
		}
	}
	for _, n := range []int{0, 1, 7, 9, fetch.HavePrefix*fetch.MaxHave + 8} {
		if _, ok := fetch.AnswerHave(odd(1<<20), make([]byte, n)); ok {
			t.Errorf("%d bytes are a question", n)
		}
	}
}

// FuzzHave gives anything for a question, and anything for an answer.
func FuzzHave(f *testing.F) {
	f.Add([]byte("12345678abcdefgh"), 2)
	f.Add(bytes.Repeat([]byte{1}, fetch.HavePrefix*fetch.MaxHave), 1000)
	f.Add([]byte{}, 0)
	f.Fuzz(func(t *testing.T, question []byte, known int) {
		answer, ok := fetch.AnswerHave(odd(known), question)
		n := len(question) / fetch.HavePrefix
		if ok != (n >= 1 && n <= fetch.MaxHave && len(question)%fetch.HavePrefix == 0) || len(answer) > (n+7)/8 {
			t.Fatalf("%d bytes for %d, %v", len(answer), len(question), ok)
		}
		for i := range 8 * len(answer) {
			has, said := fetch.Has(answer, i)
			if want := i < n && question[i*fetch.HavePrefix]&1 == 1; !said || has != want {
				t.Fatalf("bit %d is %v", i, has)
			}
		}
		for i := range 2*n + 1 {
			if has, said := fetch.Has(question, i); has && !said {
				t.Fatal("there is what is not known")
			}
		}
		if _, said := fetch.Has(answer, 8*len(answer)); said {
			t.Fatal("more is said than there is")
		}
	})
}

func TestPipelineOutlivesEncoder(t *testing.T) {
	backend := sourcetest.NewBackend()
	store := backend.Open(1)
	defer store.Close()
	whole, stop := context.WithCancel(t.Context())
	defer stop()
	pipeline := fetch.NewPipeline(whole, store)
	put := func(n byte) eris.Reference {
		block := make([]byte, eris.BlockSize1KiB)
		block[0] = n
		ref := eris.Sum(block)
		ctx, cancel := context.WithCancel(t.Context())
		testhelp.Must(t, pipeline.Put(ctx, ref, block))
		backend.AwaitHeld(1)
		cancel()
		return ref
	}
	release := backend.Hold()
	ref := put(1)
	release()
	if err := pipeline.Flush(); err != nil || !backend.Has(ref) {
		t.Errorf("the block was not stored: %v", err)
	}
	pipeline = fetch.NewPipeline(whole, store)
	release = backend.Hold()
	defer release()
	ref = put(2)
	stop()
	if err := pipeline.Flush(); !errors.Is(err, context.Canceled) || backend.Has(ref) {
		t.Errorf("after the end of the pipeline's context: %v", err)
	}
}

func TestConformance(t *testing.T) {
	for name, wrap := range map[string]func(fetch.Source) fetch.Source{
		"workers": func(s fetch.Source) fetch.Source { return s },
		"within": func(s fetch.Source) fetch.Source {
			return fetch.Within(fetch.Within(s, eris.Reference{1}, nil), eris.Reference{2}, nil)
		},
	} {
		t.Run(name, func(t *testing.T) {
			sourcetest.Test(t, func(t *testing.T, backend *sourcetest.Backend) sourcetest.Fixture {
				return sourcetest.Fixture{Source: wrap(backend.Open(16)), Held: 16}
			})
		})
	}
}

func TestWithin(t *testing.T) {
	block := make([]byte, eris.BlockSize1KiB)
	var roots []eris.Reference
	workers := fetch.NewWorkers("test:", 1, nil)
	workers.Within = func(_ context.Context, root, _ eris.Reference, _ eris.BlockSize, _ []byte) ([]byte, error) {
		if roots = append(roots, root); len(roots) == 2 {
			return nil, eris.ErrNotFound
		}
		return block, nil
	}
	var got atomic.Int64
	root := eris.Reference{1}
	source := fetch.Within(workers, root, func(n int) { got.Add(int64(n)) })
	defer source.Close()
	for range 3 {
		fetch.Get(t.Context(), source, eris.Sum(block), eris.BlockSize1KiB, nil)
	}
	if !slices.Equal(roots, []eris.Reference{root, root, root}) || got.Load() != 2048 {
		t.Errorf("within %v, %d bytes were counted", roots, got.Load())
	}
}
