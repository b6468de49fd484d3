// SPDX-License-Identifier: GPL-3.0-or-later

package content

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var must = testhelp.Must

var bothSizes = []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB}

// getFunc is what a test has a source do.
type getFunc = func(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error)

// openFunc makes a source of a function.
type openFunc func(t testing.TB, get getFunc) fetch.Source

// open makes a source that has a goroutine for each request.
func open(t testing.TB, get getFunc) fetch.Source {
	s := fetch.NewWorkers("test:", 4096, get)
	t.Cleanup(func() { s.Close() })
	return s
}

// openImmediate makes a source whose requests are done before Start returns.
func openImmediate(_ testing.TB, get getFunc) fetch.Source { return immediate{get} }

type immediate struct{ get getFunc }

func (s immediate) Start(r *fetch.Request) {
	r.Block, r.Err = s.get(context.Background(), r.Pair.Reference, r.Size, r.Dst)
	r.Done(r)
}

func (immediate) Cancel(*fetch.Request) {}
func (immediate) String() string        { return "immediate:" }
func (immediate) Close() error          { return nil }

func bothWays(t *testing.T, test func(t *testing.T, open openFunc)) {
	t.Run("workers", func(t *testing.T) { test(t, open) })
	t.Run("immediate", func(t *testing.T) { test(t, openImmediate) })
}

// verified is what a pool does.
func verified(get getFunc) getFunc {
	return func(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
		block, err := get(ctx, ref, size, dst)
		if err == nil {
			err = eris.Verify(ref, block)
		}
		return block, err
	}
}

// counted counts the calls of a function.
func counted(get getFunc, calls *atomic.Int64) getFunc {
	return func(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
		calls.Add(1)
		return get(ctx, ref, size, dst)
	}
}

// delayed takes a time that depends on the reference, so that blocks come in any order.
func delayed(get getFunc, most time.Duration) getFunc {
	return func(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
		time.Sleep(most * time.Duration(ref[0]) / 255)
		return get(ctx, ref, size, dst)
	}
}

// distant takes a round trip for each block, as a way without a bound to its rate.
func distant(get getFunc, roundTrip time.Duration) getFunc {
	return func(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
		time.Sleep(roundTrip)
		return get(ctx, ref, size, dst)
	}
}

// randomContent returns bytes that depend on the seed only.
func randomContent(seed byte, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// mustEncode encodes content into a store of its own, and says how many blocks it has.
func mustEncode(t testing.TB, content []byte, options eris.EncodeOptions) (eris.ReadCapability, *sourcetest.Backend) {
	t.Helper()
	backend := sourcetest.NewBackend()
	capability, err := eris.Encode(t.Context(), bytes.NewReader(content), backend.Put, options)
	must(t, err)
	return capability, backend
}

// library is many contents in one store.
type library struct {
	*sourcetest.Backend
	contents [][]byte
	wants    []Want
}

// newLibrary encodes contents of the given lengths, in the recommended block size if size is 0.
func newLibrary(t testing.TB, size eris.BlockSize, lengths ...int) *library {
	l := &library{Backend: sourcetest.NewBackend()}
	for i, n := range lengths {
		content := randomContent(byte(i), n)
		capability, err := eris.Encode(t.Context(), bytes.NewReader(content), l.Put, eris.EncodeOptions{BlockSize: size})
		must(t, err)
		l.contents = append(l.contents, content)
		l.wants = append(l.wants, Want{Capability: capability, Limit: int64(n)})
	}
	return l
}

// check reads all contents, and compares them.
func (l *library) check(t *testing.T, source fetch.Source, window fetch.Window) {
	t.Helper()
	n := 0
	err := readSequence(t.Context(), source, l.wants, 1<<40, window, func(content []byte) {
		if !bytes.Equal(content, l.contents[n]) {
			t.Errorf("content %d: wrong bytes", n)
		}
		n++
	})
	if err != nil || n != len(l.wants) {
		t.Errorf("%d contents instead of %d, error %v", n, len(l.wants), err)
	}
}

// readSequence reads all contents of a sequence, and calls each with its bytes if it is not nil.
func readSequence(ctx context.Context, source fetch.Source, wants []Want, total int64, window fetch.Window, each func(content []byte)) error {
	s := NewSequence(ctx, source, slices.Values(wants), total, window)
	defer s.Close()
	var content []byte
	for {
		size, err := s.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		content = content[:0]
		n := int64(0)
		for {
			leaf, err := s.Leaf()
			if err == io.EOF {
				break
			}
			if err != nil {
				return err
			}
			if n += int64(len(leaf.Bytes)); n > size {
				return fmt.Errorf("a content is longer than its size of %d", size)
			}
			if each != nil {
				content = append(content, leaf.Bytes...)
			}
			leaf.Release()
		}
		if n != size {
			return fmt.Errorf("a content has %d bytes instead of %d", n, size)
		}
		if each != nil {
			each(content)
		}
	}
}

// readAll reads a whole content, in order, with Read.
func readAll(ctx context.Context, source fetch.Source, capability eris.ReadCapability, limit int64, window fetch.Window) ([]byte, error) {
	r, err := Open(ctx, source, capability, limit, window)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err == nil && int64(len(b)) != r.Size() {
		err = fmt.Errorf("read %d bytes of a content of %d", len(b), r.Size())
	}
	return b, err
}

// errorKind says which of the kinds of the package comment an error is of.
func errorKind(err error) string {
	switch {
	case err == nil:
		return ""
	case errors.As(err, new(*eris.BlockError)):
		return "block"
	case errors.As(err, new(*Error)):
		return "content"
	case errors.Is(err, eris.ErrNotFound):
		return "missing"
	}
	return "other"
}
