// SPDX-License-Identifier: GPL-3.0-or-later

package pool_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
)

// keeper is a fake with some of the blocks, that says what it has.
type keeper struct {
	fake
	has    func(n int) bool
	claims func(n int, has bool) bool // nil: the truth; n is -1 for what nobody can have
	reply  func(r *fetch.Request)     // nil: as claims has it
	misses atomic.Int32
	asked  atomic.Int32 // questions

	silentAfter int32 // so many of them
}

// prefixes are numbers of blocks of 1 KiB.
var prefixes sync.Map

func newKeeper(i int, has func(n int) bool) *keeper {
	k := &keeper{has: has}
	k.name, k.roundTrip, k.silentAfter = fmt.Sprintf("keeper:%d", i), 50*time.Millisecond, 1000
	k.answer = func(_ context.Context, n int, _ int64) error {
		if has(n) {
			return nil
		}
		k.misses.Add(1)
		return eris.ErrNotFound
	}
	return k
}

func (k *keeper) AsksHave() bool { return true }

// Progress is what has come over the line. Blocks that are not wanted any more have their turn on
// it all the same, so that a source may send nothing else for seconds.
func (k *keeper) Progress() int64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.booked - int64(max(0, time.Until(k.free)).Seconds()*k.rate)
}

func (k *keeper) Start(r *fetch.Request) {
	if r.Have == nil {
		k.fake.Start(r)
		return
	}
	wait := k.roundTrip
	if k.asked.Add(1) > k.silentAfter {
		wait = time.Hour
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.Held = cancel
	go func() {
		defer cancel()
		r.Err = nil
		switch {
		case k.reply != nil:
			k.reply(r)
		default:
			r.Block = append(r.Dst[:0], fetch.HaveBits(r.Have, func(prefix []byte) (has, known bool) {
				n := -1
				if v, ok := prefixes.Load([fetch.HavePrefix]byte(prefix)); ok {
					n = v.(int)
				}
				has = n >= 0 && k.has(n)
				if k.claims != nil {
					has = k.claims(n, has)
				}
				return has, true
			})...)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			r.Err = context.Canceled
		}
		r.Done(r)
	}()
}

// kin is the blocks from n on.
func kin(n, count int, origin any) *fetch.Kin {
	k := &fetch.Kin{Origin: origin}
	for i := range count {
		ref := reference(n+i, eris.BlockSize1KiB)
		prefixes.Store([fetch.HavePrefix]byte(ref[:]), n+i)
		k.Refs = append(k.Refs, ref)
	}
	return k
}

// getKin gets the blocks of kin, all at once, and returns where the first one came from.
func getKin(t *testing.T, p *pool.Pool, k *fetch.Kin) any {
	t.Helper()
	done := make(chan *fetch.Request, len(k.Refs))
	for i, ref := range k.Refs {
		p.Start(&fetch.Request{
			Pair: eris.Pair{Reference: ref}, Size: eris.BlockSize1KiB, Dst: make([]byte, 0, eris.BlockSize1KiB),
			Kin: k, Nth: i, Done: func(r *fetch.Request) { done <- r },
		})
	}
	var origin any
	for range k.Refs {
		r := <-done
		if r.Err != nil {
			t.Errorf("block %d: %v", r.Nth, r.Err)
		}
		if r.Nth == 0 {
			origin = r.Origin
		}
	}
	return origin
}

// readTree gets the contents of a tree of 1 + 8 + 8×256 blocks.
func readTree(t *testing.T, p *pool.Pool) (blocks int) {
	t.Helper()
	root := getKin(t, p, kin(0, 1, nil))
	nodes := getKin(t, p, kin(1, 8, root))
	for i := range 8 {
		getKin(t, p, kin(100+256*i, 256, nodes))
	}
	return 9 + 8*256
}

// share is the blocks of one of n sources, at random.
func share(i, n int) func(block int) bool {
	return func(block int) bool {
		return rand.New(rand.NewPCG(7, uint64(block))).IntN(n) == i
	}
}

func members[S fetch.Source](list []S) (m []pool.Member) {
	for _, s := range list {
		m = append(m, pool.Member{Source: s})
	}
	return m
}

// totals returns the sums of what sources have done.
func totals(p *pool.Pool) (requests, misses int) {
	for _, s := range p.Stats() {
		requests += int(s.Requests)
		misses += int(s.Misses)
	}
	return requests, misses
}

// TestShares reads from sources of which each has a part, in the ways that they may answer to what
// they have.
func TestShares(t *testing.T) {
	const n = 12
	fails := func(err error) func(r *fetch.Request) { return func(r *fetch.Request) { r.Err = err } }
	for _, v := range []struct {
		name     string
		change   func(i int, k *keeper)
		perBlock float64
		misses   int
	}{
		{"all say it", func(int, *keeper) {}, 1.2, 40},
		{"one claims everything", func(i int, k *keeper) {
			if i == 3 {
				k.claims = func(int, bool) bool { return true }
			}
		}, 1.3, 400},
		{"one lies often", func(i int, k *keeper) {
			if i == 3 {
				k.claims = func(n int, has bool) bool { return has || n >= 0 && n%3 == 0 }
			}
		}, 1.3, 300},
		{"one says little", func(i int, k *keeper) {
			if i == 3 {
				k.reply = func(r *fetch.Request) { r.Block = r.Dst[:1] }
			}
		}, 2.5, 3000},
		{"one says nothing", func(i int, k *keeper) {
			if i == 3 {
				k.reply = func(r *fetch.Request) { r.Block = nil }
			}
		}, 1.3, 300},
		{"one denies all", func(i int, k *keeper) {
			if i == 3 {
				k.claims = func(int, bool) bool { return false }
			}
		}, 1.2, 100},
		{"half do not understand", func(i int, k *keeper) {
			if i%2 == 0 {
				k.reply = fails(fetch.ErrCannotSay)
			}
		}, 3.5, 5000},
		{"nobody understands", func(i int, k *keeper) { k.reply = fails(fetch.ErrCannotSay) }, 7, 13000},
	} {
		t.Run(v.name, func(t *testing.T) {
			var keepers []*keeper
			for i := range n {
				k := newKeeper(i, share(i, n))
				v.change(i, k)
				keepers = append(keepers, k)
			}
			simulate(t, pool.Options{}, members(keepers), func(t *testing.T, p *pool.Pool) {
				begin := time.Now()
				blocks := readTree(t, p)
				requests, misses := totals(p)
				perBlock := float64(requests) / float64(blocks)
				t.Logf("%v, %.2f requests per block, %d misses", time.Since(begin), perBlock, misses)
				if perBlock > v.perBlock || misses > v.misses {
					t.Errorf("%.2f requests per block, %d misses, instead of %.2f and %d", perBlock, misses, v.perBlock, v.misses)
				}
				for i, k := range keepers {
					if k.asked.Load() > 1 && (k.reply != nil && v.name != "one says little" || v.name == "one claims everything" && i == 3) {
						t.Errorf("%v was asked %d times what it has", k, k.asked.Load())
					}
				}
			})
		})
	}
}

// TestWhole checks that nobody is asked what it has where nobody misses anything.
func TestWhole(t *testing.T) {
	all := func(int) bool { return true }
	keepers := []*keeper{newKeeper(0, all), newKeeper(1, all)}
	simulate(t, pool.Options{}, members(keepers), func(t *testing.T, p *pool.Pool) {
		readTree(t, p)
		for _, k := range keepers {
			if k.asked.Load() > 0 {
				t.Errorf("%v was asked what it has", k)
			}
			if k.requests() == 0 {
				t.Errorf("%v has not been used", k)
			}
		}
	})
}

// TestKin checks that who gave the node is asked first for its children, also of sources that
// cannot say what they have.
func TestKin(t *testing.T) {
	var fakes []*fake
	for i := range 8 {
		fakes = append(fakes, &newKeeper(i, func(n int) bool { return n/1000%8 == i }).fake)
	}
	simulate(t, pool.Options{}, members(fakes), func(t *testing.T, p *pool.Pool) {
		blocks := 0
		for i := range 40 {
			root := getKin(t, p, kin(1000*i, 1, nil))
			getKin(t, p, kin(1000*i+1, 50, root))
			blocks += 51
		}
		if requests, misses := totals(p); float64(requests) > 1.2*float64(blocks) {
			t.Errorf("%d requests for %d blocks, %d misses", requests, blocks, misses)
		}
	})
}

// TestSilentAnswers has some sources never answer what they have, from the beginning or later on:
// they are waited for a little only, do not count as silent, and their blocks come all the same.
func TestSilentAnswers(t *testing.T) {
	for _, after := range []int32{0, 4} {
		var keepers []*keeper
		for i := range 6 {
			k := newKeeper(i, share(i, 6))
			if i%2 == 0 {
				k.silentAfter = after
			}
			keepers = append(keepers, k)
		}
		rests := func(source string, err error) { t.Errorf("%s rests: %v", source, err) }
		simulate(t, pool.Options{OnRest: rests}, members(keepers), func(t *testing.T, p *pool.Pool) {
			begin := time.Now()
			readTree(t, p)
			if took := time.Since(begin); took > 7*time.Second {
				t.Errorf("took %v", took)
			} else {
				t.Log(took)
			}
		})
	}
}

// TestDeniesWhatItGets checks that a source is asked in the end that says not to have a block: it
// may have got it meanwhile, or have others to ask.
func TestDeniesWhatItGets(t *testing.T) {
	none := func(int) bool { return false }
	keepers := []*keeper{newKeeper(0, none), newKeeper(1, func(n int) bool { return true }), newKeeper(2, none)}
	for _, k := range keepers {
		k.claims = func(int, bool) bool { return false }
	}
	simulate(t, pool.Options{}, members(keepers), func(t *testing.T, p *pool.Pool) {
		getKin(t, p, kin(0, 100, nil))
		missing := &fetch.Kin{Refs: []eris.Reference{reference(1<<30, 1024)}}
		keepers[1].answer = keepers[0].answer
		done := make(chan error, 1)
		p.Start(&fetch.Request{
			Pair: eris.Pair{Reference: missing.Refs[0]}, Size: 1024, Dst: make([]byte, 0, 1024), Kin: missing,
			Done: func(r *fetch.Request) { done <- r.Err },
		})
		if err := <-done; !errors.Is(err, eris.ErrNotFound) {
			t.Errorf("error is %v", err)
		}
	})
}

// TestSlowHolder checks that what two have, one of whom is slow, comes from the other one mostly.
func TestSlowHolder(t *testing.T) {
	most := func(i int) func(n int) bool { return func(n int) bool { return n%10 != i } }
	slow, fast := newKeeper(0, most(0)), newKeeper(1, most(1))
	slow.rate, fast.rate = 100e3, 5e6
	simulate(t, pool.Options{}, members([]*keeper{slow, fast}), func(t *testing.T, p *pool.Pool) {
		begin := time.Now()
		root := getKin(t, p, kin(0, 1, nil))
		var group sync.WaitGroup
		for i := range 16 {
			k := kin(100+500*i, 500, root)
			group.Go(func() { getKin(t, p, k) })
		}
		group.Wait()
		// The slow one alone has a tenth.
		near(t, time.Since(begin), float64(800<<10)/100e3, 2)
	})
}
