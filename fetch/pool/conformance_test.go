// SPDX-License-Identifier: GPL-3.0-or-later

package pool_test

import (
	"context"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
)

// newDead returns a source that cannot be reached.
func newDead() fetch.Source {
	return fetch.NewWorkers("dead:", 4, func(context.Context, eris.Reference, eris.BlockSize, []byte) ([]byte, error) {
		return nil, errBroken
	})
}

// TestConformance runs the suite of sources over pools.
func TestConformance(t *testing.T) {
	for _, v := range []struct {
		name    string
		options pool.Options
		members func(good fetch.Store) []pool.Member
	}{
		{"one", pool.Options{}, func(good fetch.Store) []pool.Member { return []pool.Member{{Source: good}} }},
		{"limited", pool.Options{Limiter: ratelimit.New(1<<30, 1<<20)}, func(good fetch.Store) []pool.Member {
			return []pool.Member{{Source: good}}
		}},
		{"one of two", pool.Options{}, func(good fetch.Store) []pool.Member {
			return []pool.Member{{Source: newDead()}, {Source: good}}
		}},
		{"behind an empty store", pool.Options{}, func(good fetch.Store) []pool.Member {
			return []pool.Member{{Source: sourcetest.NewBackend().Open(16), Near: true}, {Source: good}}
		}},
		{"a near store", pool.Options{}, func(good fetch.Store) []pool.Member { return []pool.Member{{Source: good, Near: true}} }},
	} {
		t.Run(v.name, func(t *testing.T) {
			sourcetest.Test(t, func(t *testing.T, backend *sourcetest.Backend) sourcetest.Fixture {
				return sourcetest.Fixture{
					Source: pool.New(v.members(backend.Open(64)), v.options),
					Bans:   true,
					Held:   4, // until more is known
				}
			})
		})
	}
}

// instant is a source that takes no time.
type instant struct {
	name   string
	blocks map[eris.Reference][]byte
}

func (s instant) String() string      { return s.name }
func (instant) Close() error          { return nil }
func (instant) Cancel(*fetch.Request) {}
func (s instant) Start(r *fetch.Request) {
	r.Block = s.blocks[r.Pair.Reference]
	r.Done(r)
}

// BenchmarkOverhead measures what the pool takes for a block of 1 KiB, of which verifying it is a
// part: many are asked for at a time.
func BenchmarkOverhead(b *testing.B) {
	const different, window = 8192, 1024
	blocks := map[eris.Reference][]byte{}
	var refs []eris.Reference
	for n := range different {
		block := make([]byte, 1024)
		block[0], block[1] = byte(n), byte(n>>8)
		refs = append(refs, eris.Sum(block))
		blocks[refs[n]] = block
	}
	one, two := instant{"instant:1", blocks}, instant{"instant:2", blocks}
	for name, list := range map[string][]pool.Member{
		"one": {{Source: one}}, "near": {{Source: one, Near: true}}, "two": {{Source: one}, {Source: two}},
	} {
		b.Run(name, func(b *testing.B) {
			p := pool.New(list, pool.Options{})
			defer p.Close()
			done := make(chan *fetch.Request, window)
			for range window {
				done <- &fetch.Request{Size: 1024, Dst: make([]byte, 0, 1024), Done: func(r *fetch.Request) { done <- r }}
			}
			b.ReportAllocs()
			for n := 0; b.Loop(); n++ {
				r := <-done
				if r.Err != nil {
					b.Fatal(r.Err)
				}
				r.Pair.Reference = refs[n%different]
				p.Start(r)
			}
			for range window {
				<-done
			}
		})
	}
}
