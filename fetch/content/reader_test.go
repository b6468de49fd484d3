// SPDX-License-Identifier: GPL-3.0-or-later

package content

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

func TestReader(t *testing.T) {
	content := randomContent(2, 70_000)
	capability, backend := mustEncode(t, content, eris.EncodeOptions{BlockSize: eris.BlockSize1KiB})
	begin := func() *Reader {
		r, err := Open(t.Context(), open(t, backend.Get), capability, int64(len(content)), fetch.Window{Requests: 4})
		must(t, err)
		if r.Size() != int64(len(content)) {
			t.Errorf("size %d", r.Size())
		}
		return r
	}
	r := begin()
	must(t, iotest.TestReader(r, content))
	if n, err := r.Read(make([]byte, 5)); n != 0 || err != io.EOF {
		t.Errorf("behind the end: %d, %v", n, err)
	}
	if b, err := r.Peek(5); len(b) != 0 || err != nil {
		t.Errorf("behind the end: %q, %v", b, err)
	}
	r.Close()

	r = begin()
	for _, n := range []int{0, 32, 1 << 20} {
		if b, err := r.Peek(n); err != nil || !bytes.Equal(b, content[:min(n, 1024)]) {
			t.Errorf("looked at %d bytes, got %d, %v", n, len(b), err)
		}
	}
	if b, err := io.ReadAll(r); err != nil || !bytes.Equal(b, content) {
		t.Errorf("having looked: %d bytes, %v", len(b), err)
	}
	r.Close()

	r = begin()
	r.Close()
	if _, err := r.Read(make([]byte, 5)); err == nil || err == io.EOF {
		t.Errorf("closed: %v", err)
	}
}

// TestRoundTrips counts how many round trips it takes until a content can be read: one for each
// level of the tree and one for leaves, since both sides of the tree are gone down at the same
// time; and fewer than as many again until all of it is there, if the window is large enough. Until
// somebody reads, nothing but the two sides is fetched.
func TestRoundTrips(t *testing.T) {
	const roundTrip = time.Second
	for _, length := range []int{0, 10, 5_000, 100_000, 500_000} {
		content := randomContent(3, length)
		capability, backend := mustEncode(t, content, eris.EncodeOptions{BlockSize: eris.BlockSize1KiB})
		levels := capability.Level
		synctest.Test(t, func(t *testing.T) {
			var calls atomic.Int64
			source := open(t, counted(distant(backend.Get, roundTrip), &calls))
			begin := time.Now()
			check := func(what string, most int) {
				t.Helper()
				if n := int(time.Since(begin) / roundTrip); n > most {
					t.Errorf("%d bytes, level %d: %s took %d round trips", length, levels, what, n)
				}
			}
			r, err := Open(t.Context(), source, capability, int64(length), fetch.Window{Requests: 4096})
			must(t, err)
			defer r.Close()
			check("opening", levels+1)
			if b, err := r.Peek(32); err != nil || !bytes.Equal(b, content[:min(32, length)]) {
				t.Fatalf("%q, %v", b, err)
			}
			check("the first leaf", levels+1)
			time.Sleep(10 * roundTrip)
			if n := int(calls.Load()); n != 2*levels+1 {
				t.Errorf("%d bytes, level %d: opening fetched %d blocks", length, levels, n)
			}
			begin = begin.Add(10 * roundTrip)
			if n, err := io.Copy(io.Discard, r); err != nil || n != int64(length) {
				t.Fatal(n, err)
			}
			// Nodes at one level are requested when those above have come.
			check("the whole", 2*levels+1)
			if n := int(calls.Load()); n != len(backend.All()) {
				t.Errorf("%d bytes: %d requests for %d blocks", length, n, len(backend.All()))
			}
		})
	}
}

// BenchmarkSequence reads contents of several sizes from a source in memory.
func BenchmarkSequence(b *testing.B) {
	for _, test := range []struct {
		name    string
		lengths []int
	}{
		{"1KiB", []int{16 << 20}},
		{"32KiB", []int{64 << 20}},
		{"10000 small", make([]int, 10000)},
	} {
		var size eris.BlockSize
		if test.name == "1KiB" {
			size = eris.BlockSize1KiB
		}
		l := newLibrary(b, size, test.lengths...)
		blocks := l.All()
		get := func(_ context.Context, ref eris.Reference, _ eris.BlockSize, _ []byte) ([]byte, error) {
			if block, ok := blocks[ref]; ok {
				return block, nil
			}
			return nil, fmt.Errorf("test: %w", eris.ErrNotFound)
		}
		b.Run(test.name, func(b *testing.B) {
			b.ReportAllocs()
			var n int64
			for _, content := range l.contents {
				n += int64(max(1024, len(content)))
			}
			b.SetBytes(n)
			for b.Loop() {
				must(b, readSequence(b.Context(), openImmediate(b, get), l.wants, 1<<40, fetch.Window{}, nil))
			}
		})
	}
}
