// SPDX-License-Identifier: GPL-3.0-or-later

package reuse

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"strings"
	"testing"
	"unicode/utf16"
)

// naive does what a table does, byte by byte.
func naive(pairs []Replacement, b []byte) []byte {
	at := func(b []byte, i, stride int, s string) bool {
		for k := range len(s) {
			if i+k*stride >= len(b) || b[i+k*stride] != s[k] {
				return false
			}
			for z := 1; z < stride && k < len(s)-1; z++ {
				if i+k*stride+z >= len(b) || b[i+k*stride+z] != 0 {
					return false
				}
			}
		}
		return true
	}
	b = bytes.Clone(b)
next:
	for i := 0; i < len(b); i++ {
		for _, stride := range []int{1, 2, 4} {
			for _, p := range pairs {
				if !at(b, i, stride, p.Old[:HashLength]) {
					continue
				}
				replaced := p.New[:HashLength]
				if at(b, i, stride, p.Old) {
					replaced = p.New
				}
				for k := range len(replaced) {
					b[i+k*stride] = replaced[k]
				}
				i += (len(replaced) - 1) * stride
				continue next
			}
		}
	}
	return b
}

// smallPiece is the length of the pieces of streams.
const smallPiece = 2 << 10

// hash is one of many hashes of store items.
func hash(i int) string {
	const digits = "0123456789abcdfghijklmnpqrsvwxyz"
	r := rand.New(rand.NewPCG(uint64(i), 1))
	b := make([]byte, HashLength)
	for k := range b {
		b[k] = digits[r.IntN(len(digits))]
	}
	return string(b)
}

// wide is s in characters of 2 or 4 bytes.
func wide(s string, size int, order binary.AppendByteOrder) string {
	var b []byte
	for _, u := range utf16.Encode([]rune(s)) {
		if size == 2 {
			b = order.AppendUint16(b, u)
		} else {
			b = order.AppendUint32(b, uint32(u))
		}
	}
	return string(b)
}

// forms are the ways in which a text may stand in a file.
func forms(s string) []string {
	return []string{
		s, wide(s, 2, binary.LittleEndian), wide(s, 2, binary.BigEndian),
		wide(s, 4, binary.LittleEndian), wide(s, 4, binary.BigEndian),
	}
}

// streamed is b as a stream rewrites it.
func streamed(t testing.TB, pairs []Replacement, b []byte) []byte {
	t.Helper()
	s := NewReplacer(pairs).stream(bytes.NewReader(b), int64(len(b)))
	s.piece = smallPiece
	return whole(t, s)
}

func whole(t testing.TB, s *stream) (b []byte) {
	t.Helper()
	for piece, err := range s.pieces() {
		must(t, err)
		b = append(b, piece...)
	}
	return b
}

func somePairs() []Replacement {
	return []Replacement{
		{hash(1) + "-glibc-2.35", hash(2) + "-glibc-2.35"},
		{hash(3) + "-lib-1.2", hash(4) + "-lib-1.3"},
		{hash(2) + "-other", hash(1) + "-other"}, // one is the other's new one
	}
}

// TestBoundaries puts a hash, in all forms, across the end of the first piece in every way.
func TestBoundaries(t *testing.T) {
	pairs := somePairs()
	for _, name := range []string{hash(1), hash(3) + "-lib-1.2/bin", hash(3) + "-lib-1.4", hash(1) + hash(2)} {
		for form, s := range forms(name) {
			table := NewReplacer(pairs)
			end := smallPiece - table.span + 1
			for _, around := range []int{end, smallPiece} {
				for start := around - len(s) - 1; start <= around+1; start++ {
					b := bytes.Repeat([]byte{'.'}, smallPiece+len(s)+2)
					copy(b[start:], s)
					want := bytes.Clone(b)
					copy(want[start-1:], naive(pairs, b[start-1:start+len(s)+1]))
					if got := streamed(t, pairs, b); !bytes.Equal(got, want) || bytes.Equal(got, b) {
						t.Fatalf("form %d of %s at %d is not rewritten", form, name, start)
					}
				}
			}
		}
	}
}

// TestMatches has matches that touch each other and what looks like them.
func TestMatches(t *testing.T) {
	a, b, c := hash(1), hash(2), hash(3)
	pairs := somePairs()
	digits := strings.Repeat("0", 100)
	for _, test := range []string{
		"", a, a[1:], a[:31], a + b + c, digits + a + digits, digits + "/" + a, digits + "\x00" + wide(a, 2, binary.BigEndian), a + "-glibc-2.35", c + "-lib-1.2" + c, c + "-lib-1.2", c + "-lib-1.", c + "-lib-1.3",
		strings.Join(forms(a), ""), strings.Join(forms(a), "0"), strings.Join(forms(c+"-lib-1.2"), "\x00"),
		wide(a, 2, binary.LittleEndian)[:63] + a[1:], wide(a, 2, binary.LittleEndian)[:62], wide(a, 4, binary.LittleEndian)[:124],
		wide(a[:16], 2, binary.LittleEndian) + wide(a[16:], 4, binary.LittleEndian), digits + wide(a, 2, binary.LittleEndian) + digits,
		a[:31] + wide(a, 2, binary.LittleEndian), a + wide(b, 2, binary.LittleEndian), strings.ToUpper(a),
	} {
		want := naive(pairs, []byte(test))
		got := []byte(test)
		NewReplacer(pairs).rewrite(got, len(got))
		if !bytes.Equal(got, want) {
			t.Errorf("%q becomes %q instead of %q", test, got, want)
		}
	}
	if got := NewReplacer(pairs).text("x" + a + "y"); got != "x"+b+"y" {
		t.Errorf("a name becomes %q", got)
	}
}

func TestPatches(t *testing.T) {
	b := bytes.Repeat([]byte("."), 2*smallPiece)
	table := NewReplacer(somePairs())
	end := int64(smallPiece - table.span + 1)
	s := table.stream(bytes.NewReader(b), int64(len(b)))
	patches := []patch{{0, []byte("first")}, {end - 2, []byte("middle")}, {end - 2, []byte("middle")}, {end - 1, []byte("overlap")}, {end + 4, []byte("next")}, {int64(len(b)) - 4, []byte("last")}}
	s.piece, s.patches = smallPiece, patches
	got := whole(t, s)
	for _, p := range patches {
		copy(b[p.offset:], p.bytes)
	}
	if !bytes.Equal(got, b) {
		t.Error("the patches are not where they belong")
	}
}

// FuzzRewrite compares with the naive way. Bytes of the input choose among pieces of which overlaps
// and near misses are made.
func FuzzRewrite(f *testing.F) {
	pairs := somePairs()
	var pieces []string
	for _, p := range pairs {
		pieces = append(pieces, forms(p.Old)...)
		pieces = append(pieces, forms(p.Old[:HashLength])...)
	}
	f.Add([]byte{0, 1, 2, 3, 200, 5})
	f.Add([]byte("\x01\x1f0\x02\x3f\x00"))
	f.Fuzz(func(t *testing.T, program []byte) {
		var b []byte
		for i := 0; i+1 < len(program) && i < 200; i += 2 {
			op, n := int(program[i]), int(program[i+1])
			switch {
			case op < len(pieces):
				s := pieces[op]
				b = append(b, s[:min(len(s), n)]...)
			case op < 2*len(pieces):
				s := pieces[op-len(pieces)]
				b = append(b, s[min(len(s), n):]...)
			default:
				b = append(b, program[i+1])
			}
		}
		want := naive(pairs, b)
		got := bytes.Clone(b)
		NewReplacer(pairs).rewrite(got, len(got))
		if !bytes.Equal(got, want) {
			t.Fatalf("%q becomes %q instead of %q", b, got, want)
		}
		// Across the end of a piece too.
		for _, shift := range []int{0, 40, 300} {
			long := append(bytes.Repeat([]byte{'/'}, smallPiece-NewReplacer(pairs).span-shift), b...)
			if !bytes.Equal(streamed(t, pairs, long), naive(pairs, long)) {
				t.Fatalf("%q after %d bytes is rewritten in another way", b, len(long)-len(b))
			}
		}
	})
}
