// SPDX-License-Identifier: GPL-3.0-or-later

package lzip

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/ulikunitz/xz/lzma"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var must = testhelp.Must

// compress makes a member with an encoder that is not ours.
func compress(t testing.TB, data []byte, code byte) []byte {
	t.Helper()
	dict, ok := parseDictionary(code)
	if !ok {
		t.Fatalf("dictionary code %#x", code)
	}
	var b bytes.Buffer
	w, err := lzma.WriterConfig{
		Properties: &lzma.Properties{LC: 3, LP: 0, PB: 2},
		DictCap:    dict,
		EOSMarker:  true,
	}.NewWriter(&b)
	must(t, err)
	_, err = w.Write(data)
	must(t, err)
	must(t, w.Close())
	return wrap(code, b.Bytes()[lzma.HeaderLen:], data)
}

const (
	maxWindow = 128 << 20

	code4K  = 0x0C
	code64K = 0x10
	code1M  = 0x14
)

func noise(seed uint64, n int) []byte {
	b := make([]byte, n)
	var s [32]byte
	binary.LittleEndian.PutUint64(s[:], seed)
	rand.NewChaCha8(s).Read(b)
	return b
}

// words returns n bytes of something like text, the same for the same seed.
func words(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := noise(seed, 2000) // the vocabulary
	for i := range b {
		b[i] = 'a' + b[i]%16*(b[i]>>4)/9
	}
	for len(b) < 2000+n {
		at := r.IntN(2000*(1+r.IntN(2))/2 - 12)
		b = append(append(b, b[at:at+2+r.IntN(9)]...), ' ')
	}
	return b[2000 : 2000+n]
}

func decompress(data []byte) ([]byte, error) {
	z := NewReader(bytes.NewReader(data), maxDictionary)
	defer z.Close()
	return io.ReadAll(z)
}

// sources are the ways in which compressed data can arrive.
var sources = map[string]func(io.Reader) io.Reader{
	"whole":           func(r io.Reader) io.Reader { return r },
	"one byte":        iotest.OneByteReader,
	"half":            iotest.HalfReader,
	"error with data": iotest.DataErrReader,
}

func TestReader(t *testing.T) {
	zeros := make([]byte, 300000)
	var mixed []byte
	for i := range uint64(8) {
		mixed = append(mixed, words(i, 20000)...)
		mixed = append(mixed, noise(i, 5000)...)
		mixed = append(mixed, zeros[:7000]...)
	}
	join := func(ms ...[]byte) []byte { return bytes.Join(ms, nil) }
	tests := []struct {
		name       string
		compressed []byte
		data       []byte
	}{
		{"empty", compress(t, nil, code4K), nil},
		{"one byte", compress(t, []byte{7}, code4K), []byte{7}},
		{"zeros", compress(t, zeros, code64K), zeros},
		{"words, small dictionary", compress(t, words(1, 200000), code4K), words(1, 200000)},
		{"mixed", compress(t, mixed, code1M), mixed},
		{"noise", compress(t, noise(1, 100000), code64K), noise(1, 100000)},
		{
			"two members",
			join(compress(t, words(2, 1000), code4K), compress(t, words(3, 70000), code64K)),
			join(words(2, 1000), words(3, 70000)),
		},
		{
			"empty members",
			join(compress(t, nil, code4K), compress(t, nil, code1M), compress(t, words(4, 100), code4K), compress(t, nil, code4K)),
			words(4, 100),
		},
	}
	for _, test := range tests {
		for source, wrap := range sources {
			for _, small := range []bool{false, true} {
				if len(test.data) > 100000 && (source == "one byte" || small) && (source != "whole" || !small) {
					continue // slow, and nothing new
				}
				z := NewReader(wrap(bytes.NewReader(test.compressed)), maxWindow)
				var r io.Reader = z
				if small {
					r = iotest.OneByteReader(z)
				}
				if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, test.data) {
					t.Errorf("%s, %s: %d bytes, %v", test.name, source, len(got), err)
				}
				if _, err := z.Read(make([]byte, 1)); err != io.EOF {
					t.Errorf("%s, %s: %v after the end", test.name, source, err)
				}
				z.Close()
				if _, err := z.Read(make([]byte, 1)); err == nil || err == io.EOF {
					t.Errorf("%s: %v after Close", test.name, err)
				}
			}
		}
	}
}

// TestSymbols decodes members made of random symbols of all kinds, most of which refer to as much
// of the dictionary as there is.
func TestSymbols(t *testing.T) {
	n := 300000
	if testing.Short() {
		n = 50000
	}
	for seed := range uint64(6) {
		r := rand.New(rand.NewPCG(seed, 7))
		code := []byte{code4K, code64K, 0x2F + 1}[seed%3]
		dict, _ := parseDictionary(code)
		e := newMemberEncoder()
		e.literal(1)
		e.match(0, 2)
		for len(e.data) < n {
			length := 2 + r.IntN(272)
			if r.IntN(2) == 0 {
				length = 2 + r.IntN(20)
			}
			switch k := r.IntN(20); {
			case k < 8:
				e.literal(byte(r.IntN(256)))
			case k < 9:
				e.shortRepeat()
			case k < 12:
				e.repeat(r.IntN(4), length)
			case k < 14:
				e.match(uint32(r.IntN(min(len(e.data), 20))), length)
			case k < 15 && seed > 2:
				e.sync()
			case k < 17:
				e.match(uint32(min(len(e.data), dict)-1), length)
			default:
				e.match(uint32(r.IntN(min(len(e.data), dict))), length)
			}
		}
		want := e.data
		got, err := decompress(e.member(code))
		if err != nil {
			t.Errorf("seed %d: %v", seed, err)
		} else if !bytes.Equal(got, want) {
			t.Errorf("seed %d: wrong data", seed)
		}
	}
}

// TestLongestSymbol decodes the least likely of all symbols, starting from the least interval that
// there can be and others, and counts the input it takes.
func TestLongestSymbol(t *testing.T) {
	most := 0
	for _, rng := range []uint32{31 << 13, 1 << 20, 1<<24 - 1, 1 << 24, 1 << 30, 1<<32 - 1} {
		e := newMemberEncoder()
		e.rng = rng
		e.normalise()
		unlikely := func(p []uint16) {
			for i := range p {
				p[i] = 2017 // for 0, and all bits but that of isRep are 1
			}
		}
		m := &e.model
		unlikely(m.isMatch[:])
		m.isRep[0] = 31
		m.matchLen.choice, m.matchLen.choice2 = 2017, 2017
		unlikely(m.matchLen.high[:])
		unlikely(m.slot[3][:])
		unlikely(m.align[:])
		model := e.model
		e.marker(maxMatch)
		e.flush()

		d := new(decoder)
		d.src = bytes.NewReader(append(e.out, make([]byte, 100)...))
		must(t, d.initRange())
		d.rng, d.dictSize, d.model = uint64(rng), minDictionary, model
		if why := d.run(1, inputLimit); why != stopMarker {
			t.Fatalf("interval %#x: stopped with %d", rng, why)
		}
		most = max(most, int(d.ip)-5)
	}
	// One of these is what the marker reads beyond what another match does.
	if most-1 > maxSymbol || most < maxSymbol-2 {
		t.Errorf("the longest symbol takes %d bytes, maxSymbol is %d", most-1, maxSymbol)
	}
}

// TestSyncFlush reads a member made by lzlib 1.13 with LZ_compress_sync_flush.
func TestSyncFlush(t *testing.T) {
	compressed, err := os.ReadFile("testdata/sync-flush.lz")
	must(t, err)
	const text = "sync flush in lzlib "
	var want []byte
	for k := range 3 {
		for i := range 4000 {
			c := text[i*(k+1)%20]
			if i%97 == 0 {
				c++
			}
			want = append(want, c)
		}
	}
	got, err := decompress(compressed)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	for i := range compressed {
		got, err := decompress(compressed[:i])
		if err != io.ErrUnexpectedEOF || !bytes.HasPrefix(want, got) {
			t.Errorf("cut to %d bytes: %v", i, err)
		}
	}
}

func TestTruncated(t *testing.T) {
	e := newMemberEncoder()
	for _, c := range words(6, 300) {
		e.literal(c)
	}
	e.match(200, 273)
	e.match(7, 20)
	for _, c := range noise(6, 300) {
		e.literal(c)
	}
	data := bytes.Clone(e.data)
	m := e.member(code4K)
	for i := range m {
		if got, err := decompress(m[:i]); err != io.ErrUnexpectedEOF || !bytes.HasPrefix(data, got) {
			t.Errorf("cut to %d bytes: %v", i, err)
		}
	}
}

func TestErrors(t *testing.T) {
	good := compress(t, words(10, 1000), code4K)
	change := func(i int, b byte) []byte {
		m := bytes.Clone(good)
		if i < 0 {
			i += len(m)
		}
		m[i] ^= b
		return m
	}
	symbols := func(f func(e *memberEncoder)) []byte {
		e := newMemberEncoder()
		f(e)
		return e.member(code4K)
	}
	unended := newMemberEncoder()
	for _, c := range words(11, 400) {
		unended.literal(c)
	}
	unended.flush()
	tests := []struct {
		name string
		data []byte
		err  error
	}{
		{"nothing", nil, io.ErrUnexpectedEOF},
		{"other format", []byte("\x1f\x8b\x08\x00 and so on"), errFormat},
		{"version 0", change(4, 1), errFormat},
		{"version 2", change(4, 3), errFormat},
		{"dictionary below 4 KiB", change(5, code4K^0x0B), errFormat},
		{"dictionary below 4 KiB by fraction", change(5, code4K^0x2C), errFormat},
		{"dictionary above 512 MiB", change(5, code4K^0x1E), errFormat},
		{"dictionary above the limit", change(5, code4K^0x1C), errDictionary},
		{"first byte of the stream", change(6, 1), errFormat},
		{"code outside of the interval", append([]byte(magic+"\x0c\x00\xff\xff\xff\xff"), make([]byte, 40)...), errFormat},
		{"CRC", change(-20, 1), errFormat},
		{"data size", change(-16, 1), errFormat},
		{"data size, high byte", change(-9, 1), errFormat},
		{"member size", change(-8, 1), errFormat},
		{"member size, high byte", change(-1, 1), errFormat},
		{"no end marker", wrap(code4K, unended.out, unended.data), io.ErrUnexpectedEOF},
		{"garbage after the member", append(bytes.Clone(good), "garbage"...), errFormat},
		{"little garbage after the member", append(bytes.Clone(good), 0), io.ErrUnexpectedEOF},
		{"half a header after the member", append(bytes.Clone(good), magic...), io.ErrUnexpectedEOF},
		{"match with no data", symbols(func(e *memberEncoder) { e.match(0, 2) }), errFormat},
		{"repeat with no data", symbols(func(e *memberEncoder) { e.repeat(0, 2) }), errFormat},
		{"short repeat with no data", symbols(func(e *memberEncoder) { e.shortRepeat() }), errFormat},
		{"distance one too far", symbols(func(e *memberEncoder) { e.literal(1); e.literal(2); e.match(2, 2) }), errFormat},
		{"distance that wraps", symbols(func(e *memberEncoder) { e.literal(1); e.match(0xFFFFFFFE, 2) }), errFormat},
		{
			"distance beyond the dictionary",
			symbols(func(e *memberEncoder) {
				for range 5000 {
					e.literal(1)
				}
				e.match(minDictionary, 2)
			}),
			errFormat,
		},
		{"marker of length 4", symbols(func(e *memberEncoder) { e.literal(1); e.marker(4) }), errFormat},
		{"marker of length 273", symbols(func(e *memberEncoder) { e.literal(1); e.marker(273) }), errFormat},
		{"a member inside of the data", append(bytes.Clone(good[:len(good)-20]), good...), errFormat},
	}
	for _, test := range tests {
		for source, wrap := range sources {
			z := NewReader(wrap(bytes.NewReader(test.data)), maxWindow)
			_, err := io.ReadAll(z)
			if !errors.Is(err, test.err) {
				t.Errorf("%s, %s: %v", test.name, source, err)
			}
			if _, again := z.Read(make([]byte, 1)); again != err {
				t.Errorf("%s, %s: then %v", test.name, source, again)
			}
			z.Close()
		}
	}
}

// TestLastPieceIsChecked: an item that is one piece is not handed out at all if its CRC is wrong.
func TestLastPieceIsChecked(t *testing.T) {
	m := compress(t, words(12, 50000), code64K)
	m[len(m)-20]++
	if got, err := decompress(m); !errors.Is(err, errFormat) || len(got) != 0 {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func TestDictionary(t *testing.T) {
	seen := 0
	for code := range 256 {
		size, ok := parseDictionary(byte(code))
		b, f := code&31, code>>5
		var want int64
		if b >= 4 {
			want = 1<<b - int64(f)<<(b-4)
		}
		if wantOK := b <= 29 && want >= 4096; ok != wantOK || ok && int64(size) != want {
			t.Errorf("code %#x: %d, %t", code, size, ok)
		} else if ok {
			seen++
		}
	}
	if seen != 17*8+1 {
		t.Errorf("%d dictionary sizes", seen)
	}
	// All of them work, and cost next to nothing without data.
	for code := range 256 {
		if _, ok := parseDictionary(byte(code)); !ok {
			continue
		}
		m := compress(t, words(13, 200), code4K)
		m[5] = byte(code)
		got, err := decompress(m)
		if err != nil || len(got) != 200 {
			t.Errorf("code %#x: %v", code, err)
		}
	}
}

// TestMemory: the largest dictionary of the format takes no memory that data do not fill.
func TestMemory(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("needs /proc/self/smaps_rollup")
	}
	resident := func() (kib int) {
		b, err := os.ReadFile("/proc/self/smaps_rollup")
		if err != nil {
			t.Skip(err)
		}
		_, after, _ := strings.Cut(string(b), "Rss:")
		_, err = fmt.Sscan(after, &kib)
		must(t, err)
		return kib
	}
	m := compress(t, words(14, 100000), code64K)
	m[5] = 29
	z := NewReader(bytes.NewReader(m), maxDictionary)
	defer z.Close()
	before := resident()
	_, err := z.Read(make([]byte, 1))
	must(t, err)
	if more := resident() - before; more > 32<<10 {
		t.Errorf("%d KiB for 100000 bytes", more)
	}
}

func TestCopyMatch(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	buf := make([]byte, 1500)
	for i := range buf {
		buf[i] = byte(r.Uint32())
	}
	for n := 1; n <= 300; n++ {
		for gap := -700; gap <= 400; gap++ {
			if gap == 0 {
				continue
			}
			got, want := bytes.Clone(buf), bytes.Clone(buf)
			pos := 450
			copyMatch(got, pos, pos-gap, n)
			for i := range n {
				want[pos+i] = want[pos-gap+i]
			}
			if !bytes.Equal(got, want) {
				t.Fatalf("%d bytes from a distance of %d: wrong", n, gap)
			}
		}
	}
}

// TestWriter compresses, and decompresses with our reader and with lzip.
func TestWriter(t *testing.T) {
	for level, data := range map[int][]byte{1: nil, 2: noise(1, 1<<17+1), 5: words(2, 1<<18), 9: words(3, 1<<19)} {
		var b, again bytes.Buffer
		for _, to := range []*bytes.Buffer{&b, &again} {
			w, err := NewWriter(to, level)
			must(t, err)
			for piece := range slices.Chunk(data, 100000) {
				_, err := w.Write(piece)
				must(t, err)
			}
			must(t, w.Close())
		}
		if !bytes.Equal(b.Bytes(), again.Bytes()) {
			t.Errorf("level %d: other bytes the second time", level)
		}
		if got, err := decompress(b.Bytes()); err != nil || !bytes.Equal(got, data) {
			t.Errorf("level %d: %d of %d bytes, %v", level, len(got), len(data), err)
		}
		program, err := exec.LookPath("lzip")
		if err != nil {
			continue // our reader is strict
		}
		c := exec.Command(program, "-d")
		c.Stdin = &b
		if got, err := c.Output(); err != nil || !bytes.Equal(got, data) {
			t.Errorf("level %d: lzip makes %d of %d bytes of it, %v", level, len(got), len(data), err)
		}
	}
	for _, level := range []int{-1, 0, 10} {
		if _, err := NewWriter(&bytes.Buffer{}, level); err == nil {
			t.Errorf("level %d", level)
		}
	}
}

// TestWriterFails has errors of the writer below.
func TestWriterFails(t *testing.T) {
	for after := range 3 {
		w, err := NewWriter(&failing{left: after}, 1)
		if err == nil {
			_, err = w.Write(noise(1, 1<<20))
		}
		if err == nil {
			err = w.Close()
		}
		if err == nil {
			t.Errorf("no error after %d writes", after)
		}
	}
}

// failing fails after some writes.
type failing struct{ left int }

// Write implements io.Writer.
func (f *failing) Write(p []byte) (int, error) {
	if f.left == 0 {
		return 0, bytes.ErrTooLarge
	}
	f.left--
	return len(p), nil
}
