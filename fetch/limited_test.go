// SPDX-License-Identifier: GPL-3.0-or-later

package fetch_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
)

// scripted is a source that has what its function says.
type scripted struct {
	get    func(ref eris.Reference) ([]byte, error)
	closed bool
}

func (s *scripted) Get(_ context.Context, ref eris.Reference, _ eris.BlockSize, _ []byte) ([]byte, error) {
	return s.get(ref)
}
func (s *scripted) String() string { return "test:" }
func (s *scripted) Close() error   { s.closed = true; return nil }

func TestLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = eris.BlockSize32KiB
		block := make([]byte, size)
		ref := eris.Sum(block)
		s := &scripted{}
		if fetch.Limited(s, nil) != fetch.Source(s) {
			t.Error("a source without a limit is wrapped")
		}
		source := fetch.Limited(s, ratelimit.New(int64(size), int64(size)))
		const count = 10
		for _, test := range []struct {
			name string
			err  error
			want time.Duration
		}{
			{"blocks", nil, (count - 1) * time.Second}, // the first is the burst
			// One waits, and what it waited for is there for the others.
			{"missing", eris.ErrNotFound, time.Second},
			{"failures", errors.New("unreachable"), 0},
			{"wrong bytes", &eris.BlockError{Reference: ref}, (count - 1) * time.Second},
		} {
			start := time.Now()
			s.get = func(eris.Reference) ([]byte, error) { return block, test.err }
			for range count {
				if _, err := source.Get(t.Context(), ref, size, nil); !errors.Is(err, test.err) {
					t.Fatalf("%s: %v", test.name, err)
				}
			}
			if took := time.Since(start); (took - test.want).Abs() > time.Millisecond {
				t.Errorf("%s: %v instead of %v", test.name, took, test.want)
			}
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(errors.New("enough"))
		s.get = func(eris.Reference) ([]byte, error) { t.Error("asked for nobody"); return nil, nil }
		if _, err := source.Get(ctx, ref, size, nil); err == nil || err.Error() != "enough" {
			t.Error(err)
		}
		if source.String() != "test:" || source.Close() != nil || !s.closed {
			t.Error("not the source below")
		}
	})
}
