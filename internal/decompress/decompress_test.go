// SPDX-License-Identifier: GPL-3.0-or-later

package decompress

import (
	"bytes"
	"compress/gzip"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os/exec"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/lzip"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

// archive makes n bytes, half of which repeat.
func archive(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, 0, n+200)
	for len(b) < n {
		if d := 1 + r.IntN(50000); r.IntN(2) == 0 && d < len(b) {
			for range 4 + r.IntN(80) {
				b = append(b, b[len(b)-d])
			}
			continue
		}
		for range r.IntN(40) {
			b = append(b, byte('a'+r.IntN(26)*r.IntN(26)/26))
		}
	}
	return b[:n]
}

var must = testhelp.Must

func write(t testing.TB, w io.WriteCloser, data []byte) {
	t.Helper()
	_, err := w.Write(data)
	must(t, err)
	must(t, w.Close())
}

// A quick brown fox in bzip2, which no Go package here can make.
const (
	fox      = "The quick brown fox\n"
	foxBzip2 = "425a6839314159265359bfb56a8600000253800010400004001b69b2c0200031434d3000503468f51a7ea86d3dd92abf90462025f177245385090bfb56a860"
)

// compressors make data of each method but bzip2.
var compressors = map[string]func(t testing.TB, data []byte) []byte{
	"none": func(t testing.TB, data []byte) []byte { return data },
	"gzip": func(t testing.TB, data []byte) []byte {
		var b bytes.Buffer
		write(t, gzip.NewWriter(&b), data)
		return b.Bytes()
	},
	"lzip": func(t testing.TB, data []byte) []byte {
		var b bytes.Buffer
		w, err := lzip.NewWriter(&b, 1)
		must(t, err)
		write(t, w, data)
		return b.Bytes()
	},
	"zstd": func(t testing.TB, data []byte) []byte { return zstdWindow(t, data, 1<<17) },
	"xz": func(t testing.TB, data []byte) []byte {
		return xzData(t, data, xz.WriterConfig{DictCap: 1 << 16, CheckSum: xz.CRC64})
	},
}

// zstdWindow makes a frame with a window of so many bytes, even for little data.
func zstdWindow(t testing.TB, data []byte, window int) []byte {
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b, zstd.WithWindowSize(window), zstd.WithEncoderConcurrency(1),
		zstd.WithZeroFrames(true), zstd.WithSingleSegment(false))
	must(t, err)
	// In two parts, so that the size is not known at the beginning.
	_, err = w.Write(data[:len(data)/2])
	must(t, err)
	must(t, w.Flush())
	write(t, w, data[len(data)/2:])
	return b.Bytes()
}

func xzData(t testing.TB, data []byte, c xz.WriterConfig) []byte {
	var b bytes.Buffer
	w, err := c.NewWriter(&b)
	must(t, err)
	write(t, w, data)
	return b.Bytes()
}

var sources = map[string]func(io.Reader) io.Reader{
	"whole":           func(r io.Reader) io.Reader { return r },
	"one byte":        iotest.OneByteReader,
	"half":            iotest.HalfReader,
	"error with data": iotest.DataErrReader,
}

func open(t testing.TB, method string, r io.Reader) *Reader {
	t.Helper()
	z, err := Open(method, r)
	if err != nil {
		t.Fatalf("%s: %v", method, err)
	}
	return z
}

func decompress(t testing.TB, method string, compressed []byte) ([]byte, error) {
	t.Helper()
	z := open(t, method, bytes.NewReader(compressed))
	defer z.Close()
	return io.ReadAll(z)
}

// TestMethods decompresses data, and several such in one, one of which is nothing.
func TestMethods(t *testing.T) {
	for method, compress := range compressors {
		for _, sizes := range [][]int{{1}, {1000}, {120000}, {70000, 0, 500, 70000}} {
			var data, compressed []byte
			for _, n := range sizes {
				part := archive(uint64(n), n)
				data, compressed = append(data, part...), append(compressed, compress(t, part)...)
			}
			for source, wrap := range sources {
				z := open(t, method, wrap(bytes.NewReader(compressed)))
				got, err := io.ReadAll(z)
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("%s, %s: %d bytes of %d, %v", method, source, len(got), len(data), err)
				}
				if k, err := z.Read(make([]byte, 5)); k != 0 || err != io.EOF {
					t.Errorf("%s, %s: %d bytes and %v after the end", method, source, k, err)
				}
				z.Close()
				z.Close() // once more
				if _, err := z.Read(make([]byte, 5)); err == nil || err == io.EOF {
					t.Errorf("%s: %v after Close", method, err)
				}
			}
		}
	}
}

func TestBzip2(t *testing.T) {
	compressed, err := hex.DecodeString(foxBzip2)
	must(t, err)
	if got, err := decompress(t, "bzip2", compressed); err != nil || string(got) != fox {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := decompress(t, "bzip2", append(bytes.Clone(compressed), compressed...)); err != nil || string(got) != fox+fox {
		t.Errorf("two streams: %q, %v", got, err)
	}
	for i := range compressed {
		if got, err := decompress(t, "bzip2", compressed[:i]); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut to %d bytes: %q, %v", i, got, err)
		}
	}
}

func TestUnknownMethod(t *testing.T) {
	for _, method := range []string{"", "lz4", "GZIP", "gzip ", strings.Repeat("x\x1b", 500)} {
		z, err := Open(method, strings.NewReader(""))
		if !errors.Is(err, errUnknownMethod) || z != nil {
			t.Errorf("%.20q: %v", method, err)
		} else if len(err.Error()) > 300 || strings.ContainsRune(err.Error(), '\x1b') {
			t.Errorf("%.20q: error %q", method, err)
		}
	}
}

func TestTruncated(t *testing.T) {
	data := archive(3, 500)
	broken := errors.New("broken")
	for method, compress := range compressors {
		if method == "none" {
			continue
		}
		compressed := compress(t, data)
		joined := len(compressed)
		compressed = append(compressed, compress(t, archive(4, 50))...)
		want := append(bytes.Clone(data), archive(4, 50)...)
		for i := range compressed {
			if i == joined {
				continue
			}
			got, err := decompress(t, method, compressed[:i])
			if method == "gzip" && i == joined+1 && err == nil && bytes.Equal(got, data) {
				continue // one byte that follows may be anything
			}
			if !errors.Is(err, io.ErrUnexpectedEOF) || !strings.HasPrefix(err.Error(), method+": ") {
				t.Errorf("%s, cut to %d bytes of %d: %v", method, i, len(compressed), err)
			}
			if !bytes.HasPrefix(want, got) {
				t.Errorf("%s, cut to %d bytes: wrong data", method, i)
			}
			z := open(t, method, io.MultiReader(bytes.NewReader(compressed[:i]), iotest.ErrReader(broken)))
			_, err = io.ReadAll(z)
			if !errors.Is(err, broken) {
				t.Errorf("%s, broken after %d bytes: %v", method, i, err)
			}
			if _, again := z.Read(make([]byte, 1)); again != err {
				t.Errorf("%s, broken after %d bytes: then %v", method, i, again)
			}
			z.Close()
		}
	}
}

// TestDamaged: whatever byte is wrong, the data come out right or with an error.
func TestDamaged(t *testing.T) {
	data := archive(5, 250)
	for method, compress := range compressors {
		if method == "none" {
			continue
		}
		compressed := compress(t, data)
		accepted := 0
		for i := range compressed {
			for _, x := range []byte{0x01, 0x80, 0xFF} {
				bad := bytes.Clone(compressed)
				bad[i] ^= x
				got, err := decompress(t, method, bad)
				if err != nil {
					continue
				}
				if accepted++; !bytes.Equal(got, data) {
					t.Errorf("%s, byte %d: wrong data without an error", method, i)
				}
			}
		}
		// The time and the system in a gzip header, and a few others, do not matter.
		if accepted > 24 {
			t.Errorf("%s: %d changes go unnoticed", method, accepted)
		}
	}
}

func TestGarbage(t *testing.T) {
	data := archive(6, 3000)
	for method, compress := range compressors {
		if method == "none" {
			continue
		}
		compressed := compress(t, data)
		for _, garbage := range []string{"\x00", "\x00\x00\x00\x00\x00", "garbage, and more of it", "\x1f\x8a", "LZIQ\x01\x10"} {
			got, err := decompress(t, method, append(bytes.Clone(compressed), garbage...))
			if ignored := err == nil && bytes.Equal(got, data); ignored != (method == "gzip") {
				t.Errorf("%s and %q: %v", method, garbage, err)
			}
		}
		if _, err := decompress(t, method, []byte("this is not compressed at all")); err == nil {
			t.Errorf("%s: garbage accepted", method)
		}
	}
}

// TestForeign: what is not compressed as was said is shown, and the method is named once.
func TestForeign(t *testing.T) {
	for _, method := range methods {
		for _, page := range []string{"<!DOCTYPE html>", "<", "<html><body>Please log in</body></html>"} {
			_, err := decompress(t, method, []byte(page))
			if method == "none" {
				continue
			}
			if err == nil || !strings.HasPrefix(err.Error(), method) || strings.Count(err.Error(), method) != 1 ||
				!strings.HasSuffix(err.Error(), fmt.Sprintf("it begins with %q", page[:min(24, len(page))])) {
				t.Errorf("%s and %q: %v", method, page, err)
			}
		}
	}
	damaged := compressors["gzip"](t, nil)
	damaged[len(damaged)-1] ^= 1
	if _, err := decompress(t, PerhapsGzip, damaged); err == nil || strings.Count(err.Error(), "gzip") != 1 {
		t.Errorf("gzip: %v", err)
	}
	// What breaks off, or is damaged later, is not shown.
	for method, compress := range compressors {
		good := compress(t, archive(4, 50))
		for _, bad := range [][]byte{good[:len(good)-1], append(bytes.Clone(good[:len(good)/2]), make([]byte, 100)...)} {
			z := open(t, method, iotest.OneByteReader(bytes.NewReader(bad)))
			if _, err := io.Copy(io.Discard, z); method != "none" && (err == nil || strings.Count(err.Error(), method) != 1 || strings.Contains(err.Error(), "begins")) {
				t.Errorf("%s: %v", method, err)
			}
			z.Close()
		}
	}
}

// TestBuffer: a source with all the data in memory is not decompressed as a whole.
func TestBuffer(t *testing.T) {
	zeros := make([]byte, 16<<20)
	for _, method := range []string{"gzip", "zstd"} {
		compressed := compressors[method](t, zeros)
		took := testhelp.Allocated(func() {
			z := open(t, method, bytes.NewBuffer(compressed))
			if n, err := z.Read(make([]byte, 1000)); n == 0 || err != nil {
				t.Errorf("%s: %d bytes, %v", method, n, err)
			}
			z.Close()
		})
		if took > 4<<20 {
			t.Errorf("%s: %d bytes of memory", method, took)
		}
	}
}

func TestPrograms(t *testing.T) {
	data := append(archive(8, 150000), make([]byte, 100000)...)
	tests := []struct{ method, command string }{
		{"gzip", "gzip -1"},
		{"gzip", "gzip -9"},
		{"gzip", "pigz"},
		{"lzip", "lzip -0"},
		{"lzip", "lzip -9"},
		{"lzip", "lzip -s 4KiB"},
		{"lzip", "lzip -b 100000"},
		{"lzip", "plzip -6"},
		{"lzip", "plzip -B 65536 -0"},
		{"zstd", "zstd -1"},
		{"zstd", "zstd -19"},
		{"zstd", "zstd -T2 -B100000"},
		{"zstd", "zstd --ultra -22 --long=27"},
		{"zstd", "pzstd"},
		{"xz", "xz -0"},
		{"xz", "xz -9e"},
		{"xz", "xz -T2 --block-size=100000"},
		{"xz", "xz --block-size=50000 --check=none"},
		{"xz", "xz --check=crc32"},
		{"xz", "xz --check=sha256 --lzma2=lc=0,lp=3,pb=0"},
		{"bzip2", "bzip2 -1"},
		{"bzip2", "bzip2 -9"},
	}
	for _, test := range tests {
		t.Run(test.command, func(t *testing.T) {
			f := strings.Fields(test.command)
			if _, err := exec.LookPath(f[0]); err != nil {
				t.Skipf("the program %s is not installed", f[0])
			}
			c := exec.Command(f[0], append(f[1:], "-c")...)
			c.Stdin = bytes.NewReader(data)
			compressed, err := c.Output()
			must(t, err)
			got, err := decompress(t, test.method, compressed)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
}

// Memory for the window is no more than what comes out can need, whatever the compressor has taken.
func TestSmallWindow(t *testing.T) {
	contents := bytes.Repeat([]byte("0123456789abcdef, and so on; "), 30000)
	compressed := zstdWindow(t, contents, 64<<20)
	used := func(most int64) uint64 {
		return testhelp.Allocated(func() {
			z, err := OpenAtMost("zstd", bytes.NewReader(compressed), most)
			must(t, err)
			defer z.Close()
			got, err := io.ReadAll(io.LimitReader(z, int64(len(contents))+1))
			if err != nil || !bytes.Equal(got, contents) {
				t.Fatalf("%d bytes of %d, %v", len(got), len(contents), err)
			}
		})
	}
	if narrow, wide := used(int64(len(contents))), used(maxWindow); narrow+(32<<20) > wide {
		t.Errorf("%d bytes of memory, and %d with the whole window", narrow, wide)
	}
	// Further frames have windows as they say, which are no larger than usual ones.
	for window, want := range map[int]error{8 << 20: nil, 64 << 20: zstd.ErrWindowSizeExceeded} {
		frame := zstdWindow(t, contents, window)
		z, err := OpenAtMost("zstd", io.MultiReader(bytes.NewReader(frame), bytes.NewReader(frame)), int64(2*len(contents)))
		must(t, err)
		n, err := io.Copy(io.Discard, z)
		if !errors.Is(err, want) || want == nil && n != int64(2*len(contents)) {
			t.Errorf("frames with windows of %d bytes: %d bytes, %v", window, n, err)
		}
		z.Close()
	}
}
