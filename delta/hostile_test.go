// SPDX-License-Identifier: GPL-3.0-or-later

package delta_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/delta"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

const magic = "\xd5sdelta\n\x01\x01"

// forged is a delta with an index and frames as they are.
func forged(index []byte, frames ...string) []byte {
	index = []byte(frame(index))
	b := binary.LittleEndian.AppendUint32([]byte(magic), uint32(len(index)))
	return append(append(b, index...), strings.Join(frames, "")...)
}

// frame compresses b.
func frame(b []byte) string {
	z, _ := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20))
	return string(z.EncodeAll(b, nil))
}

// index makes an index of strings as they are, of numbers, and of text behind its length.
func index(parts ...any) []byte {
	var b []byte
	for _, p := range parts {
		switch p := p.(type) {
		case text:
			b = append(binary.AppendUvarint(b, uint64(len(p))), p...)
		case string:
			b = append(b, p...)
		case int:
			b = binary.AppendUvarint(b, uint64(p))
		}
	}
	return b
}

type text string

// The kinds of nodes and the methods of files.
const (
	end, directory, symlink, regular = 0, 1, 2, 3
	copied, replaced, patch, fresh   = 0, 1, 2, 3
)

// TestHostile reads deltas that no writer makes.
func TestHostile(t *testing.T) {
	base := filepath.Join(tree{"f": strings.Repeat("f", 100<<10), "d/g": "g", "l": "->f"}.make(t))
	outside := filepath.Dir(base) + "/outside"
	must(t, os.WriteFile(outside, []byte("o"), 0o644))
	x := frame([]byte("x"))
	deep := []any{0, directory}
	for range nar.MaxDepth + 1 {
		deep = append(deep, directory, text("d"))
	}
	whole := frame(index(0, directory, end))
	behind := append(binary.LittleEndian.AppendUint32([]byte(magic), uint32(len(whole)+4)), whole+"abcd"...)
	file := func(parts ...any) []byte { return index(append([]any{0, directory, regular, text("n")}, parts...)...) }
	for _, test := range []struct {
		name  string
		delta []byte
		says  string // the error; empty is none
	}{
		{"none of these", forged(append(file(1, fresh, len(x)), end), x), ""},
		{"a copy", forged(append(file(1, copied, text("d/g")), end)), ""},
		{"empty", nil, "unexpected EOF"},
		{"another magic", []byte("nix-archive-1\x00\x00\x00"), "does not begin"},
		{"another version", []byte(strings.Replace(magic, "\n\x01", "\n\x02", 1) + "1234"), "version 2"},
		{"another encoder", []byte(magic[:len(magic)-1] + "\x021234"), "encoder 2"},
		{"a long index", binary.LittleEndian.AppendUint32([]byte(magic), 4<<20+1), "index of 4194305"},
		{"an index that does not come", binary.LittleEndian.AppendUint32([]byte(magic), 4<<20), "unexpected EOF"},
		{"no zstd", append(binary.LittleEndian.AppendUint32([]byte(magic), 4), "abcd"...), "index"},
		{"many replacements", forged(index(16386)), "16386 hashes"},
		{"replacements that end", forged(index(2, oldHash, newHash)), "unexpected EOF"},
		{"a replacement of no hash", forged(index(1, strings.Repeat("e", 32), newHash)), "bad replacement"},
		{"a replacement by no hash", forged(index(1, oldHash, strings.Repeat("/", 32))), "bad replacement"},
		{"replacements twice", forged(index(2, oldHash, newHash, oldHash, newHash)), "bad replacement"},
		{"no root", forged(index(0)), "unexpected EOF"},
		{"an end as root", forged(index(0, end)), "kind 0"},
		{"an unknown kind", forged(index(0, 5)), "kind 5"},
		{"two roots", forged(index(0, directory, end, directory, end)), "more than one root"},
		{"an index with something behind it", behind, "index: invalid"},
		{"too deep", forged(index(deep...)), "longer than"},
		{"no end", forged(index(0, directory)), "unexpected EOF"},
		{"an empty name", forged(index(0, directory, symlink, text(""), text("x"))), "empty entry name"},
		{"a name with a slash", forged(index(0, directory, symlink, text("a/b"), text("x"))), "0x2f"},
		{"a name of dots", forged(index(0, directory, directory, text(".."))), `".."`},
		{"a long name", forged(index(0, directory, directory, 256)), "256 bytes"},
		{"a name that ends", forged(index(0, directory, directory, 10, "x")), "unexpected EOF"},
		{"names out of order", forged(index(0, directory, symlink, text("b"), text("x"), symlink, text("a"), text("x"))), "after"},
		{"names twice", forged(index(0, directory, symlink, text("a"), text("x"), symlink, text("a"), text("x"))), "after"},
		{"an empty target", forged(index(0, symlink, text(""))), "empty symbolic link"},
		{"a long target", forged(index(0, symlink, 4096)), "4096 bytes"},
		{"a number without end", forged(index(0, symlink, strings.Repeat("\xff", 11))), "overflow"},
		{"a large file", forged(file(1<<20+1, fresh)), "more than 1048576"},
		{"large files", forged(index(0, directory, regular, text("a"), 1<<20, copied, text("f"))), "instead of 1048576"},
		{"an unknown method", forged(file(1, 4)), "method 4"},
		{"a way out", forged(file(1, copied, text("../outside"))), "not below it"},
		{"an absolute way out", forged(file(1, copied, text(outside))), "not below it"},
		{"a way out of a directory", forged(file(1, replaced, text("d/../../outside"))), "not below it"},
		{"a way by a link", forged(file(100<<10, copied, text("l"))), "too many"},
		{"a directory as base", forged(file(1, patch, text("d"), 0, 0, len(x)), x), "no regular file"},
		{"a base with a long path", forged(file(1, copied, 3801)), "3801 bytes"},
		{"a base that is missing", forged(file(1, copied, text("nothing"))), "no such file"},
		{"a base of another size", forged(file(2, copied, text("d/g"))), "instead of 2"},
		{"a dictionary behind the end", forged(file(1, patch, text("f"), 100<<10, 1, len(x)), x), "dictionary of 1"},
		{"a dictionary that overflows", forged(file(1, patch, text("f"), math.MaxInt-5, 10, len(x)), x), "dictionary of 10"},
		{"a long dictionary", forged(file(1, patch, text("f"), 0, 16<<10+9, len(x)), x), "dictionary of 16393"},
		{"the longest dictionary", forged(append(file(1, patch, text("f"), 0, 16<<10+8, len(x)), end), x), ""},
		{"a long frame", forged(file(1, fresh, 66), x), "frame of 66"},
		{"a frame that does not come", forged(file(1, fresh, len(x)+1), x), "EOF"},
		{"a frame of more", forged(file(1, fresh, len(frame([]byte("xyz")))), frame([]byte("xyz"))), "exceed"},
		{"a bomb", forged(file(100, fresh, len(frame(make([]byte, 600<<10)))), frame(make([]byte, 600<<10))), "exceed"},
		{"a frame of less", forged(file(2, fresh, len(x)), x), "frame of 1 bytes"},
		{"frames that are one too many", forged(append(file(1, fresh, len(x)), end), x, x), "behind the last frame"},
		{"a frame that is none", forged(file(4, fresh, 4), "abcd"), "magic"},
	} {
		archive, err := read(t.Context(), test.delta, base, delta.ReadOptions{MaxSize: 1 << 20})
		testhelp.WantError(t, test.name, err, test.says)
		if err != nil && strings.Contains(err.Error(), "\n") || err == nil && !bytes.Contains(archive, []byte("nix-archive-1")) {
			t.Errorf("%s: error %v is of several lines, or there is no archive", test.name, err)
		}
	}
}

// TestMemory reads a delta with a base of 2 GB, the dictionaries of which are as long as may be,
// and a bomb of an index. All that is allocated, whether it is still needed or not, is little.
func TestMemory(t *testing.T) {
	base := t.TempDir()
	f, err := os.Create(base + "/file")
	must(t, err)
	must(t, errors.Join(f.Truncate(2<<30), f.Close()))
	const piece, dictionary = 4 << 20, 16 << 20
	z, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithSingleSegment(true),
		zstd.WithWindowSize(2*dictionary), zstd.WithEncoderDictRaw(0, make([]byte, dictionary)))
	must(t, err)
	frame := string(z.EncodeAll([]byte(noise(1, piece)), nil))
	pieces := index(0, directory, regular, text("n"), 3*piece, patch, text("file"), 0, dictionary, len(frame), 1<<30, dictionary, len(frame), 1, dictionary, len(frame), end)
	bomb := append(index(0, directory), bytes.Repeat([]byte{directory}, 16<<20)...) // all of the same name
	for name, test := range map[string]struct {
		delta []byte
		fails bool
	}{
		"pieces": {forged(pieces, frame, frame, frame), false},
		"bomb":   {forged(bomb), true},
	} {
		n := testhelp.Allocated(func() {
			r, err := delta.NewReader(t.Context(), bytes.NewReader(test.delta), base, plenty)
			if err == nil {
				_, err = nar.Write(io.Discard, r)
				r.Close()
			}
			if (err != nil) != test.fails {
				t.Errorf("%s: error %v", name, err)
			}
		})
		if n > 48<<20 {
			t.Errorf("%s: %d MiB were allocated", name, n>>20)
		}
	}
}

// FuzzRead reads anything as a delta. Whatever it is, what comes is a tree within the bounds, and
// the base stays as it is.
func FuzzRead(f *testing.F) {
	old := tree{"f": strings.Repeat("f", 10<<10) + oldHash, "d/g": "g", "l": "->f"}
	new := tree{"f": "x" + strings.Repeat("f", 9<<10) + newHash, "d/g": "g", "l": "->f", "n": noise(1, 100), "h": oldHash}
	base := old.make(f)
	var b bytes.Buffer
	if _, err := delta.Write(f.Context(), &b, new.make(f), base, delta.WriteOptions{Replacements: hashes}); err != nil {
		f.Fatal(err)
	}
	z, _ := zstd.NewReader(nil)
	length := int(binary.LittleEndian.Uint32(b.Bytes()[len(magic):]))
	start := len(magic) + 4
	plain, err := z.DecodeAll(b.Bytes()[start:start+length], nil)
	must(f, err)
	f.Add(plain, b.Bytes()[start+length:])
	f.Add(index(0, regular, 1, copied, text("d/g")), []byte{})
	before := hashOf(f, nar.NewTree(base))
	f.Fuzz(func(t *testing.T, index, frames []byte) {
		const limit = 64 << 10
		archive, err := read(t.Context(), forged(index, string(frames)), base, delta.ReadOptions{MaxSize: limit})
		if err == nil {
			if _, err := nar.Write(io.Discard, nar.NewReader(nar.NewReadAhead(t.Context(), bytes.NewReader(archive), 2, 4096, 0))); err != nil {
				t.Errorf("the tree is no good one: %v", err)
			}
		}
		if hashOf(t, nar.NewTree(base)) != before {
			t.Error("the base has changed")
		}
	})
}

// TestIndexBomb reads an index of a few KiB that decompresses to 64 MiB and is refused at once.
func TestIndexBomb(t *testing.T) {
	bomb := forged(append(index(1), make([]byte, 64<<20)...))
	used := testhelp.Allocated(func() {
		_, err := delta.NewReader(t.Context(), bytes.NewReader(bomb), t.TempDir(), delta.ReadOptions{MaxSize: 1 << 20})
		testhelp.WantError(t, "bomb", err, "bad replacement")
	})
	if used > 16<<20 {
		t.Errorf("%d bytes of memory for a delta of %d", used, len(bomb))
	}
}
