// SPDX-License-Identifier: GPL-3.0-or-later

package pool_test

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
)

// delayed is a store in memory at the end of a long line of any rate.
type delayed struct {
	*memory
	roundTrip time.Duration
}

func (d delayed) String() string { return "delayed:" }
func (d delayed) Close() error   { return nil }
func (d delayed) Get(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	time.Sleep(d.roundTrip)
	return d.memory.Get(ctx, ref, size, dst)
}

// TestBurst reads thousands of small files over a long line, in the window that the pool proposes, and counts round trips. Those
// of one block need one, and others a few, one after the other; all files together should need little more than that, and what it
// takes to have all blocks in flight once.
func TestBurst(t *testing.T) {
	const files = 5000
	for _, v := range []struct {
		name    string
		largest int // length in bytes
		depth   int // round trips that one file needs: the nodes from the root to the last leaf, and the other leaves
	}{
		{"of one block", 1000, 1},
		{"of up to 4 KiB", 4000, 3},
		{"of up to 16 KiB", 16000, 3},
	} {
		t.Run(v.name, func(t *testing.T) {
			m := newMemory()
			random := rand.New(rand.NewPCG(1, 2))
			var wants []eris.Want
			for range files {
				content := make([]byte, 1+random.IntN(v.largest))
				for i := range content {
					content[i] = byte(random.Uint32())
				}
				c, err := eris.Encode(t.Context(), bytes.NewReader(content), m, eris.EncodeOptions{})
				if err != nil {
					t.Fatal(err)
				}
				wants = append(wants, eris.Want{Capability: c, Limit: int64(v.largest)})
			}
			synctest.Test(t, func(t *testing.T) {
				const roundTrip = 100 * time.Millisecond
				p := pool.New([]fetch.Source{delayed{m, roundTrip}}, pool.Options{})
				defer p.Close()
				w := p.Window()
				begin := time.Now()
				s := eris.NewSequence(t.Context(), p, slices.Values(wants), 1<<40, w)
				defer s.Close()
				n := 0
				for ; ; n++ {
					if _, err := s.Next(); err == io.EOF {
						break
					} else if err != nil {
						t.Fatal(err)
					}
					for {
						leaf, err := s.Leaf()
						if err == io.EOF {
							break
						} else if err != nil {
							t.Fatal(err)
						}
						leaf.Release()
					}
				}
				if n != files {
					t.Errorf("read %d files", n)
				}
				trips := time.Since(begin).Seconds() / roundTrip.Seconds()
				blocks := len(m.blocks)
				least := float64(blocks)/float64(w.Requests) + float64(v.depth)
				t.Logf("%d blocks in %.1f round trips; %.1f would do with %d requests at a time", blocks, trips, least, w.Requests)
				if trips > 1.5*least+1 {
					t.Errorf("%.1f round trips instead of %.1f", trips, least)
				}
			})
		})
	}
}
