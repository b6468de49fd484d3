// SPDX-License-Identifier: GPL-3.0-or-later

package inflate

import (
	"bytes"
	"compress/flate"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"
)

// data makes n bytes of which some repeat, at all distances, and some do not.
func data(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, 0, n+300)
	for len(b) < n {
		switch r.IntN(6) {
		case 0:
			for range r.IntN(40) {
				b = append(b, byte(r.Uint32()))
			}
		case 1:
			b = append(b, bytes.Repeat([]byte{byte(r.IntN(4))}, r.IntN(600))...)
		case 2:
			for range r.IntN(200) {
				b = append(b, byte('a'+r.IntN(10)*r.IntN(10)/8))
			}
		default:
			if d := 1 + r.IntN(min(len(b), 40000)+1); d <= len(b) {
				for range 3 + r.IntN(300) {
					b = append(b, b[len(b)-d])
				}
			}
		}
	}
	return b[:n]
}

func deflate(t testing.TB, p []byte, level int) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, level)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(p); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func readAll(z *Reader) (out []byte, err error) {
	for {
		p, err := z.Next()
		if err == io.EOF {
			return out, nil
		}
		if err != nil {
			return out, err
		}
		out = append(out, p...)
	}
}

var sources = map[string]func(io.Reader) io.Reader{
	"whole":           func(r io.Reader) io.Reader { return r },
	"one byte":        iotest.OneByteReader,
	"half":            iotest.HalfReader,
	"error with data": iotest.DataErrReader,
}

func TestReader(t *testing.T) {
	inputs := map[string][]byte{
		"nothing":  nil,
		"one byte": {1},
		"short":    data(1, 100),
		"mixed":    data(2, 400000),
		"zeros":    make([]byte, 500000),
	}
	rest := "what follows the stream"
	for name, want := range inputs {
		for _, level := range []int{flate.NoCompression, flate.HuffmanOnly, 1, 6, 9} {
			compressed := append(deflate(t, want, level), rest...)
			for source, wrap := range sources {
				if source == "one byte" && len(compressed) > 300000 {
					continue // slow
				}
				z := NewReader(wrap(bytes.NewReader(compressed)))
				got, err := readAll(z)
				if err != nil || !bytes.Equal(got, want) {
					t.Fatalf("%s, level %d, %s: %d bytes, %v", name, level, source, len(got), err)
				}
				tail := make([]byte, len(rest))
				if err := z.ReadFull(tail); err != nil || string(tail) != rest {
					t.Errorf("%s, level %d, %s: then %q, %v", name, level, source, tail, err)
				}
				if err := z.ReadFull(tail); err != io.EOF {
					t.Errorf("%s, level %d, %s: at the end %v", name, level, source, err)
				}
			}
		}
	}
}

func TestReset(t *testing.T) {
	var compressed []byte
	for seed := range uint64(5) {
		compressed = append(compressed, deflate(t, data(seed, 50000), int(seed)+1)...)
		compressed = append(compressed, "12345"...)
	}
	z := NewReader(bytes.NewReader(compressed))
	for seed := range uint64(5) {
		if seed > 0 {
			z.Reset()
		}
		if got, err := readAll(z); err != nil || !bytes.Equal(got, data(seed, 50000)) {
			t.Fatalf("stream %d: %v", seed, err)
		}
		tail := make([]byte, 5)
		if err := z.ReadFull(tail); err != nil || string(tail) != "12345" {
			t.Fatalf("after stream %d: %q, %v", seed, tail, err)
		}
	}
	if err := z.ReadFull(make([]byte, 1)); err != io.EOF {
		t.Error(err)
	}
}

func TestReadFullShort(t *testing.T) {
	z := NewReader(bytes.NewReader(append(deflate(t, nil, 6), 1, 2, 3)))
	if _, err := z.Next(); err != io.EOF {
		t.Fatal(err)
	}
	if err := z.ReadFull(make([]byte, 4)); err != io.ErrUnexpectedEOF {
		t.Error(err)
	}
}

func TestTruncated(t *testing.T) {
	want := data(3, 1000)
	broken := errors.New("broken")
	for _, level := range []int{flate.NoCompression, flate.HuffmanOnly, 1, 9} {
		compressed := deflate(t, want, level)
		for i := range compressed {
			got, err := readAll(NewReader(bytes.NewReader(compressed[:i])))
			if err != io.ErrUnexpectedEOF || !bytes.HasPrefix(want, got) {
				t.Errorf("level %d, cut to %d bytes: %d bytes, %v", level, i, len(got), err)
			}
			z := NewReader(io.MultiReader(bytes.NewReader(compressed[:i]), iotest.ErrReader(broken)))
			if got, err = readAll(z); err != broken || !bytes.HasPrefix(want, got) {
				t.Errorf("level %d, broken after %d bytes: %v", level, i, err)
			}
			if _, err := z.Next(); err != broken {
				t.Errorf("level %d, broken after %d bytes: then %v", level, i, err)
			}
		}
	}
}

// bitString packs bits that are written as they come in a stream.
func bitString(s string) []byte {
	var out []byte
	n := 0
	for _, c := range s {
		if c != '0' && c != '1' {
			continue
		}
		if n%8 == 0 {
			out = append(out, 0)
		}
		out[n/8] |= byte(c-'0') << (n % 8)
		n++
	}
	return append(out, make([]byte, 30)...)
}

func TestErrors(t *testing.T) {
	tests := []struct{ name, bits, err string }{
		{"block type 3", "1 11", "type of a block"},
		{"length of a stored block", "1 00 00000 1000000000000000 0000000000000000", "length of a stored block"},
		{"distance beyond the data", "1 10 00110000 0000001 00001", "distance beyond the data"},
		{"distance with no data", "1 10 0000001 00000", "distance beyond the data"},
		{"distance symbol 30", "1 10 00110000 0000001 11110", "code of a distance"},
		{"distance symbol 31", "1 10 00110000 0000001 11111", "code of a distance"},
		{"literal symbol 286", "1 10 11000110", "code"},
		{"literal symbol 287", "1 10 11000111", "code"},
		{"287 literals", "1 01 01111 00000 0000", "number of codes"},
		{"31 distances", "1 01 00000 01111 0000", "number of codes"},
		{"no code lengths", "1 01 00000 00000 0000 000 000 000 000", "code length"},
		{"too many code lengths", "1 01 00000 00000 0000 100 100 100 100", "code of code lengths"},
		{"too few code lengths", "1 01 00000 00000 0000 010 000 000 000", "code of code lengths"},
		{"repeat at the beginning", "1 01 00000 00000 0000 100 100 000 000 0", "repeated code length"},
		{"lengths beyond the last", "1 01 00000 00000 0000 000 100 100 000 1 1111111 1 1111111", "repeated code length"},
		{"no end of block", "1 01 00000 00000 0000 000 000 100 100 1 1111111 1 1101011", "no end of block"},
	}
	for _, test := range tests {
		for source, wrap := range sources {
			z := NewReader(wrap(bytes.NewReader(bitString(test.bits))))
			got, err := readAll(z)
			if !errors.Is(err, ErrFormat) || err.Error() != "invalid deflate data: "+test.err {
				t.Errorf("%s, %s: %d bytes, %v", test.name, source, len(got), err)
			}
			if _, again := z.Next(); again != err {
				t.Errorf("%s, %s: then %v", test.name, source, again)
			}
		}
		if _, err := io.ReadAll(flate.NewReader(bytes.NewReader(bitString(test.bits)))); err == nil {
			t.Errorf("%s: compress/flate has no error", test.name)
		}
	}
}

// TestFarthest: the farthest distance and the longest match, everywhere in the
// window.
func TestFarthest(t *testing.T) {
	const fixed = "0 10 " // a block in the fixed code
	// Length 258 is symbol 285 = 11000101, distance 32768 is symbol 29 and all ones.
	far := "11000101 11101 1111111111111"
	literals := ""
	want := make([]byte, 0, 1<<20)
	r := rand.New(rand.NewPCG(5, 5))
	for range history {
		c := byte(r.IntN(144))
		want = append(want, c)
		for i := 7; i >= 0; i-- {
			literals += string('0' + (c+0x30)>>i&1)
		}
		if len(literals) > 1<<12 {
			break
		}
	}
	// The first part by doubling: distance as far as it goes is tested by the
	// second part.
	s := []byte(fixed + literals)
	for len(want) < history {
		s = append(s, "11000101 00000"...) // length 258, distance 1
		for range maxMatch {
			want = append(want, want[len(want)-1])
		}
	}
	for len(want) < 900000 {
		s = append(s, far...)
		for range maxMatch {
			want = append(want, want[len(want)-history])
		}
		if r.IntN(3) == 0 {
			s = append(s, "00110000"...)
			want = append(want, 0)
		}
	}
	s = append(s, "0000000 1 10 0000000"...)
	got, err := readAll(NewReader(bytes.NewReader(bitString(string(s)))))
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes of %d, %v", len(got), len(want), err)
	}
}

func FuzzInflate(f *testing.F) {
	for _, level := range []int{flate.NoCompression, flate.HuffmanOnly, 1, 9} {
		f.Add(deflate(f, data(4, 400), level))
		f.Add(deflate(f, bytes.Repeat([]byte("ab"), 200), level))
	}
	f.Add(bitString("1 10 0000000"))
	f.Add(bitString("1 01 00000 00000 0000 000 000 100 100 1 1111111 1 1101011"))
	f.Fuzz(func(t *testing.T, compressed []byte) {
		const limit = 4 << 20
		r := bytes.NewReader(compressed)
		want, wantErr := io.ReadAll(io.LimitReader(flate.NewReader(r), limit))
		if len(want) == limit {
			return
		}
		for source, wrap := range sources {
			z := NewReader(wrap(bytes.NewReader(compressed)))
			got, err := readAll(z)
			if (err == nil) != (wantErr == nil) {
				t.Fatalf("%s: %v, compress/flate: %v", source, err, wantErr)
			}
			if err != nil {
				if !bytes.HasPrefix(got, want) && !bytes.HasPrefix(want, got) {
					t.Fatalf("%s: other data before the error", source)
				}
				if err != io.ErrUnexpectedEOF && !errors.Is(err, ErrFormat) {
					t.Fatalf("%s: %v", source, err)
				}
				continue
			}
			if !bytes.Equal(got, want) {
				t.Fatalf("%s: other data", source)
			}
			rest := make([]byte, r.Len())
			if err := z.ReadFull(rest); err != nil && len(rest) > 0 {
				t.Fatalf("%s: %d bytes after the end: %v", source, len(rest), err)
			}
			if !bytes.HasSuffix(compressed, rest) {
				t.Fatalf("%s: other bytes after the end", source)
			}
			if err := z.ReadFull(make([]byte, 1)); err != io.EOF {
				t.Fatalf("%s: more bytes after the end: %v", source, err)
			}
		}
	})
}
