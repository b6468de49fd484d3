// SPDX-License-Identifier: GPL-3.0-or-later

package pool_test

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/sourcestate"
)

// TestGiveUp has a reader give up sources after a while, because they are slow, far, or have
// stalled: that takes no time, little has been asked for that is of no use, and others go on.
func TestGiveUp(t *testing.T) {
	for name, fakes := range map[string][]*fake{
		"slow":   {{roundTrip: 20e6, rate: 200e3}},
		"stalls": {{roundTrip: 20e6, rate: 20e6, answer: stallsAfter(64)}},
		"far":    {{roundTrip: 1e9, rate: 1e6}},
		"two":    {{roundTrip: 1e9, rate: 1e6}, {roundTrip: 1e9, rate: 1e6}},
	} {
		t.Run(name, func(t *testing.T) {
			simulate(t, pool.Options{}, sources(fakes...), func(t *testing.T, p *pool.Pool) {
				ctx, cancel := context.WithCancelCause(t.Context())
				given := errors.New("given up")
				var group sync.WaitGroup
				for i := range 512 {
					group.Go(func() {
						if err := get(ctx, p, i, large); err != nil && !errors.Is(err, given) {
							t.Errorf("block %d: %v", i, err)
						}
					})
				}
				time.Sleep(1500 * time.Millisecond)
				begin := time.Now()
				cancel(given)
				group.Wait()
				if took := time.Since(begin); took > 0 {
					t.Errorf("requests ended %v after they were given up", took)
				}
				if asked := int64(fakes[0].requests()) * int64(large); name == "slow" && asked-p.Stats()[0].Bytes > 3<<20 {
					t.Errorf("%d bytes were asked for in vain", asked-p.Stats()[0].Bytes)
				}
				time.Sleep(time.Minute) // until what was asked for has gone by
				if err := get(t.Context(), p, 1000, large); err != nil && name != "stalls" {
					t.Error(err)
				}
			})
		})
	}
}

// TestLimit checks that a limit of the rate is kept, and not taken for silence of the sources: what
// it holds back has not been requested from them.
func TestLimit(t *testing.T) {
	for _, rate := range []int64{300e3, 30e3, 10e3} {
		for n := 1; n <= 2; n++ {
			synctest.Test(t, func(t *testing.T) {
				p := pool.New(sources(&fake{roundTrip: 20e6}, &fake{roundTrip: 20e6})[:n], pool.Options{
					Limiter: ratelimit.New(rate, 0),
					OnRest:  func(source string, err error) { t.Errorf("%d bytes/s: %s rests: %v", rate, source, err) },
				})
				near(t, readAll(t, p, 100, large, 100), 99*float64(large)/float64(rate), 1.02)
				p.Close()
			})
		}
	}
	// What does not come does not count.
	synctest.Test(t, func(t *testing.T) {
		p := pool.New(sources(&fake{roundTrip: 1e6, answer: missing}), pool.Options{Limiter: ratelimit.New(30e3, 0)})
		defer p.Close()
		begin := time.Now()
		for i := range 100 {
			get(t.Context(), p, i, large)
		}
		if took := time.Since(begin); took > time.Second {
			t.Errorf("100 blocks that are missing took %v", took)
		}
	})
}

// TestSilent has sources that accept and stay silent, from the beginning or after some blocks: it
// is noticed once, in time, and the next process knows it.
func TestSilent(t *testing.T) {
	for _, v := range []struct {
		name   string
		near   bool
		works  int64         // so many requests are answered
		most   time.Duration // that everything takes
		others []*fake
	}{
		{name: "alone", most: 2 * time.Second},
		{name: "alone in the middle", works: 100, most: 5 * time.Second},
		{name: "beside another", most: 2 * time.Second, others: []*fake{{roundTrip: 20e6}}},
		{name: "near", near: true, most: 2 * time.Second, others: []*fake{{roundTrip: 20e6}}},
		{name: "near in the middle", near: true, works: 100, most: 5 * time.Second, others: []*fake{{roundTrip: 20e6}}},
	} {
		t.Run(v.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "state")
			silent := &fake{name: "silent", roundTrip: 1e6, answer: stallsAfter(v.works)}
			for process := range 2 {
				list := append(sources(silent), sources(v.others...)...)
				list[0].Near = v.near
				var told []string
				synctest.Test(t, func(t *testing.T) {
					p := pool.New(list, pool.Options{
						State:  sourcestate.Open(path),
						OnRest: func(source string, err error) { told = append(told, source) },
					})
					begin := time.Now()
					for i := range 200 { // one after the other
						err := get(t.Context(), p, i, 1024)
						if err != nil && (v.others != nil || errors.Is(err, eris.ErrNotFound) || strings.Count(err.Error(), "silent") != 1) {
							t.Errorf("block %d: %v", i, err)
						}
					}
					took := time.Since(begin) - time.Duration(len(v.others))*200*20*time.Millisecond
					if took > v.most || process > 0 && took > 0 {
						t.Errorf("process %d took %v", process, took)
					}
					if e := p.Expect(); e.Sources != len(v.others) {
						t.Errorf("process %d expects %+v", process, e)
					}
					if process == 0 && v.works == 0 { // and a process that is killed has told
						synctest.Wait()
						if r := sourcestate.Open(path).Get("silent"); r.Rests == 0 {
							t.Errorf("the state says %+v", r)
						}
					}
					p.Close()
				})
				if len(told) != 1-process {
					t.Errorf("process %d was told of %v", process, told)
				}
				v.works = 0
			}
		})
	}
}

// TestStopsBesideMissing has the only source that has a block stop: that another one does not have
// it means nothing, and it may be had later.
func TestStopsBesideMissing(t *testing.T) {
	list := sources(&fake{roundTrip: 20e6, rate: 20e6, answer: stallsAfter(64)}, &fake{roundTrip: 20e6, answer: missing})
	simulate(t, pool.Options{}, list, func(t *testing.T, p *pool.Pool) {
		readAll(t, p, 64, large, 16)
		err := get(t.Context(), p, 1000, large)
		if busy, ok := errors.AsType[*fetch.BusyError](err); !ok || busy.After <= 0 || errors.Is(err, eris.ErrNotFound) {
			t.Errorf("the error is %v", err)
		}
	})
}

// TestStopsPatient has the only source stop in the middle, in silence or with an error, when
// nothing else can have what is wanted: it is waited for, but not for ever.
func TestStopsPatient(t *testing.T) {
	for _, name := range []string{"silent", "fails"} {
		t.Run(name, func(t *testing.T) {
			var stops atomic.Bool
			f := &fake{roundTrip: 20e6, rate: 20e6, answer: func(ctx context.Context, _ int, _ int64) error {
				for stops.Load() {
					if name == "fails" {
						return errors.New("refused")
					}
					select {
					case <-time.After(100 * time.Millisecond):
					case <-ctx.Done():
						return context.Cause(ctx)
					}
				}
				return nil
			}}
			simulate(t, pool.Options{Patient: true}, sources(f), func(t *testing.T, p *pool.Pool) {
				readAll(t, p, 64, large, 16)
				stops.Store(true)
				time.AfterFunc(12*time.Second, func() { stops.Store(false) })
				readAll(t, p, 64, large, 16)
				stops.Store(true)
				for i, most := range []time.Duration{20 * time.Second, time.Second} {
					begin := time.Now()
					err := get(t.Context(), p, 1000, large)
					if took := time.Since(begin); err == nil || took > most {
						t.Errorf("request %d after it has gone: %v after %v", i, err, took)
					}
				}
			})
		})
	}
}

// TestStopsForGood has the only source fail from some time on: that it is tried again and again is
// no sign that blocks may be had later.
func TestStopsForGood(t *testing.T) {
	for _, refusal := range []error{errBroken, &fetch.BusyError{Err: errBroken}} {
		f := &fake{roundTrip: 20e6, rate: 20e6, answer: func(_ context.Context, n int, _ int64) error {
			if n <= 64 {
				return nil
			}
			return refusal
		}}
		simulate(t, pool.Options{}, sources(f), func(t *testing.T, p *pool.Pool) {
			readAll(t, p, 64, large, 16)
			for i := range 20 {
				err := get(t.Context(), p, 1000, large)
				if _, busy := errors.AsType[*fetch.BusyError](err); err == nil || busy != (i < 10) && (i < 10 || i > 16) {
					t.Errorf("after %d s the error is %v", i, err)
				}
				time.Sleep(time.Second)
			}
		})
	}
}

// TestReturn has the only source be silent for a while: it is tried by single requests nobody waits
// for, and is then in use again.
func TestReturn(t *testing.T) {
	var silent atomic.Bool
	f := &fake{roundTrip: 20e6, answer: func(ctx context.Context, _ int, i int64) error {
		if silent.Load() {
			return hang(ctx, 0, i)
		}
		return nil
	}}
	simulate(t, pool.Options{}, sources(f), func(t *testing.T, p *pool.Pool) {
		readAll(t, p, 100, 1024, 10)
		silent.Store(true)
		for range 100 {
			get(t.Context(), p, 1000, 1024)
		}
		before := f.requests()
		for i := range 100 {
			begin := time.Now()
			if err := get(t.Context(), p, 2000+i, 1024); err == nil || time.Since(begin) > 300*time.Millisecond {
				t.Errorf("while it is silent: %v after %v", err, time.Since(begin))
			}
			time.Sleep(time.Second)
		}
		if n := f.requests() - before; n < 2 || n > 10 {
			t.Errorf("it was tried %d times in 100 s", n)
		}
		silent.Store(false)
		for range 100 {
			p.Probe(eris.Pair{Reference: reference(1, 1024)}, 1024)
			time.Sleep(time.Second)
		}
		if e := p.Expect(); e.Sources != 1 {
			t.Errorf("after it has returned: %+v", e)
		}
		readAll(t, p, 100, 1024, 10)
		// Whoever asks first when it may have returned has the block.
		silent.Store(true)
		for range 10 {
			get(t.Context(), p, 1000, 1024)
		}
		silent.Store(false)
		time.Sleep(time.Minute)
		readAll(t, p, 100, 1024, 1)
	})
}

// forgetful is a source whose connection dies after some answers, of which nobody is told.
type forgetful struct {
	*fake
	answered, renewed atomic.Int64
}

func (f *forgetful) Renew() {
	f.renewed.Add(1)
	f.answered.Store(0)
}

// TestRenew has the only source answer nothing more on its connections: it is asked on new ones,
// but not as long as it has never answered.
func TestRenew(t *testing.T) {
	for _, most := range []int64{100, 0} {
		f := &forgetful{fake: &fake{roundTrip: 20e6}}
		f.answer = func(ctx context.Context, n int, i int64) error {
			if f.answered.Add(1) > most {
				return hang(ctx, n, i)
			}
			return nil
		}
		list := sources(f.fake)
		list[0].Source = f
		simulate(t, pool.Options{}, list, func(t *testing.T, p *pool.Pool) {
			failed := 0
			for i := range 150 {
				if err := get(t.Context(), p, i, 1024); err != nil {
					failed++
					time.Sleep(2 * time.Second)
				}
			}
			if renewed := f.renewed.Load(); renewed != min(most, 1) || most > 0 && failed > 1 {
				t.Errorf("after %d answers: %d times new connections, %d blocks failed", most, renewed, failed)
			}
		})
	}
}

// TestSlow has sources that are slow but not silent.
func TestSlow(t *testing.T) {
	for name, f := range map[string]*fake{
		"a block a second": {roundTrip: 20e6, rate: 32 << 10},
		"200 kB/s":         {roundTrip: 20e6, rate: 200e3},
		"far":              {roundTrip: 1300e6, rate: 1e6},
	} {
		t.Run(name, func(t *testing.T) {
			simulate(t, pool.Options{}, sources(f), func(t *testing.T, p *pool.Pool) {
				readAll(t, p, 100, large, 64)
			})
		})
	}
	// Two that share a line, from each of which a block comes in parts for four seconds.
	list := sources(&fake{roundTrip: 20e6, rate: 8 << 10}, &fake{roundTrip: 20e6, rate: 8 << 10})
	for i := range list {
		list[i].Source = &moving{Source: list[i].Source}
	}
	rests := func(source string, err error) { t.Errorf("%s rests: %v", source, err) }
	simulate(t, pool.Options{OnRest: rests}, list, func(t *testing.T, p *pool.Pool) {
		near(t, readAll(t, p, 20, large, 64), 40, 1.3)
	})
}

// TestManySilent has many sources that accept and stay silent before a good one: together they cost
// not much more than one.
func TestManySilent(t *testing.T) {
	var all []*fake
	for range 16 {
		all = append(all, &fake{answer: hang})
	}
	all = append(all, &fake{roundTrip: 20e6})
	simulate(t, pool.Options{}, sources(all...), func(t *testing.T, p *pool.Pool) {
		begin := time.Now()
		if err := get(t.Context(), p, 0, 1024); err != nil || time.Since(begin) > 2*time.Second {
			t.Errorf("the first block took %v (%v)", time.Since(begin), err)
		}
		begin = time.Now()
		if readAll(t, p, 100, 1024, 64); time.Since(begin) > time.Second {
			t.Errorf("others took %v", time.Since(begin))
		}
	})
}

// TestCrawls has a store from which a block takes half a minute, the first of 1 KiB excepted: with
// another one about which nothing is known, it is given up in seconds; alone, it is waited for.
func TestCrawls(t *testing.T) {
	for _, v := range []struct {
		name   string
		near   bool
		others []*fake
		most   time.Duration
	}{
		{"near", true, []*fake{{roundTrip: 20e6}}, 5 * time.Second},
		{"near, and one that is silent", true, []*fake{{answer: hang}, {roundTrip: 20e6}}, 10 * time.Second},
		{"far", false, []*fake{{roundTrip: 20e6}}, 5 * time.Second},
		{"alone", false, nil, 40 * time.Second},
	} {
		t.Run(v.name, func(t *testing.T) {
			list := append(sources(&fake{name: "crawls", roundTrip: 1e6, rate: 1 << 10}), sources(v.others...)...)
			list[0].Near = v.near
			simulate(t, pool.Options{}, list, func(t *testing.T, p *pool.Pool) {
				must(t, get(t.Context(), p, 0, 1024))
				begin := time.Now()
				must(t, get(t.Context(), p, 1, large))
				if took := time.Since(begin); took > v.most {
					t.Errorf("it took %v", took)
				}
			})
		})
	}
}

// moving is a source that tells how many bytes have come of blocks that are not whole.
type moving struct {
	fetch.Source
	bytes atomic.Int64
}

func (m *moving) Progress() int64 { return m.bytes.Add(1 << 10) } // 100 KiB/s

// TestParts has the only store give parts of a block for some seconds, or for ever, before the
// block: the line is slow then, and the store not silent; but not for ever.
func TestParts(t *testing.T) {
	slow := func(context.Context, int, int64) error { time.Sleep(6 * time.Second); return nil }
	for _, v := range []struct {
		answer func(ctx context.Context, n int, i int64) error
		good   bool
		most   time.Duration
	}{{slow, true, 7 * time.Second}, {hang, false, 35 * time.Second}} {
		list := sources(&fake{answer: v.answer})
		list[0].Source = &moving{Source: list[0].Source}
		simulate(t, pool.Options{}, list, func(t *testing.T, p *pool.Pool) {
			begin := time.Now()
			err := get(t.Context(), p, 1, large)
			if took := time.Since(begin); took > v.most || (err == nil) != v.good {
				t.Errorf("it took %v, error %v", took, err)
			}
		})
	}
}

// modem is a source whose line never rests.
type modem struct {
	*fake
	begin func() time.Time
}

func (m *modem) Progress() int64 { return int64(time.Since(m.begin()).Seconds() * m.rate) }

// TestModem asks for more than comes in half a minute at once, by a line that small blocks have
// made look fast: one block comes after the other, and none is given up.
func TestModem(t *testing.T) {
	f := &fake{roundTrip: 600e6, rate: 7e3}
	list := sources(f)
	list[0].Source = &modem{f, sync.OnceValue(time.Now)}
	simulate(t, pool.Options{}, list, func(t *testing.T, p *pool.Pool) {
		readAll(t, p, 3, 1024, 1)
		readAll(t, p, 30, large, 30)
		if n := f.requests(); n != 3+30 {
			t.Errorf("%d requests for %d blocks", n, 3+30)
		}
	})
}

// TestPartsBesideFast has a much faster store beside one that gives parts of a block: that is
// waited for all the same if the other does not have the block.
func TestPartsBesideFast(t *testing.T) {
	const last = 1000
	slow := &fake{roundTrip: 50e6, rate: 1e6, answer: func(_ context.Context, n int, _ int64) error {
		if n == last {
			time.Sleep(6 * time.Second)
		}
		return nil
	}}
	fast := &fake{roundTrip: 20e6, rate: 20e6, answer: func(ctx context.Context, n int, i int64) error {
		if n == last {
			return eris.ErrNotFound
		}
		return nil
	}}
	list := sources(slow, fast)
	list[0].Source = &moving{Source: slow}
	simulate(t, pool.Options{}, list, func(t *testing.T, p *pool.Pool) {
		readAll(t, p, last, large, 128)
		if err := get(t.Context(), p, last, large); err != nil {
			t.Error(err)
		}
	})
}

// turns is one of three sources behind a slow line, on which each has its turn of some seconds.
type turns struct {
	fetch.Source
	nth   time.Duration
	begin func() time.Time
}

func (s *turns) Progress() int64 {
	const turn = 2500 * time.Millisecond
	gone := time.Since(s.begin())
	mine := gone/(3*turn)*turn + min(max(0, gone%(3*turn)-s.nth*turn), turn)
	return int64(mine.Seconds() * (8 << 10))
}

// TestOneLine has three sources, of which nothing is known, behind one slow line: parts that come
// from one say that the others are not silent.
func TestOneLine(t *testing.T) {
	slow := func(context.Context, int, int64) error { time.Sleep(12 * time.Second); return nil }
	list := sources(&fake{answer: slow}, &fake{answer: slow}, &fake{answer: slow})
	for i := range list {
		list[i].Source = &turns{list[i].Source, time.Duration(i), sync.OnceValue(time.Now)}
	}
	simulate(t, pool.Options{}, list, func(t *testing.T, p *pool.Pool) {
		must(t, get(t.Context(), p, 1, large))
	})
}

// TestPatient gets blocks from stores that are seconds away, when nothing else has them: silent
// ones beside them change nothing, and are not waited for where another one works.
func TestPatient(t *testing.T) {
	for _, v := range []struct {
		patient, local bool
		fakes          []*fake
		most           time.Duration
		works          bool
	}{
		{false, false, []*fake{{roundTrip: 5e9}}, 2 * time.Second, false},
		{true, false, []*fake{{roundTrip: 5e9}}, 11 * time.Second, true},
		{true, true, []*fake{{roundTrip: 5e9}}, 11 * time.Second, true}, // which is being started
		{true, false, []*fake{{answer: hang}, {roundTrip: 5e9}}, 12 * time.Second, true},
		{true, false, []*fake{{answer: hang}}, 16 * time.Second, false},
		{true, false, []*fake{{answer: hang}, {roundTrip: 20e6}}, time.Second, true},
		{true, true, []*fake{{answer: hang}, {roundTrip: 20e6}}, time.Second, true},
	} {
		list := sources(v.fakes...)
		list[0].Near = v.local
		simulate(t, pool.Options{Patient: v.patient}, list, func(t *testing.T, p *pool.Pool) {
			begin := time.Now()
			for i := range 2 {
				if err := get(t.Context(), p, i, large); (err == nil) != v.works {
					t.Errorf("%+v: error %v", v, err)
				}
			}
			if took := time.Since(begin); took > v.most {
				t.Errorf("%+v: took %v", v, took)
			}
		})
	}
}

// TestKnownAlone has the only store, which an earlier process knew, take a second for its first
// answer, as where its machine has something else to do, or starts it: it is not given up.
func TestKnownAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	synctest.Test(t, func(t *testing.T) {
		for _, answer := range []func(context.Context, int, int64) error{
			nil, func(context.Context, int, int64) error { time.Sleep(time.Second); return nil },
		} {
			list := sources(&fake{roundTrip: 20e6, rate: 20e6, answer: answer})
			p := pool.New(list, pool.Options{State: sourcestate.Open(path)})
			readAll(t, p, 64, large, 16)
			must(t, p.Close())
		}
	})
}

// TestLostBesideParts has a request be lost that others overtake: it is made again soon, although
// parts of others come all the time.
func TestLostBesideParts(t *testing.T) {
	f := &fake{roundTrip: 50e6, rate: 1e6}
	lost := false
	f.answer = func(ctx context.Context, n int, _ int64) error {
		if n == 300 && !lost {
			lost = true
			return hang(ctx, n, 0)
		}
		return nil
	}
	list := sources(f)
	list[0].Source = &moving{Source: f}
	simulate(t, pool.Options{}, list, func(t *testing.T, p *pool.Pool) {
		readAll(t, p, 100, large, 8) // so that it is known
		ended := make(chan time.Duration, 1)
		go func() {
			begin := time.Now()
			if err := get(t.Context(), p, 300, large); err != nil {
				t.Error(err)
			}
			ended <- time.Since(begin)
		}()
		for i := range 250 { // ten seconds
			must(t, get(t.Context(), p, i, large))
		}
		if took := <-ended; took > 6*time.Second {
			t.Errorf("it took %v", took)
		}
	})
}

// TestRoundTrip checks that the round trip that is learnt is that of the line, not what waits in
// it, and that it does not count for long that a store was slow.
func TestRoundTrip(t *testing.T) {
	for _, roundTrip := range []time.Duration{5e6, 20e6, 100e6} {
		f := &fake{roundTrip: roundTrip, rate: 200e3}
		path := filepath.Join(t.TempDir(), "state")
		synctest.Test(t, func(t *testing.T) {
			p := pool.New(sources(f), pool.Options{State: sourcestate.Open(path)})
			readAll(t, p, 1000, large, 512)
			learnt := p.Stats()[0].RoundTrip
			if learnt > 2*roundTrip || learnt < roundTrip/2 {
				t.Errorf("learnt %v instead of %v", learnt, roundTrip)
			}
			if e := p.Expect(); e.Known != 1 || e.Rate > 210e3 || e.Rate < 190e3 {
				t.Errorf("expects %+v", e)
			}
			p.Close()
			for _, later := range []time.Duration{time.Minute, time.Hour} {
				time.Sleep(later)
				p = pool.New(sources(f), pool.Options{State: sourcestate.Open(path)})
				if e := p.Expect(); e.Sources != 1 || e.Known != 0 && later == time.Hour || e.Known != 1 && later == time.Minute {
					t.Errorf("after %v: %+v", later, e)
				}
				p.Close()
			}
			// What is measured then counts at once.
			f.rate = 20e6
			p = pool.New(sources(f), pool.Options{State: sourcestate.Open(path)})
			readAll(t, p, 1000, large, 512)
			p.Close()
			if r := sourcestate.Open(path).Get("fake:0"); r.Rate < 15e6 {
				t.Errorf("the state says %+v", r)
			}
		})
	}
}

// kept is a near store.
type kept struct {
	*fake
	mu     sync.Mutex
	blocks map[eris.Reference]bool
}

func (k *kept) Put(_ context.Context, ref eris.Reference, block []byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if eris.Verify(ref, block) != nil {
		return errors.New("wrong block")
	}
	k.blocks[ref] = true
	return nil
}

// cache is a near store that keeps many blocks at a time, and may be in error.
type cache struct{ *kept }

func (c cache) Keep(ctx context.Context, refs []eris.Reference, blocks [][]byte) error {
	for i, ref := range refs {
		if err := c.Put(ctx, ref, blocks[i]); err != nil {
			return err
		}
	}
	return nil
}

// TestSlowCache gets blocks from a far source before a cache has come to look for them, and says
// nothing when it need not any more: it keeps them.
func TestSlowCache(t *testing.T) {
	near := cache{&kept{fake: &fake{name: "cache"}, blocks: map[eris.Reference]bool{}}}
	near.answer = func(ctx context.Context, _ int, _ int64) error {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(time.Second):
			return eris.ErrNotFound
		}
	}
	list := append([]pool.Member{{Source: near, Near: true}}, sources(&fake{roundTrip: 20e6, rate: 20e6})...)
	simulate(t, pool.Options{}, list, func(t *testing.T, p *pool.Pool) {
		readAll(t, p, 20, 1024, 20)
		synctest.Wait()
		if n := len(near.blocks); n != 20 {
			t.Errorf("%d blocks of 20 are kept", n)
		}
	})
}

// TestNear has a near store with a half of the blocks: it is asked for all, and keeps what comes
// from elsewhere, also where that has come before it has said that it does not have it.
func TestNear(t *testing.T) {
	for _, pause := range []time.Duration{0, 50 * time.Millisecond} {
		half := func(_ context.Context, n int, _ int64) error {
			if n%10 == 9 {
				time.Sleep(pause)
			}
			if n%2 == 1 {
				return eris.ErrNotFound
			}
			return nil
		}
		near, far := &kept{fake: &fake{name: "near", answer: half}, blocks: map[eris.Reference]bool{}}, &fake{roundTrip: 20e6, rate: 20e6}
		list := append([]pool.Member{{Source: near, Near: true}}, sources(far)...)
		simulate(t, pool.Options{}, list, func(t *testing.T, p *pool.Pool) {
			const n = 1000
			readAll(t, p, n, 1024, 64)
			if near.requests() != n || far.requests() != n/2 {
				t.Errorf("%d and %d requests", near.requests(), far.requests())
			}
			synctest.Wait()
			for i := range n {
				if kept := near.blocks[reference(i, 1024)]; kept != (i%2 == 1) {
					t.Errorf("pauses of %v: block %d is kept: %v", pause, i, kept)
				}
			}
			// Without it, the others go on.
			near.lies = true
			readAll(t, p, n, 1024, 64)
			if s := p.Stats()[0]; !s.Banned {
				t.Errorf("a near store that lies is %+v", s)
			}
		})
	}
}

var _ fetch.Store = (*kept)(nil)

// TestSilentBesideBusy has a good source be silent for a moment, beside one that mostly wants to be
// asked again later: the good one is tried again although all that is wanted waits for the other.
func TestSilentBesideBusy(t *testing.T) {
	var until atomic.Int64 // nanoseconds since 1970
	busy := &fake{roundTrip: 5e6, rate: 20e6, answer: func(_ context.Context, _ int, i int64) error {
		if i%3 != 2 {
			return &fetch.BusyError{After: time.Second, Err: errBroken}
		}
		return nil
	}}
	good := &fake{roundTrip: 50e6, rate: 20e6, answer: func(ctx context.Context, n int, i int64) error {
		if i == 200 {
			until.Store(time.Now().Add(time.Second).UnixNano())
		}
		if time.Now().UnixNano() < until.Load() {
			return hang(ctx, n, i)
		}
		return nil
	}}
	simulate(t, pool.Options{}, sources(busy, good), func(t *testing.T, p *pool.Pool) {
		if took := readAll(t, p, 500, large, 128); took > 5*time.Second {
			t.Errorf("it takes %v", took)
		}
	})
}
