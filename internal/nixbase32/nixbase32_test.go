// SPDX-License-Identifier: GPL-3.0-or-later

package nixbase32_test

import (
	"bytes"
	"crypto/sha256"
	"math/big"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
)

// reference encodes with arbitrary-precision arithmetic, straight from the definition: a
// little-endian number, most significant digit first.
func reference(src []byte) string {
	be := bytes.Clone(src)
	slices.Reverse(be)
	n, digit := new(big.Int).SetBytes(be), new(big.Int)
	var out []byte
	for range (len(src)*8 + 4) / 5 {
		n.DivMod(n, big.NewInt(32), digit)
		out = append(out, "0123456789abcdfghijklmnpqrsvwxyz"[digit.Int64()])
	}
	slices.Reverse(out)
	return string(out)
}

// decode returns what a text is the notation of.
func decode(s string) ([]byte, error) {
	b := make([]byte, len(s)*5/8)
	return b, nixbase32.Decode(b, s)
}

func TestKnownAnswers(t *testing.T) {
	empty, hello := sha256.Sum256(nil), sha256.Sum256([]byte("hello\n"))
	for want, in := range map[string][]byte{
		"": nil,
		"0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73": empty[:],
		"00xyyr3fi8l6hb839bv3f7yb86yjv7xi1cgh1xnhipym4asvb4aq": hello[:],
		strings.Repeat("0", 52):                                make([]byte, 32),
		strings.Repeat("z", 32):                                bytes.Repeat([]byte{0xff}, 20),
		"7z":                                                   {0xff},
	} {
		if got := nixbase32.EncodeToString(in); got != want {
			t.Errorf("%x is written %q, want %q", in, got, want)
		}
		if got, err := decode(want); err != nil || !bytes.Equal(got, in) {
			t.Errorf("%q is read as %x, %v, want %x", want, got, err, in)
		}
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
			got, err := decode(want)
			if err != nil || !bytes.Equal(got, src) || nixbase32.EncodeToString(src) != want {
				t.Fatalf("%x is written %q, want %q, which is read as %x, %v", src, nixbase32.EncodeToString(src), want, got, err)
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
		if _, err := decode(tt.in); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want an error that says %q", tt.name, err, tt.want)
		}
	}
	var dst [20]byte
	for _, s := range []string{"", strings.Repeat("0", 31), strings.Repeat("0", 33)} {
		if err := nixbase32.Decode(dst[:], s); err == nil {
			t.Errorf("Decode of %d digits into 20 bytes succeeded", len(s))
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add("0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73")
	f.Add("7z")
	f.Add("zz")
	f.Add("éé")
	f.Fuzz(func(t *testing.T, s string) {
		b, err := decode(s)
		if err != nil {
			return
		}
		if got := nixbase32.EncodeToString(b); got != s {
			t.Errorf("%q decodes to %x, which is written %q", s, b, got)
		}
	})
}
