// SPDX-License-Identifier: GPL-3.0-or-later

package pool_test

import (
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
)

// prompt is a source that has every block after 20 ms.
type prompt struct {
	name   string
	blocks map[eris.Reference][]byte
}

func (s *prompt) Start(r *fetch.Request) {
	time.AfterFunc(20*time.Millisecond, func() {
		r.Block, r.Err = append(r.Dst[:0], s.blocks[r.Pair.Reference]...), nil
		r.Done(r)
	})
}
func (s *prompt) Cancel(*fetch.Request) {}
func (s *prompt) String() string        { return s.name }
func (s *prompt) Close() error          { return nil }

// A limit of the rate is not silence of the sources: what it holds back has not been requested from
// them.
func TestLimitIsNoSilence(t *testing.T) {
	blocks := map[eris.Reference][]byte{}
	for i := range 100 {
		b := make([]byte, eris.BlockSize32KiB)
		b[0] = byte(i)
		blocks[eris.Sum(b)] = b
	}
	for _, rate := range []int64{300e3, 30e3, 10e3} {
		for _, sources := range []int{1, 2} {
			synctest.Test(t, func(t *testing.T) {
				var members []pool.Member
				for i := range sources {
					members = append(members, pool.Member{Source: &prompt{string(rune('a' + i)), blocks}})
				}
				p := pool.New(members, pool.Options{
					Limiter: ratelimit.New(rate, 0),
					OnRest:  func(source string, err error) { t.Errorf("%d bytes/s: %s rests: %v", rate, source, err) },
				})
				var wait sync.WaitGroup
				var mu sync.Mutex
				var failed error
				for ref := range blocks {
					wait.Add(1)
					p.Start(&fetch.Request{
						Pair: eris.Pair{Reference: ref}, Size: eris.BlockSize32KiB, Dst: make([]byte, 0, eris.BlockSize32KiB),
						Done: func(r *fetch.Request) {
							mu.Lock()
							failed = errors.Join(failed, r.Err)
							mu.Unlock()
							wait.Done()
						},
					})
				}
				wait.Wait()
				if failed != nil {
					t.Errorf("%d bytes/s: %v", rate, failed)
				}
				if err := p.Close(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}
