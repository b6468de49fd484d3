// SPDX-License-Identifier: GPL-3.0-or-later

package decompress

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"runtime"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
	fast "github.com/xi2/xz"
)

// gzipMember makes a member with any header.
func gzipMember(t testing.TB, flags byte, fields string, headerCRC bool, data []byte) []byte {
	m := append([]byte{0x1F, 0x8B, 8, flags, 1, 2, 3, 4, 2, 255}, fields...)
	if headerCRC {
		m = binary.LittleEndian.AppendUint16(m, uint16(crc32.ChecksumIEEE(m)))
	}
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, 9)
	must(t, err)
	write(t, w, data)
	m = append(m, b.Bytes()...)
	m = binary.LittleEndian.AppendUint32(m, crc32.ChecksumIEEE(data))
	return binary.LittleEndian.AppendUint32(m, uint32(len(data)))
}

func TestGzipHeader(t *testing.T) {
	data := []byte("data of a member")
	change := func(m []byte, i int) []byte {
		if i < 0 {
			i += len(m)
		}
		m[i] ^= 1
		return m
	}
	const gzipHeaderCRC, gzipExtra, gzipName, gzipComment = 2, 4, 8, 16 // RFC 1952, section 2.3.1
	long := strings.Repeat("n", 511)
	tests := []struct {
		name   string
		member []byte
		good   bool
	}{
		{"plain", gzipMember(t, 0, "", false, data), true},
		{"text", gzipMember(t, 1, "", false, data), true},
		{"name", gzipMember(t, gzipName, "name\x00", false, data), true},
		{"no name", gzipMember(t, gzipName, "\x00", false, data), true},
		{"comment", gzipMember(t, gzipComment, "comment\x00", false, data), true},
		{"extra", gzipMember(t, gzipExtra, "\x05\x00extra", false, data), true},
		{"no extra", gzipMember(t, gzipExtra, "\x00\x00", false, data), true},
		{"CRC", gzipMember(t, gzipHeaderCRC, "", true, data), true},
		{"everything", gzipMember(t, 31, "\x03\x00abcname\x00comment\x00", true, data), true},
		{"long name", gzipMember(t, gzipName, long+"\x00", false, data), true},
		{"too long name", gzipMember(t, gzipName, long+"n\x00", false, data), false},
		{"too long comment", gzipMember(t, gzipComment, long+"n\x00", false, data), false},
		{"wrong CRC of the header", change(gzipMember(t, gzipName|gzipHeaderCRC, "name\x00", true, data), 11), false},
		{"reserved flag", gzipMember(t, 0x20, "", false, data), false},
		{"method", change(gzipMember(t, 0, "", false, data), 2), false},
		{"magic", change(gzipMember(t, 0, "", false, data), 1), false},
		{"CRC of the data", change(gzipMember(t, 0, "", false, data), -8), false},
		{"size of the data", change(gzipMember(t, 0, "", false, data), -4), false},
	}
	for _, test := range tests {
		got, err := decompress(t, "gzip", test.member)
		if test.good && (err != nil || !bytes.Equal(got, data)) {
			t.Errorf("%s: %q, %v", test.name, got, err)
		}
		if !test.good && !errors.Is(err, gzip.ErrHeader) && !errors.Is(err, gzip.ErrChecksum) {
			t.Errorf("%s: %v", test.name, err)
		}
		// As a second member it is the same, except that what is not a member at all is ignored.
		first := gzipMember(t, 0, "", false, data)
		got, err = decompress(t, "gzip", append(first, test.member...))
		switch {
		case test.name == "magic":
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("garbage after a member: %q, %v", got, err)
			}
		case test.good:
			if err != nil || len(got) != 2*len(data) {
				t.Errorf("%s, second: %q, %v", test.name, got, err)
			}
		case !errors.Is(err, gzip.ErrHeader) && !errors.Is(err, gzip.ErrChecksum):
			t.Errorf("%s, second: %v", test.name, err)
		}
	}
}

func TestZstdFrames(t *testing.T) {
	data := archive(10, 5000)
	frame := zstdWindow(t, data, 1<<20)
	skippable := func(kind byte, n int) []byte {
		b := []byte{0x50 | kind, 0x2A, 0x4D, 0x18}
		b = binary.LittleEndian.AppendUint32(b, uint32(n))
		return append(b, make([]byte, n)...)
	}
	compressed := bytes.Join([][]byte{skippable(0, 0), frame, skippable(15, 100000), skippable(3, 7), frame, skippable(1, 1)}, nil)
	if got, err := decompress(t, "zstd", compressed); err != nil || !bytes.Equal(got, append(data, data...)) {
		t.Errorf("with skippable frames: %d bytes, %v", len(got), err)
	}
	for _, cut := range []int{2, 5, 8} {
		skip := skippable(0, 1)
		if _, err := decompress(t, "zstd", skip[:cut]); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("skippable frame cut to %d bytes: %v", cut, err)
		}
	}
	if _, err := decompress(t, "zstd", append(frame[:len(frame)-4:len(frame)-4], "\xde\xad\xbe\xef"...)); !errors.Is(err, zstd.ErrCRCMismatch) {
		t.Errorf("wrong checksum: %v", err)
	}
}

// heap is how much memory f takes from the heap, in bytes, freed or not.
func heap(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

func TestWindows(t *testing.T) {
	data := archive(11, 3000)
	for log := 10; log <= 29; log++ {
		got, err := decompress(t, "zstd", zstdWindow(t, data, 1<<log))
		if log > 27 {
			if !errors.Is(err, zstd.ErrWindowSizeExceeded) && !errors.Is(err, zstd.ErrDecoderSizeExceeded) {
				t.Errorf("zstd, window of 1<<%d bytes: %v", log, err)
			}
		} else if err != nil || !bytes.Equal(got, data) {
			t.Errorf("zstd, window of 1<<%d bytes: %v", log, err)
		}
	}
	lzip := compressors["lzip"](t, data)
	for log := byte(16); log <= 29; log++ {
		lzip[5] = log
		got, err := decompress(t, "lzip", lzip)
		if (err == nil) != (log <= 27) || err == nil && !bytes.Equal(got, data) {
			t.Errorf("lzip, dictionary of 1<<%d bytes: %v", log, err)
		}
	}
}

// setXzDictionary changes the dictionary size in the first block header.
func setXzDictionary(compressed []byte, code byte) []byte {
	b := bytes.Clone(compressed)
	header := b[12 : 12+(int(b[12])+1)*4]
	i := bytes.IndexByte(header, 0x21) // LZMA2
	header[i+2] = code
	n := len(header) - 4
	binary.LittleEndian.PutUint32(header[n:], crc32.ChecksumIEEE(header[:n]))
	return b
}

func TestXz(t *testing.T) {
	data := archive(12, 3000)
	plain := xzData(t, data, xz.WriterConfig{DictCap: 1 << 16})
	for _, check := range []byte{xz.None, xz.CRC32, xz.CRC64, xz.SHA256} {
		c := xz.WriterConfig{DictCap: 1 << 16, CheckSum: check, NoCheckSum: check == xz.None, BlockSize: 700}
		compressed := xzData(t, data, c)
		if got, err := decompress(t, "xz", compressed); err != nil || !bytes.Equal(got, data) {
			t.Errorf("check %d: %v", check, err)
		}
		// Streams with padding between and after them.
		padded := bytes.Join([][]byte{compressed, make([]byte, 8), plain, make([]byte, 4)}, nil)
		if got, err := decompress(t, "xz", padded); err != nil || !bytes.Equal(got, append(bytes.Clone(data), data...)) {
			t.Errorf("check %d, padded: %v", check, err)
		}
		for _, n := range []int{1, 2, 3, 5} {
			if _, err := decompress(t, "xz", append(bytes.Clone(compressed), make([]byte, n)...)); err == nil {
				t.Errorf("check %d, %d bytes of padding: no error", check, n)
			}
		}
	}
	if _, err := decompress(t, "xz", append(make([]byte, 4), plain...)); !errors.Is(err, fast.ErrFormat) {
		t.Errorf("padding first: %v", err)
	}

	// Code 30 is 128 MiB, 31 is 192 MiB, 40 is 4 GiB - 1.
	for code := range byte(45) {
		var err error
		var got []byte
		took := heap(func() { got, err = decompress(t, "xz", setXzDictionary(plain, code)) })
		if (err == nil) != (code <= 30) || err == nil && !bytes.Equal(got, data) {
			t.Errorf("dictionary code %d: %v", code, err)
		}
		if code > 30 && took > 1<<20 {
			t.Errorf("dictionary code %d: %d bytes of memory", code, took)
		}
	}

	// Blocks with nothing in them and large dictionaries take the memory of one.
	block := setXzDictionary(plain, 30)[12 : 12+(int(plain[12])+1)*4]
	block = append(bytes.Clone(block), 0, 0, 0, 0) // no chunk, padding
	block = append(block, make([]byte, 8)...)      // CRC-64 of nothing
	many := append(bytes.Clone(plain[:12]), bytes.Repeat(block, 1000)...)
	if took := heap(func() {
		if got, err := decompress(t, "xz", many); !errors.Is(err, io.ErrUnexpectedEOF) || len(got) != 0 {
			t.Errorf("empty blocks: %d bytes, %v", len(got), err)
		}
	}); took > 129<<20 {
		t.Errorf("empty blocks: %d bytes of memory", took)
	}

	// An index of other blocks than there are.
	one := xzData(t, data, xz.WriterConfig{DictCap: 1 << 16})
	two := xzData(t, data, xz.WriterConfig{DictCap: 1 << 16, BlockSize: 2000})
	end := func(b []byte) int { // where the index begins
		return len(b) - 12 - (int(binary.LittleEndian.Uint32(b[len(b)-8:]))+1)*4
	}
	for _, mixed := range [][]byte{
		append(bytes.Clone(one[:end(one)]), two[end(two):]...),
		append(bytes.Clone(two[:end(two)]), one[end(one):]...),
	} {
		if got, err := decompress(t, "xz", mixed); !errors.Is(err, fast.ErrData) || !bytes.Equal(got, data) {
			t.Errorf("other index: %d bytes, %v", len(got), err)
		}
	}
}
