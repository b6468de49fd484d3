// SPDX-License-Identifier: GPL-3.0-or-later

package decompress

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

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
	member := compressors["lzip"](t, data)
	for log := byte(16); log <= 29; log++ {
		member[5] = log
		got, err := decompress(t, "lzip", member)
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
	// Streams with padding between and after them.
	padded := bytes.Join([][]byte{plain, make([]byte, 8), plain, make([]byte, 4)}, nil)
	if got, err := decompress(t, "xz", padded); err != nil || !bytes.Equal(got, append(bytes.Clone(data), data...)) {
		t.Errorf("padded: %v", err)
	}
	for _, bad := range [][]byte{append(bytes.Clone(plain), 0), append(make([]byte, 4), plain...)} {
		if _, err := decompress(t, "xz", bad); err == nil {
			t.Error("wrong padding: no error")
		}
	}

	// Code 30 is 128 MiB, 31 is 192 MiB, 40 is 4 GiB - 1.
	for code := range byte(45) {
		var err error
		var got []byte
		took := testhelp.Allocated(func() { got, err = decompress(t, "xz", setXzDictionary(plain, code)) })
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
	if took := testhelp.Allocated(func() {
		if got, err := decompress(t, "xz", many); !errors.Is(err, io.ErrUnexpectedEOF) || len(got) != 0 {
			t.Errorf("empty blocks: %d bytes, %v", len(got), err)
		}
	}); took > 129<<20 {
		t.Errorf("empty blocks: %d bytes of memory", took)
	}
}
