// SPDX-License-Identifier: GPL-3.0-or-later

package relay_test

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/relay"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

// memory is the store of a server: one that answers at once.
type memory struct {
	*sourcetest.Backend
}

func (m memory) Start(r *fetch.Request) {
	r.Block, r.Err = m.Get(context.Background(), r.Pair.Reference, r.Size, nil)
	if r.Err == nil && len(r.Block) != int(r.Size) {
		r.Err = eris.ErrNotFound
	}
	r.Done(r)
}

func (m memory) Cancel(*fetch.Request) {}
func (m memory) String() string        { return "memory:" }
func (m memory) Close() error          { return errors.New("the store is not the relay's") }

// upstream counts its requests, by the servers that they may go through.
type upstream struct {
	*sourcetest.Backend
	requests [3]atomic.Int32
}

func (u *upstream) open(hops int) ([]pool.Member, error) {
	return []pool.Member{{Source: counting{u.Open(64), &u.requests[hops]}}}, nil
}

type counting struct {
	fetch.Store
	requests *atomic.Int32
}

func (c counting) Start(r *fetch.Request) {
	c.requests.Add(1)
	c.Store.Start(r)
}

// start returns a relay of an empty store to an upstream.
func start(t *testing.T) (*relay.Relay, memory, *upstream) {
	own, u := memory{sourcetest.NewBackend()}, &upstream{Backend: sourcetest.NewBackend()}
	r, err := relay.New(own, relay.Options{Open: u.open})
	testhelp.Must(t, err)
	return r, own, u
}

func stop(t *testing.T, r *relay.Relay) {
	testhelp.Must(t, r.Close())
}

// TestLevels checks that requests go on as far as they may, and no further; and that what has come
// is kept.
func TestLevels(t *testing.T) {
	for hops, want := range [][3]int32{{0, 0, 1}, {}, {0, 1, 0}, {0, 1, 0}} {
		r, own, u := start(t)
		ref, block := u.Add(eris.BlockSize32KiB)
		got, err := fetch.Get(t.Context(), r.For("", hops), ref, eris.BlockSize32KiB, nil)
		if found := want != [3]int32{}; found != (err == nil && bytes.Equal(got, block)) {
			t.Errorf("%d: %v", hops, err)
		}
		for i := range want {
			if n := u.requests[i].Load(); n != want[i] {
				t.Errorf("%d: %d requests that may go through %d servers", hops, n, i)
			}
		}
		stop(t, r)
		if err == nil != own.Has(ref) {
			t.Errorf("%d: is kept: %v", hops, own.Has(ref))
		}
	}
}

// TestOneLevel checks that where upstreams may ask nobody, what they do not have is asked once,
// whoever wants it.
func TestOneLevel(t *testing.T) {
	u := &upstream{Backend: sourcetest.NewBackend()}
	r, err := relay.New(memory{sourcetest.NewBackend()}, relay.Options{Open: u.open, Levels: 1})
	testhelp.Must(t, err)
	defer stop(t, r)
	ref, _ := sourcetest.NewBlock(eris.BlockSize1KiB)
	for _, hops := range []int{0, 2, 1} {
		if _, err := fetch.Get(t.Context(), r.For("", hops), ref, eris.BlockSize1KiB, nil); !errors.Is(err, eris.ErrNotFound) {
			t.Error(err)
		}
	}
	if a, b := u.requests[1].Load(), u.requests[2].Load(); a != 1 || b != 0 {
		t.Errorf("%d requests, and %d that may go on", a, b)
	}
}

// TestOwn checks that nobody is asked for what is here, in whichever size.
func TestOwn(t *testing.T) {
	r, own, u := start(t)
	defer stop(t, r)
	for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
		ref, block := own.Add(size)
		if got, err := fetch.Get(t.Context(), r.For("", 0), ref, size, nil); err != nil || !bytes.Equal(got, block) {
			t.Error(err)
		}
		if size == eris.BlockSize1KiB {
			if _, err := fetch.Get(t.Context(), r.For("", 0), ref, eris.BlockSize32KiB, nil); !errors.Is(err, eris.ErrNotFound) {
				t.Error(err)
			}
		}
	}
	if n := u.requests[2].Load(); n != 0 {
		t.Errorf("%d requests", n)
	}
}

// TestSilent checks that a client does not wait for a silent upstream, and gets what that has when
// it is back.
func TestSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, own, u := start(t)
		ref, _ := u.Add(eris.BlockSize1KiB)
		release := u.Hold()
		begin := time.Now()
		_, err := fetch.Get(t.Context(), r.For("", 0), ref, eris.BlockSize1KiB, nil)
		if took := time.Since(begin); !errors.Is(err, fetch.ErrUnanswered) || took > 1400*time.Millisecond {
			t.Errorf("%v after %v", err, took)
		}
		release()
		synctest.Wait()
		time.Sleep(time.Second)
		if !own.Has(ref) {
			t.Error("what came late is not kept")
		}
		if s := r.Stats(); s.Late != 1 || s.Absent != 1 || s.Found != 0 {
			t.Errorf("%+v", s)
		}
		stop(t, r)
	})
}

// TestRefuse checks that a host that asks for what nobody has is not let ask for ever, while others
// and this machine's own are, and that it may again later.
func TestRefuse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _, u := start(t)
		miss := func(client string) error {
			ref, _ := sourcetest.NewBlock(eris.BlockSize1KiB)
			_, err := fetch.Get(t.Context(), r.For(client, 0), ref, eris.BlockSize1KiB, nil)
			if !errors.Is(err, eris.ErrNotFound) {
				t.Fatal(err)
			}
			return err
		}
		for range 1500 {
			miss("192.0.2.1/32")
			miss("")
		}
		if refused := r.Stats().Refused; refused < 400 || refused > 476 {
			t.Errorf("%d of 1500 were refused", refused)
		}
		if n := u.requests[2].Load(); int64(n) != 3000-r.Stats().Refused {
			t.Errorf("%d requests were made", n)
		}
		// To cancel what is over does nothing.
		ref, _ := sourcetest.NewBlock(eris.BlockSize1KiB)
		for _, client := range []string{"192.0.2.1/32", ""} {
			q := &fetch.Request{Pair: eris.Pair{Reference: ref}, Size: eris.BlockSize1KiB, Dst: make([]byte, 0, 1024), Done: func(*fetch.Request) {}}
			source := r.For(client, 0)
			source.Start(q)
			synctest.Wait()
			source.Cancel(q)
			if !errors.Is(q.Err, eris.ErrNotFound) {
				t.Error(q.Err)
			}
		}
		if errors.Is(miss("192.0.2.2/32"), fetch.ErrUnanswered) {
			t.Error("another host pays for it")
		}
		time.Sleep(time.Second)
		if errors.Is(miss("192.0.2.1/32"), fetch.ErrUnanswered) {
			t.Error("it is still refused")
		}
		stop(t, r)
	})
}

// TestCrowd has one host make more requests than may be under way, cancels some, and closes.
func TestCrowd(t *testing.T) { synctest.Test(t, testCrowd) }

func testCrowd(t *testing.T) {
	const count = 600
	r, _, u := start(t)
	source := r.For("192.0.2.1/32", 0)
	release := u.Hold()
	done := make(chan *fetch.Request, count)
	requests := make([]*fetch.Request, count)
	for i := range requests {
		ref, _ := u.Add(eris.BlockSize1KiB)
		requests[i] = &fetch.Request{
			Pair: eris.Pair{Reference: ref}, Size: eris.BlockSize1KiB, Dst: make([]byte, 0, 1024),
			Done: func(q *fetch.Request) { done <- q },
		}
		source.Start(requests[i])
	}
	if n := u.requests[2].Load(); n > 128 {
		t.Errorf("%d requests are under way for one host", n)
	}
	for i := 0; i < count; i += 3 {
		source.Cancel(requests[i])
	}
	for range count / 3 {
		if q := <-done; !errors.Is(q.Err, context.Canceled) {
			t.Errorf("error is %v", q.Err)
		}
	}
	release()
	for range count - count/3 {
		if q := <-done; q.Err != nil || eris.Sum(q.Block) != q.Pair.Reference {
			t.Errorf("error is %v", q.Err)
		}
	}
	u.Hold()
	for _, q := range requests {
		ref, _ := sourcetest.NewBlock(eris.BlockSize1KiB)
		q.Pair.Reference = ref
		source.Start(q)
	}
	stop(t, r)
	for range count {
		if q := <-done; q.Err == nil {
			t.Error("there is a block after the end")
		}
	}
}
