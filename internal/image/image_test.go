// SPDX-License-Identifier: GPL-3.0-or-later

package image_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/klauspost/compress/zstd"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/content"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

var must = testhelp.Must

// source opens a store in memory as a source.
func source(t *testing.T, b *sourcetest.Backend) fetch.Source {
	s := b.Open(16)
	t.Cleanup(func() { s.Close() })
	return s
}

// counting counts the requests of a source.
type counting struct {
	fetch.Source
	requests atomic.Int64
}

func (c *counting) Start(r *fetch.Request) {
	c.requests.Add(1)
	c.Source.Start(r)
}

func encode(t *testing.T, content []byte) (fetch.Source, eris.ReadCapability) {
	t.Helper()
	b := sourcetest.NewBackend()
	c, err := eris.Encode(t.Context(), bytes.NewReader(content), b.Put, eris.EncodeOptions{})
	must(t, err)
	return source(t, b), c
}

// hashOf returns the hash of the archive of an image.
func hashOf(t *testing.T, s fetch.Source, c eris.ReadCapability, limits erisfs.Limits) (image.Form, [32]byte, error) {
	t.Helper()
	x, err := image.Open(t.Context(), s, c, limits, fetch.Window{})
	if err != nil {
		return "", [32]byte{}, err
	}
	nodes, closeNodes, err := x.Nodes(t.Context())
	if err != nil {
		return x.Form, [32]byte{}, err
	}
	defer closeNodes()
	sum, _, err := nar.Hash(t.Context(), nodes)
	return x.Form, sum, err
}

// TestForms opens trees in all forms in which others may have encoded them. The archives were made
// by "guix publish".
func TestForms(t *testing.T) {
	const mirror = "../../testdata/guix-mirror/nar"
	items, err := filepath.Glob(mirror + "/*-*")
	if err != nil || len(items) < 10 {
		t.Fatalf("items %v, error %v", items, err)
	}
	limits := erisfs.Limits{NarSize: 1 << 20}
	for _, item := range items {
		plain, err := os.ReadFile(item)
		must(t, err)
		want := sha256.Sum256(plain)
		for form, directory := range map[image.Form]string{"nar": "", "nar.gzip": "gzip", "nar.lzip": "lzip", "nar.zstd": "zstd"} {
			text, err := os.ReadFile(filepath.Join(mirror, directory, filepath.Base(item)))
			must(t, err)
			b, c := encode(t, text)
			if got, hash, err := hashOf(t, b, c, limits); err != nil || got != form || hash != want {
				t.Errorf("%s as %s: form %s, hash %x instead of %x, error %v", item, form, got, hash, want, err)
			}
			// Cut off, it is an error and not a smaller tree.
			b, c = encode(t, text[:len(text)-len(text)/4-1])
			if _, _, err := hashOf(t, b, c, limits); err == nil {
				t.Errorf("%s as %s, cut off, is accepted", item, form)
			}
		}
		b := sourcetest.NewBackend()
		r, err := erisfs.Encode(t.Context(), nar.NewReader(nar.NewReadAhead(t.Context(), bytes.NewReader(plain), 32, 1<<16, 0)), b.Put, erisfs.EncodeOptions{})
		if errors.Is(err, erisfs.ErrNotRepresentable) {
			continue
		}
		must(t, err)
		if got, hash, err := hashOf(t, source(t, b), r.Capability, limits); err != nil || got != image.ERISFS || hash != want {
			t.Errorf("%s as ERIS-FS: form %s, hash %x instead of %x, error %v", item, got, hash, want, err)
		}
	}
}

// TestNoTree opens contents that are no trees, or no good ones.
func TestNoTree(t *testing.T) {
	limits := erisfs.Limits{NarSize: 1 << 20}
	index := "\xda\x65\x72\x69\x74\x82"
	for name, test := range map[string]struct {
		content string
		form    image.Form
	}{
		"empty":            {"", image.Data},
		"text":             {"Hello world!", image.Data},
		"part of a magic":  {index[:5], image.Data},
		"only a magic":     {index, image.ERISFS},
		"version 2":        {index + "\x02\xa0", image.ERISFS},
		"nonsense":         {index + "\x01\xa1" + strings.Repeat("x", 5000), image.ERISFS},
		"only a nar magic": {"\x0d\x00\x00\x00\x00\x00\x00\x00nix-archive-1\x00\x00\x00", image.Nar},
		"only gzip":        {"\x1f\x8b", "nar.gzip"},
		"only zstd":        {"\x28\xb5\x2f\xfd", "nar.zstd"},
		"only lzip":        {"LZIP", "nar.lzip"},
		"xz":               {"\xfd7zXZ\x00", image.Data},
	} {
		b, c := encode(t, []byte(test.content))
		if form, _, err := hashOf(t, b, c, limits); form != test.form || err == nil {
			t.Errorf("%s: form %s instead of %s, error %v", name, form, test.form, err)
		}
	}
	// An index that is too long is not fetched.
	b, c := encode(t, []byte(index+strings.Repeat("x", 6<<20)))
	if _, err := image.Open(t.Context(), b, c, limits, fetch.Window{}); !errors.Is(err, content.ErrTooLarge) {
		t.Errorf("error %v", err)
	}
	// Nor does an archive have windows that are larger than it may be: these are two empty frames of
	// zstd, the second with one of 64 MiB.
	b, c = encode(t, []byte("\x28\xb5\x2f\xfd\x00\x00\x01\x00\x00"+"\x28\xb5\x2f\xfd\x00\x80\x01\x00\x00"))
	if _, _, err := hashOf(t, b, c, limits); !errors.Is(err, zstd.ErrWindowSizeExceeded) {
		t.Errorf("error %v", err)
	}
	b, c = encode(t, []byte(index+strings.Repeat("0123456789abcdefg", 26<<20/17)))
	counted := &counting{Source: b}
	if _, _, err := hashOf(t, counted, c, erisfs.Limits{NarSize: 100 << 20}); err == nil || !strings.Contains(err.Error(), "index of") || counted.requests.Load() > 10 {
		t.Errorf("%d blocks were requested; error %v", counted.requests.Load(), err)
	}
	// What unpacks to more than it may is cut off by whoever restores it; what is longer than that
	// itself is not opened.
	b, c = encode(t, append([]byte("\x1f\x8b"), make([]byte, 11<<20)...))
	if _, err := image.Open(t.Context(), b, c, limits, fetch.Window{}); !errors.Is(err, content.ErrTooLarge) {
		t.Errorf("error %v", err)
	}
	x, err := image.Open(t.Context(), b, c, erisfs.Limits{NarSize: 1 << 60}, fetch.Window{})
	must(t, err)
	defer x.Close()
	if n, err := io.Copy(io.Discard, x.Content); err != nil || n != 11<<20+2 {
		t.Errorf("%d bytes, error %v", n, err)
	}
}

// TestCloseWhileSilent closes an image while somebody reads ahead and no blocks come.
func TestCloseWhileSilent(t *testing.T) {
	head := []byte("\x0d\x00\x00\x00\x00\x00\x00\x00nix-archive-1\x00\x00\x00")
	b := sourcetest.NewBackend()
	c, err := eris.Encode(t.Context(), bytes.NewReader(append(head, make([]byte, 1<<20)...)), b.Put, eris.EncodeOptions{})
	must(t, err)
	x, err := image.Open(t.Context(), source(t, b), c, erisfs.Limits{NarSize: 1 << 21}, fetch.Window{Requests: 2})
	must(t, err)
	defer b.Hold()()
	_, closeNodes, err := x.Nodes(t.Context())
	must(t, err)
	b.AwaitHeld(1)
	closeNodes()
}

// TestPresent looks for what is there of an archive, half of whose leaves are.
func TestPresent(t *testing.T) {
	all := sourcetest.NewBackend()
	random := make([]byte, 300<<10)
	for i := range random {
		random[i] = byte(i * i >> 7)
	}
	c, err := eris.Encode(t.Context(), bytes.NewReader(random), all.Put, eris.EncodeOptions{BlockSize: eris.BlockSize1KiB})
	must(t, err)
	near := nearby(t, all, 1)
	if n := image.Present(t.Context(), near, c, erisfs.Limits{NarSize: 1 << 20}); n < 300<<10 || n > 302<<10 {
		t.Errorf("%d bytes are there, of all", n)
	}
	if n := image.Present(t.Context(), nearby(t, all, 10), c, erisfs.Limits{NarSize: 1 << 20}); n < 290<<10 || n > 302<<10 {
		t.Errorf("%d bytes are there, of all, by one leaf of ten", n)
	}
	none := sourcetest.NewBackend()
	if n := image.Present(t.Context(), nearby(t, none, 1), c, erisfs.Limits{NarSize: 1 << 20}); n != 0 {
		t.Errorf("%d bytes are there, of nothing", n)
	}
}

func nearby(t *testing.T, b *sourcetest.Backend, stride int) *image.Nearby {
	has := func(_ context.Context, ref eris.Reference, _ eris.BlockSize) bool { return b.Has(ref) }
	return &image.Nearby{Source: source(t, b), Has: has, Stride: stride}
}

// TestTotal looks at what a tree is said to be long in all: exactly at its end, and about from the
// first files on.
func TestTotal(t *testing.T) {
	root := t.TempDir()
	want := int64(0)
	for i := range 200 {
		size := 100 * i * (i % 7)
		want += int64(max(size, 1<<10)) // a block at least
		must(t, os.WriteFile(filepath.Join(root, fmt.Sprintf("%03d", i)), bytes.Repeat([]byte{byte(i)}, size), 0o644))
	}
	b := sourcetest.NewBackend()
	r, err := erisfs.Encode(t.Context(), nar.NewTree(root), b.Put, erisfs.EncodeOptions{})
	must(t, err)
	x, err := image.Open(t.Context(), source(t, b), r.Capability, erisfs.Limits{NarSize: 1 << 30}, fetch.Window{})
	must(t, err)
	var totals []int64
	x.Total = func(bytes int64) { totals = append(totals, bytes) }
	nodes, closeNodes, err := x.Nodes(t.Context())
	must(t, err)
	defer closeNodes()
	sum, _, err := nar.Hash(t.Context(), nodes)
	must(t, err)
	if plain, _, err := nar.HashTree(t.Context(), root); err != nil || plain != sum {
		t.Errorf("hash %x instead of %x, %v", sum, plain, err)
	}
	if len(totals) != 200 || totals[199] < want || totals[199] > want+200*32<<10 {
		t.Fatalf("%d totals, the last one %v of %d", len(totals), totals[max(0, len(totals)-1):], want)
	}
	if half := totals[100]; half < totals[199]/3 || half > totals[199]*3 {
		t.Errorf("at half of the files %d, and %d at the end", half, totals[199])
	}
}
