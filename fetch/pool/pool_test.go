// SPDX-License-Identifier: GPL-3.0-or-later

package pool_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/sourcestate"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var must = testhelp.Must

// fake is a source in simulated time, at the end of a line with a round trip and a rate. Its blocks
// are made from their numbers.
type fake struct {
	name      string
	roundTrip time.Duration
	rate      float64                                         // bytes per second; 0: no bound
	answer    func(ctx context.Context, n int, i int64) error // before answering: the i-th request is for block n; nil: has it
	lies      bool

	mu     sync.Mutex
	free   time.Time
	booked int64 // bytes
	asked  []int
	active int
	most   int
}

var errBroken = errors.New("connection broken")

func (f *fake) String() string { return f.name }

func (f *fake) Close() error { return nil }

// numbers are of blocks, by their references.
var numbers sync.Map

// reference returns that of block n of a size.
func reference(n int, size eris.BlockSize) eris.Reference {
	type key struct {
		n    int
		size eris.BlockSize
	}
	if ref, ok := numbers.Load(key{n, size}); ok {
		return ref.(eris.Reference)
	}
	block := make([]byte, size)
	binary.BigEndian.PutUint64(block, uint64(n))
	ref := eris.Sum(block)
	numbers.Store(key{n, size}, ref)
	numbers.Store(ref, n)
	return ref
}

func (f *fake) Start(r *fetch.Request) {
	ctx, cancel := context.WithCancel(context.Background())
	r.Held = cancel
	f.mu.Lock()
	n, _ := numbers.Load(r.Pair.Reference)
	i := int64(len(f.asked))
	f.asked = append(f.asked, n.(int))
	f.active++
	f.most = max(f.most, f.active)
	var at time.Time
	if f.answer == nil {
		at = f.book(r.Size)
	}
	f.mu.Unlock()
	go func() {
		defer cancel()
		r.Err = f.wait(ctx, n.(int), i, r.Size, at)
		r.Block = r.Dst[:r.Size]
		clear(r.Block)
		binary.BigEndian.PutUint64(r.Block, uint64(n.(int)))
		if f.lies {
			r.Block[100] = 1
		}
		f.mu.Lock()
		f.active--
		f.mu.Unlock()
		r.Done(r)
	}()
}

func (f *fake) Cancel(r *fetch.Request) { r.Held.(context.CancelFunc)() }

// book returns when a block comes that is asked for now. f.mu must be held.
func (f *fake) book(size eris.BlockSize) time.Time {
	f.booked += int64(size)
	at := time.Now().Add(f.roundTrip)
	if f.rate > 0 {
		if f.free.Before(at) {
			f.free = at
		}
		f.free = f.free.Add(time.Duration(float64(size) / f.rate * float64(time.Second)))
		at = f.free
	}
	return at
}

// wait waits as long as the block takes.
func (f *fake) wait(ctx context.Context, n int, i int64, size eris.BlockSize, at time.Time) error {
	if f.answer != nil {
		if err := f.answer(ctx, n, i); err != nil {
			if errors.Is(err, eris.ErrNotFound) {
				time.Sleep(f.roundTrip)
			}
			return err
		}
		f.mu.Lock()
		at = f.book(size)
		f.mu.Unlock()
	}
	timer := time.NewTimer(time.Until(at))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// hang never answers.
func hang(ctx context.Context, _ int, _ int64) error {
	<-ctx.Done()
	return context.Cause(ctx)
}

// stallsAfter answers so many requests, and then hangs.
func stallsAfter(most int64) func(ctx context.Context, n int, i int64) error {
	return func(ctx context.Context, n int, i int64) error {
		if i < most {
			return nil
		}
		return hang(ctx, n, i)
	}
}

func missing(context.Context, int, int64) error { return eris.ErrNotFound }

func (f *fake) requests() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.asked)
}

// sources makes far members of fakes.
func sources(fakes ...*fake) (list []pool.Member) {
	for i, f := range fakes {
		if f.name == "" {
			f.name = fmt.Sprintf("fake:%d", i)
		}
		list = append(list, pool.Member{Source: f})
	}
	return list
}

func get(ctx context.Context, p *pool.Pool, n int, size eris.BlockSize) error {
	block, err := fetch.Get(ctx, p, reference(n, size), size, nil)
	if err != nil {
		return err
	}
	if len(block) != int(size) || int(binary.BigEndian.Uint64(block)) != n {
		return fmt.Errorf("got %d bytes of another block", len(block))
	}
	return nil
}

// readAll gets the blocks from 0 to n in order, as a reader does: no more than the window is asked
// for and not yet handed out. It returns how long that took.
func readAll(t *testing.T, p *pool.Pool, n int, size eris.BlockSize, window int) time.Duration {
	t.Helper()
	begin := time.Now()
	room := make(chan struct{}, window)
	results := make(chan chan error, window)
	go func() {
		for i := range n {
			room <- struct{}{}
			result := make(chan error, 1)
			results <- result
			go func() { result <- get(t.Context(), p, i, size) }()
		}
		close(results)
	}()
	i := 0
	for result := range results {
		if err := <-result; err != nil {
			t.Errorf("block %d: %v", i, err)
		}
		i++
		<-room
	}
	return time.Since(begin)
}

// simulate runs a test in simulated time, with a pool that is closed at the end.
func simulate(t *testing.T, options pool.Options, list []pool.Member, f func(t *testing.T, p *pool.Pool)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		p := pool.New(list, options)
		f(t, p)
		must(t, p.Close())
		if err := get(t.Context(), p, 1, 1024); err == nil {
			t.Error("Get after Close did not fail")
		}
		if t.Failed() {
			for _, s := range p.Stats() {
				t.Logf("%+v", s)
			}
		}
	})
}

const large = eris.BlockSize32KiB

// near checks a time against the best that is possible.
func near(t *testing.T, took time.Duration, best float64, most float64) {
	t.Helper()
	ratio := took.Seconds() / best
	t.Logf("took %v, %.3f of the best", took, ratio)
	if ratio > most {
		t.Errorf("took %v, %.3f of the best instead of at most %.2f", took, ratio, most)
	}
}

// TestOne checks that the only source is asked in the order of the requests, without a copy.
func TestOne(t *testing.T) {
	f := &fake{}
	simulate(t, pool.Options{}, sources(f), func(t *testing.T, p *pool.Pool) {
		memory := make([]byte, 0, large)
		for n := range 100 {
			block, err := fetch.Get(t.Context(), p, reference(n, 1024), 1024, memory)
			if err != nil || &block[0] != &memory[:1][0] {
				t.Fatalf("the block is not in the memory of the caller: %v", err)
			}
		}
		if !slices.IsSorted(f.asked) {
			t.Error("blocks were not asked for in their order")
		}
	})
}

// TestTimes has sources of all kinds deliver together what they can, in a time that is compared
// with the best that is possible, and checks that little is asked for twice.
func TestTimes(t *testing.T) {
	sparse := func(_ context.Context, n int, _ int64) error {
		if n%50 != 0 {
			return eris.ErrNotFound
		}
		return nil
	}
	const n, most = 4000, 1 / 0.9
	blocks := n * float64(large)
	for _, v := range []struct {
		name  string
		fakes []*fake
		best  float64 // seconds
	}{
		{"equal", []*fake{{roundTrip: 20e6, rate: 20e6}, {roundTrip: 20e6, rate: 20e6}}, blocks / 40e6},
		{"fast and slow", []*fake{{roundTrip: 20e6, rate: 20e6}, {roundTrip: 20e6, rate: 4e6}}, blocks / 24e6},
		{"slow and fast", []*fake{{roundTrip: 20e6, rate: 4e6}, {roundTrip: 20e6, rate: 20e6}}, blocks / 24e6},
		{"near and far", []*fake{{roundTrip: 5e6, rate: 10e6}, {roundTrip: 100e6, rate: 10e6}}, blocks / 20e6},
		{"near slow and far fast", []*fake{{roundTrip: 5e6, rate: 4e6}, {roundTrip: 100e6, rate: 16e6}}, blocks / 20e6},
		{"three", []*fake{{roundTrip: 5e6, rate: 2e6}, {roundTrip: 50e6, rate: 8e6}, {roundTrip: 100e6, rate: 16e6}}, blocks / 26e6},
		{"one stalls at half of the time", []*fake{{roundTrip: 20e6, rate: 20e6}, {roundTrip: 20e6, rate: 20e6, answer: stallsAfter(n / 4)}}, blocks/80e6 + blocks/40e6},
		{"a near one with few of the blocks", []*fake{{roundTrip: 1e6, rate: 500e6, answer: sparse}, {roundTrip: 50e6, rate: 20e6}}, blocks / 20e6},
	} {
		t.Run(v.name, func(t *testing.T) {
			simulate(t, pool.Options{}, sources(v.fakes...), func(t *testing.T, p *pool.Pool) {
				near(t, readAll(t, p, n, large, 384), v.best, most)
				requests, misses := totals(p)
				if s := p.Stats()[1]; s.Banned || s.Resting != (v.fakes[1].answer != nil) {
					t.Errorf("the second source is %+v", s)
				}
				if v.fakes[1].answer == nil && requests-misses > n*102/100+32 {
					t.Errorf("%d requests for %d blocks", requests, n)
				}
			})
		})
	}
}

// TestBehindNear has two sources share the work behind a near one that has nothing.
func TestBehindNear(t *testing.T) {
	list := append(sources(&fake{name: "cache", answer: missing}), sources(&fake{roundTrip: 5e6, rate: 10e6}, &fake{roundTrip: 100e6, rate: 10e6})...)
	list[0].Near = true
	simulate(t, pool.Options{}, list, func(t *testing.T, p *pool.Pool) {
		near(t, readAll(t, p, 4000, large, 384), 4000*float64(large)/20e6, 1/0.9)
	})
}

// TestSlowNear has a near source be slow to say that it does not have blocks, so that far ones are
// asked meanwhile: none of them is asked again when that has said so.
func TestSlowNear(t *testing.T) {
	slow := &fake{name: "cache", answer: func(_ context.Context, n int, _ int64) error {
		if n%10 == 9 {
			time.Sleep(50 * time.Millisecond)
		}
		return eris.ErrNotFound
	}}
	far := []*fake{{roundTrip: 20e6, rate: 20e6}, {roundTrip: 20e6, rate: 20e6}}
	list := append(sources(slow), sources(far...)...)
	list[0].Near = true
	simulate(t, pool.Options{}, list, func(t *testing.T, p *pool.Pool) {
		readAll(t, p, 1000, 1024, 64)
		for _, f := range far {
			slices.Sort(f.asked)
			if again := len(f.asked) - len(slices.Compact(slices.Clone(f.asked))); again > 0 {
				t.Errorf("%s is asked %d times for a block that it was asked for", f.name, again)
			}
		}
	})
}

// TestSmallBlocks gets small blocks over long lines: enough are in flight. Thousands at once, in
// the window that the pool proposes, take one round trip to find out that the source answers, and
// one for each window.
func TestSmallBlocks(t *testing.T) {
	simulate(t, pool.Options{}, sources(&fake{roundTrip: 100e6, rate: 10e6}, &fake{roundTrip: 100e6, rate: 5e6}), func(t *testing.T, p *pool.Pool) {
		near(t, readAll(t, p, 20000, 1024, 4096), 20000*1024/15e6, 1.4)
	})
	simulate(t, pool.Options{}, sources(&fake{roundTrip: 100e6}), func(t *testing.T, p *pool.Pool) {
		if w := p.Window(); w.Requests < 5000 {
			t.Errorf("window %+v", w)
		}
		near(t, readAll(t, p, 5000, 1024, p.Window().Requests), 0.1, 3)
	})
}

// TestFarAndSlow adds a source that can only be late to one that is good: it must not cost
// anything.
func TestFarAndSlow(t *testing.T) {
	for _, v := range []struct {
		name  string
		other *fake
	}{
		{"far", &fake{roundTrip: 3e9, rate: 20e6}},
		{"slow", &fake{roundTrip: 20e6, rate: 1e4}},
		{"far and slow", &fake{roundTrip: 1e9, rate: 1e5}},
		{"has nothing", &fake{roundTrip: 300e6, answer: missing}},
	} {
		for _, first := range []bool{true, false} {
			v.other.free, v.other.asked = time.Time{}, nil
			t.Run(fmt.Sprintf("%s/first=%v", v.name, first), func(t *testing.T) {
				list := sources(&fake{name: "good", roundTrip: 20e6, rate: 20e6}, v.other)
				if first {
					slices.Reverse(list)
				}
				simulate(t, pool.Options{}, list, func(t *testing.T, p *pool.Pool) {
					near(t, readAll(t, p, 2000, large, 256), 2000*float64(large)/20e6, 1.1)
				})
			})
		}
	}
}

// TestComesBack checks that a source that was silent for a while is used again.
func TestComesBack(t *testing.T) {
	const n = 6000
	f := &fake{roundTrip: 20e6, rate: 20e6}
	var begin time.Time
	var once sync.Once
	f.answer = func(context.Context, int, int64) error {
		once.Do(func() { begin = time.Now() })
		if since := time.Since(begin); since > time.Second && since < 2*time.Second {
			time.Sleep(2*time.Second - since)
		}
		return nil
	}
	simulate(t, pool.Options{}, sources(f, &fake{roundTrip: 20e6, rate: 20e6}), func(t *testing.T, p *pool.Pool) {
		// Without it that takes 1.8 times as long. How long it rests is chance.
		near(t, readAll(t, p, n, large, 384), n*float64(large)/40e6+0.5, 1.25)
		if s := p.Stats()[0]; s.Resting || s.Bytes < n*int64(large)/3 {
			t.Errorf("the source that came back is %+v", s)
		}
	})
}

// TestHedge has one answer in a hundred take very long, and checks that few blocks are asked for
// twice.
func TestHedge(t *testing.T) {
	const n = 4000
	f := &fake{roundTrip: 20e6, rate: 20e6}
	f.answer = func(ctx context.Context, _ int, i int64) error {
		if i%100 == 50 {
			select {
			case <-time.After(5 * time.Second):
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		return nil
	}
	other := &fake{roundTrip: 20e6, rate: 20e6}
	simulate(t, pool.Options{}, sources(f, other), func(t *testing.T, p *pool.Pool) {
		near(t, readAll(t, p, n, large, 256), n*float64(large)/40e6, 1.15)
		if requests := f.requests() + other.requests(); requests > n*102/100+32 {
			t.Errorf("%d requests for %d blocks", requests, n)
		}
	})
}

// TestHedgeBesideProbe loses a request for a block by which a member that rests is probed as well:
// another one is asked for it all the same, and nobody waits for the probe.
func TestHedgeBesideProbe(t *testing.T) {
	loses := &fake{roundTrip: 5e6, answer: func(ctx context.Context, n int, i int64) error {
		if n == 1000 {
			return hang(ctx, n, i)
		}
		return nil
	}}
	state := sourcestate.Open("")
	state.Rests("fake:1", time.Now().Add(-time.Second), 1)
	silent := &fake{answer: hang}
	list := sources(loses, silent, &fake{roundTrip: 100e6})
	simulate(t, pool.Options{State: state}, list, func(t *testing.T, p *pool.Pool) {
		readAll(t, p, 500, large, 64)
		time.Sleep(time.Minute)
		done := make(chan error)
		before, begin := silent.requests(), time.Now()
		go func() { done <- get(t.Context(), p, 1000, large) }()
		synctest.Wait()
		for i := 0; ; i++ {
			select {
			case err := <-done:
				if took := time.Since(begin); err != nil || took > 2*time.Second || silent.requests() == before || !slices.Contains(loses.asked, 1000) {
					t.Errorf("took %v (%v), with %d probes", took, err, silent.requests()-before)
				}
				return
			default:
				must(t, get(t.Context(), p, i, large))
			}
		}
	})
}

// TestHedgeCap has both sources so erratic that everything seems to be late, and checks that the
// cap holds, but not for a block that would never come from one of them.
func TestHedgeCap(t *testing.T) {
	const n = 6000
	erratic := func(_ context.Context, n int, i int64) error {
		time.Sleep(time.Duration((i*7919+int64(n))%13) * 20 * time.Millisecond)
		return nil
	}
	loses := func(ctx context.Context, n int, i int64) error {
		if i == 2000 {
			return hang(ctx, n, i)
		}
		return erratic(ctx, n, i)
	}
	a, b := &fake{roundTrip: 5e6, answer: loses}, &fake{roundTrip: 5e6, answer: erratic}
	simulate(t, pool.Options{}, sources(a, b), func(t *testing.T, p *pool.Pool) {
		if took := readAll(t, p, n, large, 64); took > 2*time.Minute {
			t.Errorf("took %v", took)
		}
		// And once more what was in flight to one that seemed to be silent.
		if requests := a.requests() + b.requests(); requests > n*102/100+32+2*64 {
			t.Errorf("%d requests for %d blocks", requests, n)
		}
	})
}

// TestBothHang has two sources of which neither answers the first request for a certain block: not
// even the second one, which is asked because the first one is late.
func TestBothHang(t *testing.T) {
	hangs := func() func(ctx context.Context, n int, i int64) error {
		var asked atomic.Bool
		return func(ctx context.Context, n int, i int64) error {
			if n == 200 && !asked.Swap(true) {
				<-ctx.Done()
				return context.Cause(ctx)
			}
			return nil
		}
	}
	list := sources(&fake{roundTrip: 5e6, answer: hangs()}, &fake{roundTrip: 5e6, answer: hangs()})
	simulate(t, pool.Options{}, list, func(t *testing.T, p *pool.Pool) {
		readAll(t, p, 200, large, 64)
		begin := time.Now()
		must(t, get(t.Context(), p, 200, large))
		if took := time.Since(begin); took > 10*time.Second {
			t.Errorf("took %v", took)
		} else {
			t.Logf("took %v", took)
		}
	})
}

// TestDead has a source that cannot be reached, which takes its time to show: it must cost that
// time at most once.
func TestDead(t *testing.T) {
	dead := &fake{answer: func(ctx context.Context, _ int, _ int64) error {
		select {
		case <-time.After(5 * time.Second):
			return errBroken
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}}
	good := &fake{roundTrip: 20e6, rate: 20e6}
	state := sourcestate.Open("")
	simulate(t, pool.Options{State: state}, sources(dead, good), func(t *testing.T, p *pool.Pool) {
		near(t, readAll(t, p, 10000, large, 256), 10000*float64(large)/20e6, 1.1)
		if n := dead.requests(); n > 12 {
			t.Errorf("the dead source was asked %d times", n)
		}
		// What nobody has is known without it.
		good.answer = missing
		begin := time.Now()
		if err := get(t.Context(), p, 20000, large); !errors.Is(err, eris.ErrNotFound) || time.Since(begin) > time.Second {
			t.Errorf("a missing block: %v after %v", err, time.Since(begin))
		}
	})
	// Alone, it fails soon for everyone who comes later, as does one that says so at once; it is named
	// once.
	refused := &fake{name: "fake:0", answer: func(context.Context, int, int64) error { return fmt.Errorf("fake:0: %w", errBroken) }}
	for _, f := range []*fake{dead, refused} {
		simulate(t, pool.Options{}, sources(f), func(t *testing.T, p *pool.Pool) {
			begin := time.Now()
			for i := range 100 {
				if err := get(t.Context(), p, i, large); err == nil || errors.Is(err, eris.ErrNotFound) || strings.Count(err.Error(), "fake:0") != 1 {
					t.Errorf("block %d: %v", i, err)
				}
			}
			if took := time.Since(begin); took > 2*time.Second {
				t.Errorf("100 blocks took %v to fail", took)
			}
		})
	}
}

// TestMissing checks who is asked for what is missing: everyone, but only once.
func TestMissing(t *testing.T) {
	half := func(_ context.Context, n int, _ int64) error {
		if n%2 == 1 {
			return eris.ErrNotFound
		}
		return nil
	}
	a, b := &fake{roundTrip: 1e6, answer: half}, &fake{roundTrip: 20e6, answer: missing}
	simulate(t, pool.Options{}, sources(a, b), func(t *testing.T, p *pool.Pool) {
		for i := range 100 {
			err := get(t.Context(), p, i, 1024)
			if i%2 == 0 && err != nil || i%2 == 1 && !errors.Is(err, eris.ErrNotFound) {
				t.Errorf("block %d: %v", i, err)
			}
		}
		asked := a.requests() + b.requests()
		for i := 1; i < 100; i += 2 {
			if err := get(t.Context(), p, i, 1024); err != eris.ErrNotFound {
				t.Errorf("block %d: %v", i, err)
			}
		}
		if again := a.requests() + b.requests() - asked; again > 0 {
			t.Errorf("%d requests for blocks that are known to be missing", again)
		}
		time.Sleep(time.Hour)
		a.answer = nil
		if err := get(t.Context(), p, 1, 1024); err != nil {
			t.Errorf("a block that is there now: %v", err)
		}
	})
}

// TestLiar has the fastest source give wrong bytes.
func TestLiar(t *testing.T) {
	liar := &fake{roundTrip: 1e6, lies: true}
	good := &fake{roundTrip: 20e6, rate: 20e6}
	var faults []string
	options := pool.Options{OnFault: func(source string, err error) { faults = append(faults, source) }}
	simulate(t, options, sources(liar, good), func(t *testing.T, p *pool.Pool) {
		near(t, readAll(t, p, 2000, large, 256), 2000*float64(large)/20e6, 1.1)
		synctest.Wait()
		if !slices.Equal(faults, []string{"fake:0"}) {
			t.Errorf("faults: %v", faults)
		}
		if n := liar.requests(); n > 8 {
			t.Errorf("the liar was asked %d times", n)
		}
		if s := p.Stats()[0]; !s.Banned || s.Faults == 0 {
			t.Errorf("the liar is %+v", s)
		}
	})
	simulate(t, options, sources(liar), func(t *testing.T, p *pool.Pool) {
		for range 3 {
			if err := get(t.Context(), p, 1, large); !errors.As(err, new(*eris.BlockError)) {
				t.Errorf("the only source lies: %v", err)
			}
		}
		// An hour later it has been mended.
		liar.lies = false
		time.Sleep(time.Hour - time.Minute)
		if err := get(t.Context(), p, 2, large); err == nil {
			t.Error("a liar is asked again too soon")
		}
		time.Sleep(2 * time.Minute)
		if err := get(t.Context(), p, 2, large); err != nil {
			t.Errorf("a liar of old: %v", err)
		}
	})
}

// TestDamaged has sources of which each gives one wrong block: together they have all.
func TestDamaged(t *testing.T) {
	for n := 2; n <= 3; n++ {
		var list []*fake
		for i := range n {
			list = append(list, &fake{roundTrip: 5e6, rate: 20e6, answer: func(_ context.Context, block int, _ int64) error {
				if block == 100+200*i {
					return &eris.BlockError{Reference: reference(block, large), Length: int(large), Want: large}
				}
				return nil
			}})
		}
		simulate(t, pool.Options{}, sources(list...), func(t *testing.T, p *pool.Pool) {
			for range 3 { // so that each is asked for what it lacks
				readAll(t, p, 600, large, 64)
			}
		})
	}
}

// TestOtherSize checks that nobody is banned because somebody asked for a block by the wrong size:
// capabilities come from strangers.
func TestOtherSize(t *testing.T) {
	f := &fake{answer: func(_ context.Context, n int, _ int64) error {
		if n == 1 {
			return &eris.BlockError{Reference: reference(n, 1024), Length: int(large), Want: 1024}
		}
		return nil
	}}
	for _, list := range [][]pool.Member{sources(f), sources(f, &fake{roundTrip: 1e6})} {
		simulate(t, pool.Options{}, list, func(t *testing.T, p *pool.Pool) {
			get(t.Context(), p, 1, 1024)
			must(t, get(t.Context(), p, 2, 1024))
			if p.Stats()[0].Banned {
				t.Error("the source was banned")
			}
		})
	}
}

// TestBroken has connections break: all blocks come all the same, if there is another source, or
// the source works again.
func TestBroken(t *testing.T) {
	for n := 1; n <= 2; n++ {
		var until atomic.Int64 // nanoseconds since 1970
		breaks := func(_ context.Context, _ int, i int64) error {
			if i%200 == 199 {
				until.Store(time.Now().Add(80 * time.Millisecond).UnixNano())
			}
			if time.Now().UnixNano() < until.Load() {
				return errBroken
			}
			return nil
		}
		list := sources(&fake{roundTrip: 20e6, rate: 20e6, answer: breaks}, &fake{roundTrip: 30e6, rate: 10e6})[:n]
		simulate(t, pool.Options{}, list, func(t *testing.T, p *pool.Pool) {
			readAll(t, p, 1000, large, 128)
		})
	}
}

// TestBusy has a source ask for some time, at first and twice later: it is given that, and nothing
// has failed.
func TestBusy(t *testing.T) {
	f := &fake{roundTrip: 20e6, rate: 20e6, answer: func(_ context.Context, _ int, i int64) error {
		if i/20%10 == 0 {
			return &fetch.BusyError{After: 2100 * time.Millisecond, Err: errBroken}
		}
		return nil
	}}
	simulate(t, pool.Options{}, sources(f), func(t *testing.T, p *pool.Pool) {
		readAll(t, p, 500, large, 128)
		if s := p.Stats()[0]; s.Failures != 0 || s.Resting {
			t.Errorf("the source is %+v", s)
		}
	})
	later := &fake{answer: func(_ context.Context, n int, _ int64) error {
		if n == 1 {
			return nil
		}
		return &fetch.BusyError{After: 20 * time.Second, Err: errBroken}
	}}
	simulate(t, pool.Options{}, sources(later), func(t *testing.T, p *pool.Pool) {
		must(t, get(t.Context(), p, 1, large))
		if err := get(t.Context(), p, 2, large); strings.Count(fmt.Sprint(err), "to be asked again") != 1 {
			t.Errorf("got %v, want that said once", err)
		}
	})
}

// TestBusyAtFirst has a source be busy from the first request on, and not say for how long: it is
// asked again, for seconds, and what another one has is not waited for.
func TestBusyAtFirst(t *testing.T) {
	begin := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC) // of each bubble
	for away, want := range map[time.Duration]bool{900 * time.Millisecond: true, 4 * time.Second: false} {
		busy := func() *fake {
			return &fake{answer: func(context.Context, int, int64) error {
				if time.Since(begin) < away {
					return &fetch.BusyError{Err: errBroken}
				}
				return nil
			}}
		}
		for _, blocks := range []int{1, 50} {
			f := busy()
			simulate(t, pool.Options{}, sources(f), func(t *testing.T, p *pool.Pool) {
				var group sync.WaitGroup
				for i := range blocks {
					group.Go(func() {
						if err := get(t.Context(), p, i, eris.BlockSize1KiB); (err == nil) != want {
							t.Errorf("busy for %v: %v", away, err)
						}
					})
				}
				group.Wait()
				if s := p.Stats()[0]; want && s.Failures != 0 || f.requests() > 8*blocks {
					t.Errorf("%d requests, the source is %+v", f.requests(), s)
				}
			})
		}
		simulate(t, pool.Options{}, sources(busy(), &fake{}), func(t *testing.T, p *pool.Pool) {
			if took := readAll(t, p, 50, eris.BlockSize1KiB, 16); took > 500*time.Millisecond {
				t.Errorf("with another one it takes %v", took)
			}
		})
	}
}

// TestLimited has a source refuse more than some requests at a time, and say for how long or not:
// it is asked for as many as it answers, for more when it takes more, and nothing has failed.
func TestLimited(t *testing.T) {
	for _, v := range []struct {
		most  int64
		after time.Duration
	}{{1, 0}, {4, 0}, {4, time.Second}} {
		var now, limit, refused atomic.Int64
		limit.Store(v.most)
		f := &fake{answer: func(context.Context, int, int64) error {
			defer now.Add(-1)
			if now.Add(1) > limit.Load() {
				refused.Add(1)
				return &fetch.BusyError{After: v.after, Err: errBroken}
			}
			time.Sleep(20 * time.Millisecond)
			return nil
		}}
		rests := func(_ string, err error) { t.Errorf("it rests: %v", err) }
		simulate(t, pool.Options{Patient: v.most == 1, OnRest: rests}, sources(f), func(t *testing.T, p *pool.Pool) {
			near(t, readAll(t, p, int(60*v.most), eris.BlockSize1KiB, 16), 1.2+v.after.Seconds(), 1.5)
			if n := refused.Load(); n > 32 {
				t.Errorf("%d requests were refused", n)
			}
			limit.Store(50)
			if took := readAll(t, p, 200, eris.BlockSize1KiB, 16); v.most == 1 && took > 3*time.Second { // instead of 4 s
				t.Errorf("when it takes more it takes %v", took)
			}
			if s := p.Stats()[0]; s.Failures != 0 || s.Resting {
				t.Errorf("the source is %+v", s)
			}
		})
	}
}

// TestRate has a source take a request only some time after the last one that it took.
func TestRate(t *testing.T) {
	for _, interval := range []time.Duration{20 * time.Millisecond, 200 * time.Millisecond} {
		var last atomic.Int64
		f := &fake{answer: func(context.Context, int, int64) error {
			now, before := time.Now().UnixNano(), last.Load()
			if now-before < int64(interval) || !last.CompareAndSwap(before, now) {
				return &fetch.BusyError{Err: errBroken}
			}
			time.Sleep(time.Millisecond)
			return nil
		}}
		simulate(t, pool.Options{}, sources(f), func(t *testing.T, p *pool.Pool) {
			near(t, readAll(t, p, 200, eris.BlockSize1KiB, 64), 200*interval.Seconds(), 3)
		})
	}
}

// TestMerging has many calls want the same block, of which the first is given up.
func TestMerging(t *testing.T) {
	for n := 1; n <= 2; n++ {
		a, b := &fake{roundTrip: 20e6}, &fake{roundTrip: 20e6}
		simulate(t, pool.Options{}, sources(a, b)[:n], func(t *testing.T, p *pool.Pool) {
			for i := 2; i < 4; i++ { // with a probe
				must(t, get(t.Context(), p, i, large))
				time.Sleep(time.Second)
			}
			before := a.requests() + b.requests()
			ctx, cancel := context.WithCancel(t.Context())
			var group sync.WaitGroup
			group.Go(func() {
				if err := get(ctx, p, 1, large); !errors.Is(err, context.Canceled) {
					t.Errorf("the call that was given up returns %v", err)
				}
			})
			synctest.Wait()
			for range 50 {
				group.Go(func() {
					memory := make([]byte, 0, large)
					block, err := fetch.Get(t.Context(), p, reference(1, large), large, memory)
					if err != nil || int(binary.BigEndian.Uint64(block)) != 1 {
						t.Errorf("a call that was not given up: %v", err)
						return
					}
					clear(memory[:large]) // a reader may
				})
			}
			synctest.Wait()
			if n := a.requests() + b.requests() - before; n != 1 {
				t.Errorf("%d requests for one block", n)
			}
			cancel()
			group.Wait()
			if n := a.requests() + b.requests() - before; n > 3 { // and a probe
				t.Errorf("%d requests for one block that was given up once", n)
			}
		})
	}
}

// TestNone has no sources at all.
func TestNone(t *testing.T) {
	simulate(t, pool.Options{}, nil, func(t *testing.T, p *pool.Pool) {
		if err := get(t.Context(), p, 1, large); err == nil || errors.Is(err, eris.ErrNotFound) {
			t.Errorf("without sources: %v", err)
		}
	})
}

// TestState checks that a later process knows what an earlier one has learnt.
func TestState(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	fresh := func() []pool.Member {
		return sources(&fake{roundTrip: 100e6, rate: 50e6}, &fake{roundTrip: 20e6, rate: 5e6})
	}
	list := fresh()
	simulate(t, pool.Options{State: sourcestate.Open(path)}, list, func(t *testing.T, p *pool.Pool) {
		if e := p.Expect(); e.Sources != 2 || e.Known != 0 || e.Rate != 0 {
			t.Errorf("at first: %+v", e)
		}
		readAll(t, p, 3000, large, 512)
	})
	list = fresh()
	simulate(t, pool.Options{}, list, func(t *testing.T, _ *pool.Pool) {
		p := pool.New(list, pool.Options{State: sourcestate.Open(path)})
		defer p.Close()
		e := p.Expect()
		if e.Known != 2 || e.Rate < 40e6 || e.Rate > 70e6 || e.RoundTrip < 15*time.Millisecond || e.RoundTrip > 40*time.Millisecond {
			t.Errorf("the next process expects %+v", e)
		}
		w := p.Window()
		if w.Bytes < 16<<20 || w.Bytes > 32<<20 || w.Requests < 8192 || w.Requests > 16384 {
			t.Errorf("window %+v", w)
		}
		// The far one is known to be worth its delay from the beginning.
		near(t, readAll(t, p, 3000, large, 512), 3000*float64(large)/55e6, 1.2)
	})
}
