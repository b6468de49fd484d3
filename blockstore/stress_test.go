// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// Many goroutines put and get the same few blocks in a store that has room for a third of them,
// while some give up. What is read is what was put, and the store is consistent in the end.
func TestStress(t *testing.T) {
	s := testOpen(t, t.TempDir(), Options{MaxBytes: MinBytes, queueBytes: 1 << 18, hintBytes: 4096})
	const blocks = 3000
	sizeOf := func(i int) eris.BlockSize {
		if i%100 == 0 {
			return eris.BlockSize32KiB
		}
		return eris.BlockSize1KiB
	}
	var group sync.WaitGroup
	var rounds = 1500
	for worker := range 16 {
		group.Go(func() {
			random := rand.New(rand.NewPCG(uint64(worker), 1))
			buffer := make([]byte, 0, 32<<10)
			for round := range rounds {
				i := random.IntN(blocks)
				ref, block := testBlock(i, sizeOf(i))
				switch {
				case round%4 == 0:
					ctx, cancel := t.Context(), func() {}
					if worker%4 == 3 {
						ctx, cancel = context.WithCancel(ctx)
						go cancel()
					}
					if err := s.Put(ctx, ref, block); err != nil && !errors.Is(err, context.Canceled) {
						t.Error(err)
					}
					cancel()
				default:
					got, err := fetch.Get(t.Context(), s, ref, sizeOf(i), buffer)
					if err == nil {
						err = eris.Verify(ref, got)
					} else if errors.Is(err, eris.ErrNotFound) {
						err = nil
					}
					if err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	group.Wait()
	stats := s.Stats()
	t.Logf("%+v", stats)
	if stats.Damaged != 0 || stats.Failed != 0 || stats.Evicted == 0 || stats.Err != nil {
		t.Errorf("%+v", stats)
	}
	checkStore(t, s)
}

// Calls that are under way while the store is closed either succeed or say so.
func TestCloseWhileBusy(t *testing.T) {
	s := testOpen(t, t.TempDir(), Options{queueBytes: 1 << 16})
	var group sync.WaitGroup
	var mu sync.Mutex
	acknowledged := make(map[eris.Reference]bool)
	for worker := range 64 {
		group.Go(func() {
			for i := range 1000 {
				ref, block := testBlock(worker*1000+i, eris.BlockSize1KiB)
				err := s.Put(context.Background(), ref, block)
				if errors.Is(err, fetch.ErrClosed) {
					return
				} else if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				acknowledged[ref] = true
				mu.Unlock()
				if _, err := fetch.Get(context.Background(), s, ref, eris.BlockSize1KiB, nil); errors.Is(err, fetch.ErrClosed) {
					return
				} else if err != nil {
					t.Error(err)
				}
			}
		})
	}
	for {
		mu.Lock()
		n := len(acknowledged)
		mu.Unlock()
		if time.Sleep(time.Millisecond); n > 200 {
			break
		}
	}
	refs := checkStore(t, s) // closes
	group.Wait()
	for ref := range acknowledged {
		if !refs[ref] {
			t.Errorf("block %v was acknowledged, but is not there", ref)
		}
	}
}
