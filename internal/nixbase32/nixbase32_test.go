// SPDX-License-Identifier: GPL-3.0-or-later

package nixbase32_test

import (
	"bytes"
	"crypto/sha256"
	"math/big"
	"math/rand/v2"
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
)

// reference encodes with arbitrary-precision arithmetic, straight from the definition: a
// little-endian number, most significant digit first.
func reference(src []byte) string {
	be := bytes.Clone(src)
	for i, j := 0, len(be)-1; i < j; i, j = i+1, j-1 {
		be[i], be[j] = be[j], be[i]
	}
	n, digit := new(big.Int).SetBytes(be), new(big.Int)
	var out []byte
	for range (len(src)*8 + 4) / 5 {
		n.DivMod(n, big.NewInt(32), digit)
		out = append([]byte{"0123456789abcdfghijklmnpqrsvwxyz"[digit.Int64()]}, out...)
	}
	return string(out)
}

func TestKnownAnswers(t *testing.T) {
	empty, hello := sha256.Sum256(nil), sha256.Sum256([]byte("hello\n"))
	for _, tt := range []struct {
		name string
		in   []byte
		want string
	}{
		{"nothing", nil, ""},
		{"digest of nothing", empty[:], "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73"},
		{"digest of hello", hello[:], "00xyyr3fi8l6hb839bv3f7yb86yjv7xi1cgh1xnhipym4asvb4aq"},
		{"zeros", make([]byte, 32), strings.Repeat("0", 52)},
		{"ones", bytes.Repeat([]byte{0xff}, 20), strings.Repeat("z", 32)},
		{"one byte", []byte{0xff}, "7z"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := nixbase32.EncodeToString(tt.in); got != tt.want {
				t.Errorf("EncodeToString = %q, want %q", got, tt.want)
			}
			got, err := nixbase32.DecodeString(tt.want)
			if err != nil || !bytes.Equal(got, tt.in) {
				t.Errorf("DecodeString = %x, %v, want %x", got, err, tt.in)
			}
		})
	}
}

func TestAgainstDefinition(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for n := range 70 {
		src := make([]byte, n)
		for range 20 {
			for i := range src {
				src[i] = byte(rng.Uint32())
			}
			want := reference(src)
			if len(want) != nixbase32.EncodedLen(n) {
				t.Fatalf("EncodedLen(%d) = %d, want %d", n, nixbase32.EncodedLen(n), len(want))
			}
			if got := string(nixbase32.AppendEncode([]byte("x"), src)); got != "x"+want {
				t.Fatalf("AppendEncode(%x) = %q, want %q", src, got, "x"+want)
			}
			got, err := nixbase32.DecodeString(want)
			if err != nil || !bytes.Equal(got, src) {
				t.Fatalf("DecodeString(%q) = %x, %v, want %x", want, got, err, src)
			}
		}
	}
}

func TestDecodeRejects(t *testing.T) {
	good := "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73"
	for _, tt := range []struct {
		name, in, want string
	}{
		{"one digit", "0", "1 digits"},
		{"three digits", "000", "3 digits"},
		{"six digits", "000000", "6 digits"},
		{"letter e", good[:10] + "e" + good[11:], `'e' at offset 10`},
		{"letter o", good[:51] + "o", `'o' at offset 51`},
		{"letter t in the first group", "t" + good[1:], `'t' at offset 0`},
		{"letter u", good[:3] + "u" + good[4:], `'u' at offset 3`},
		{"upper case", strings.ToUpper(good), `'M' at offset 1`},
		{"the first of two is named", good[:5] + "e" + good[6:20] + "o" + good[21:], `'e' at offset 5`},
		{"line feed", good[:51] + "\n", `'\n' at offset 51`},
		{"not ASCII", good[:8] + "é" + good[10:], `'é' at offset 8`},
		{"not UTF-8", good[:8] + "\xff" + good[9:], `at offset 8`},
		{"excess bits in a digest", "2" + good[1:], "excess bits"},
		{"excess bits in a byte", "80", "excess bits"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := nixbase32.DecodeString(tt.in)
			if err == nil {
				t.Fatalf("DecodeString(%q) = %x, want an error", tt.in, got)
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %q does not say %q", err, tt.want)
			}
		})
	}
	var dst [20]byte
	for _, s := range []string{"", strings.Repeat("0", 31), strings.Repeat("0", 33)} {
		if err := nixbase32.Decode(dst[:], s); err == nil {
			t.Errorf("Decode of %d digits into 20 bytes succeeded", len(s))
		}
	}
}

func TestNoAllocation(t *testing.T) {
	digest := sha256.Sum256(nil)
	text := nixbase32.EncodeToString(digest[:])
	buf := make([]byte, 0, 64)
	if n := testing.AllocsPerRun(100, func() {
		buf = nixbase32.AppendEncode(buf[:0], digest[:])
		if err := nixbase32.Decode(digest[:], text); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("AppendEncode and Decode allocate %v times", n)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add("0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73")
	f.Add("7z")
	f.Add("zz")
	f.Add("éé")
	f.Fuzz(func(t *testing.T, s string) {
		b, err := nixbase32.DecodeString(s)
		if err != nil {
			return
		}
		if got := nixbase32.EncodeToString(b); got != s {
			t.Errorf("%q decodes to %x, which is written %q", s, b, got)
		}
	})
}

func BenchmarkAppendEncode(b *testing.B) {
	digest := sha256.Sum256(nil)
	buf := make([]byte, 0, 64)
	b.SetBytes(int64(len(digest)))
	for b.Loop() {
		buf = nixbase32.AppendEncode(buf[:0], digest[:])
	}
}

func BenchmarkDecode(b *testing.B) {
	var digest [32]byte
	text := nixbase32.EncodeToString(digest[:])
	b.SetBytes(int64(len(digest)))
	for b.Loop() {
		if err := nixbase32.Decode(digest[:], text); err != nil {
			b.Fatal(err)
		}
	}
}
