// SPDX-License-Identifier: GPL-3.0-or-later

package cache

import (
	"context"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
)

// TestConformance runs the suite of sources over a pool with an empty cache.
func TestConformance(t *testing.T) {
	sourcetest.Test(t, func(t *testing.T, backend *sourcetest.Backend) sourcetest.Fixture {
		c := Open(t.TempDir(), 16<<20, func(err error) { t.Error(err) })
		return sourcetest.Fixture{
			Source: pool.New([]pool.Member{{Source: c, Near: true}, {Source: backend.Open(64)}}, pool.Options{}),
			Bans:   true,
			Held:   4,
		}
	})
}

// TestInPool keeps what comes from elsewhere, and gets it from the cache the next time, in place of
// a block that is damaged, too.
func TestInPool(t *testing.T) {
	d := t.TempDir()
	backend := sourcetest.NewBackend()
	const n = 500
	for i := range n {
		ref, block := testBlock(i, mixed(i))
		backend.Set(ref, block)
	}
	for _, want := range []int64{n, 0} {
		c := Open(d, 16<<20, func(err error) { t.Error(err) })
		far := backend.Open(64)
		p := pool.New([]pool.Member{{Source: c, Near: true}, {Source: far}}, pool.Options{})
		for i := range n {
			ref, _ := testBlock(i, mixed(i))
			if _, err := fetch.Get(t.Context(), p, ref, mixed(i), nil); err != nil {
				t.Fatal(err)
			}
		}
		if s := p.Stats()[1]; s.Requests-want > 10 || want-s.Requests > 0 {
			t.Errorf("%d requests instead of %d", s.Requests, want)
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}
	c := Open(d, 16<<20, nil)
	ref, _ := testBlock(1, small)
	_, wrong := testBlock(2, small)
	c.Keep(context.Background(), []eris.Reference{ref}, [][]byte{wrong})
	p := pool.New([]pool.Member{{Source: c, Near: true}, {Source: backend.Open(64)}}, pool.Options{})
	if _, err := fetch.Get(t.Context(), p, ref, small, nil); err != nil || p.Stats()[0].Banned {
		t.Errorf("%v; %+v", err, p.Stats()[0])
	}
	p.Close()
	if !has(t, testOpen(t, d, 16<<20), 1, small) {
		t.Error("the block has not been replaced")
	}
}
