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

// dead is a source that cannot be reached.
type dead struct{ *fetch.Workers }

func newDead() dead {
	return dead{fetch.NewWorkers(4, func(context.Context, eris.Reference, eris.BlockSize, []byte) ([]byte, error) {
		return nil, errBroken
	})}
}

func (dead) String() string { return "dead:" }

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
