// SPDX-License-Identifier: GPL-3.0-or-later

package fetch_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
)

// scripted is a source that has what its function says.
type scripted struct {
	*fetch.Workers
	get func() ([]byte, error)
}

func newScripted() *scripted {
	s := &scripted{}
	s.Workers = fetch.NewWorkers(100, func(context.Context, eris.Reference, eris.BlockSize, []byte) ([]byte, error) { return s.get() })
	return s
}

func (*scripted) String() string { return "test:" }

func TestStagesConformance(t *testing.T) {
	for name, wrap := range map[string]func(fetch.Source) fetch.Source{
		"counted": func(s fetch.Source) fetch.Source { return fetch.Counted(fetch.Counted(s, func(int) {}), func(int) {}) },
		"limited": func(s fetch.Source) fetch.Source { return fetch.Limited(s, ratelimit.New(64<<20, 0)) },
	} {
		t.Run(name, func(t *testing.T) {
			sourcetest.Test(t, func(t *testing.T, backend *sourcetest.Backend) sourcetest.Fixture {
				return sourcetest.Fixture{Source: wrap(backend.Open(16)), Held: 16}
			})
		})
	}
}

func TestCounted(t *testing.T) {
	s := newScripted()
	var got atomic.Int64
	source := fetch.Counted(s, func(n int) { got.Add(int64(n)) })
	defer source.Close()
	block := make([]byte, eris.BlockSize1KiB)
	for _, err := range []error{nil, eris.ErrNotFound, nil} {
		s.get = func() ([]byte, error) { return block, err }
		if _, e := fetch.Get(t.Context(), source, eris.Sum(block), eris.BlockSize1KiB, nil); !errors.Is(e, err) {
			t.Error(e)
		}
	}
	if n := got.Load(); n != 2048 {
		t.Errorf("%d bytes were counted", n)
	}
}

func TestLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = eris.BlockSize32KiB
		block := make([]byte, size)
		ref := eris.Sum(block)
		s := newScripted()
		if fetch.Limited(s, nil) != fetch.Source(s) {
			t.Error("a source without a limit is wrapped")
		}
		source := fetch.Limited(s, ratelimit.New(int64(size), int64(size)))
		const count = 10
		start := func() (requests []*fetch.Request, done chan *fetch.Request) {
			done = make(chan *fetch.Request, count)
			for range count {
				r := &fetch.Request{Pair: eris.Pair{Reference: ref}, Size: size, Dst: make([]byte, 0, size), Done: func(r *fetch.Request) { done <- r }}
				requests = append(requests, r)
				source.Start(r)
			}
			return requests, done
		}
		for _, test := range []struct {
			name string
			err  error
			want time.Duration // until the next one could come at once
		}{
			{"blocks", nil, count * time.Second},
			{"wrong bytes", &eris.BlockError{Reference: ref}, count * time.Second},
		} {
			begin := time.Now()
			s.get = func() ([]byte, error) { return block, test.err }
			_, done := start()
			for range count {
				if r := <-done; !errors.Is(r.Err, test.err) {
					t.Fatalf("%s: %v", test.name, r.Err)
				}
			}
			time.Sleep(time.Second)
			if took := time.Since(begin); (took - test.want).Abs() > time.Millisecond {
				t.Errorf("%s: %v instead of %v", test.name, took, test.want)
			}
		}
		// What does not come does not count.
		for _, err := range []error{eris.ErrNotFound, errors.New("unreachable")} {
			begin := time.Now()
			s.get = func() ([]byte, error) { return nil, err }
			for range count {
				if _, e := fetch.Get(t.Context(), source, ref, size, nil); !errors.Is(e, err) {
					t.Error(e)
				}
			}
			if took := time.Since(begin); took > time.Millisecond {
				t.Errorf("%v: took %v", err, took)
			}
		}
		// What is cancelled ends at once, also while it waits, and leaves its share to others.
		begin := time.Now()
		s.get = func() ([]byte, error) { return block, nil }
		requests, done := start()
		for _, r := range requests[1 : count-1] {
			source.Cancel(r)
		}
		for range count {
			<-done
		}
		if took := time.Since(begin); took > count*time.Second {
			t.Errorf("took %v", took)
		}
		if _, done = start(); source.Close() != nil {
			t.Error("Close failed")
		}
		for range count {
			<-done
		}
	})
}
