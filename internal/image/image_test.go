// SPDX-License-Identifier: GPL-3.0-or-later

package image_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// blocks is a source of blocks in memory.
type blocks struct {
	mu sync.Mutex
	m  map[eris.Reference][]byte

	asked int
}

func (b *blocks) Put(_ context.Context, ref eris.Reference, block []byte) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.m[ref] = bytes.Clone(block)
	return nil
}

func (b *blocks) Get(_ context.Context, ref eris.Reference, _ eris.BlockSize, _ []byte) ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.asked++
	if block, ok := b.m[ref]; ok {
		return block, nil
	}
	return nil, eris.ErrNotFound
}

func encode(t *testing.T, content []byte) (*blocks, eris.ReadCapability) {
	t.Helper()
	b := &blocks{m: map[eris.Reference][]byte{}}
	c, err := eris.Encode(t.Context(), bytes.NewReader(content), b, eris.EncodeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return b, c
}

// hashOf returns the hash of the archive of an image.
func hashOf(t *testing.T, b eris.Blocks, c eris.ReadCapability, limits erisfs.Limits) (image.Form, [32]byte, error) {
	t.Helper()
	x, err := image.Open(t.Context(), b, c, limits, eris.Window{})
	if err != nil {
		return "", [32]byte{}, err
	}
	nodes, closeNodes, err := x.Nodes(t.Context())
	if err != nil {
		return x.Form, [32]byte{}, err
	}
	defer closeNodes()
	h := sha256.New()
	_, err = nar.Write(h, nodes)
	return x.Form, [32]byte(h.Sum(nil)), err
}

// TestForms opens trees in all forms in which others may have encoded them. The
// archives were made by "guix publish".
func TestForms(t *testing.T) {
	const mirror = "../../testdata/guix-mirror/nar"
	items, err := filepath.Glob(mirror + "/*-*")
	if err != nil || len(items) < 10 {
		t.Fatalf("items %v, error %v", items, err)
	}
	limits := erisfs.Limits{NarSize: 1 << 20}
	for _, item := range items {
		plain, err := os.ReadFile(item)
		if err != nil {
			t.Fatal(err)
		}
		want := sha256.Sum256(plain)
		for form, directory := range map[image.Form]string{"nar": "", "nar.gzip": "gzip", "nar.lzip": "lzip", "nar.zstd": "zstd"} {
			text, err := os.ReadFile(filepath.Join(mirror, directory, filepath.Base(item)))
			if err != nil {
				t.Fatal(err)
			}
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
		b := &blocks{m: map[eris.Reference][]byte{}}
		r, err := erisfs.Encode(t.Context(), nar.NewReader(nar.FeedReader(bytes.NewReader(plain), 1<<16)), b, erisfs.EncodeOptions{})
		if errors.Is(err, erisfs.ErrNotRepresentable) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if got, hash, err := hashOf(t, b, r.Capability, limits); err != nil || got != image.ERISFS || hash != want {
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
	if _, err := image.Open(t.Context(), b, c, limits, eris.Window{}); !errors.Is(err, eris.ErrTooLarge) {
		t.Errorf("error %v", err)
	}
	b, c = encode(t, []byte(index+strings.Repeat("0123456789abcdefg", 26<<20/17)))
	b.asked = 0
	if _, _, err := hashOf(t, b, c, erisfs.Limits{NarSize: 100 << 20}); err == nil || !strings.Contains(err.Error(), "index of") || b.asked > 10 {
		t.Errorf("%d blocks were asked for; error %v", b.asked, err)
	}
	// What unpacks to more than it may is cut off by whoever restores it; what is
	// longer than that itself is not opened.
	b, c = encode(t, append([]byte("\x1f\x8b"), make([]byte, 11<<20)...))
	if _, err := image.Open(t.Context(), b, c, limits, eris.Window{}); !errors.Is(err, eris.ErrTooLarge) {
		t.Errorf("error %v", err)
	}
	x, err := image.Open(t.Context(), b, c, erisfs.Limits{NarSize: 1 << 60}, eris.Window{})
	if err != nil {
		t.Fatal(err)
	}
	if n, err := x.Content.WriteTo(t.Context(), io.Discard); err != nil || n != 11<<20+2 {
		t.Errorf("%d bytes, error %v", n, err)
	}
}
