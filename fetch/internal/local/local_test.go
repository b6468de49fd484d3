// SPDX-License-Identifier: GPL-3.0-or-later

package local

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var errTest = errors.New("test")

// testFiles are files whose operations may hang.
type testFiles struct {
	hang     chan struct{}
	commits  func() error
	released int
}

func (f *testFiles) Read(_ eris.Reference, block []byte) error {
	<-f.hang
	block[0] = 1
	return nil
}

func (f *testFiles) Write(eris.Reference, []byte) (func() error, error) { return f.commits, nil }

func (f *testFiles) Release() { f.released++ }

func newStore(t *testing.T, files Files) *Store {
	u, err := storeurl.Parse("file:x")
	testhelp.Must(t, err)
	return New(u, files)
}

// TestHang has file operations hang: calls are given up nevertheless, also by Close, and the files
// are released when nothing uses them any more.
func TestHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		files := &testFiles{hang: make(chan struct{})}
		s := newStore(t, files)
		ctx, cancel := context.WithCancelCause(t.Context())
		var group sync.WaitGroup
		for i := range 2 * maxOperations { // half of them wait for their turn
			group.Go(func() {
				ctx, want := ctx, errTest
				if i%2 == 0 {
					ctx, want = t.Context(), fetch.ErrClosed
				}
				if _, err := fetch.Get(ctx, s, eris.Reference{}, eris.BlockSize1KiB, nil); !errors.Is(err, want) {
					t.Errorf("error is %v, want %v", err, want)
				}
			})
		}
		synctest.Wait()
		cancel(errTest)
		synctest.Wait()
		testhelp.Must(t, s.Close())
		group.Wait()
		if files.released > 0 {
			t.Error("released while in use")
		}
		if err := s.Put(t.Context(), eris.Sum(make([]byte, 1024)), make([]byte, 1024)); !errors.Is(err, fetch.ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
		close(files.hang)
		for range 2 {
			if err := s.Close(); err != nil || files.released != 1 {
				t.Errorf("%v, released %d times", err, files.released)
			}
		}
	})
}

// TestPutCommits checks that commits are not among the operations whose number is limited, and that
// nothing is written that is no block.
func TestPutCommits(t *testing.T) {
	const calls = 2 * maxOperations
	var all, group sync.WaitGroup
	all.Add(calls)
	s := newStore(t, &testFiles{commits: func() error { all.Done(); all.Wait(); return errTest }})
	defer s.Close()
	block := bytes.Repeat([]byte("x"), int(eris.BlockSize32KiB))
	for range calls {
		group.Go(func() {
			if err := s.Put(t.Context(), eris.Sum(block), block); !errors.Is(err, errTest) {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if err := s.Put(t.Context(), eris.Reference{}, block); !errors.As(err, new(*eris.BlockError)) {
		t.Errorf("another block: %v", err)
	}
	if err := s.Put(t.Context(), eris.Sum(block[1:]), block[1:]); !errors.Is(err, eris.ErrBlockSize) {
		t.Errorf("something that is no block: %v", err)
	}
}

// TestCommits checks that a commit that covers a call has begun after the call, that those who wait
// share one, and that errors reach those whom they concern.
func TestCommits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		commits, proceed := 0, make(chan error)
		c := NewCommits(func() error {
			commits++
			return <-proceed
		})
		results := make(chan error)
		call := func() { go func() { results <- c.Do() }() }
		call()
		synctest.Wait()
		const calls = 100
		for range calls {
			call()
		}
		synctest.Wait()
		if commits != 1 {
			t.Errorf("%d commits at a time", commits)
		}
		proceed <- errTest
		if err := <-results; err != errTest {
			t.Errorf("error is %v", err)
		}
		synctest.Wait()
		select {
		case <-results:
			t.Error("a call was done by a commit that had begun before it")
		default:
		}
		proceed <- nil
		for range calls {
			if err := <-results; err != nil {
				t.Errorf("error is %v", err)
			}
		}
		if commits != 2 {
			t.Errorf("%d commits", commits)
		}
	})
}
