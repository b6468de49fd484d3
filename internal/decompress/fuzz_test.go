// SPDX-License-Identifier: GPL-3.0-or-later

package decompress

import (
	"bytes"
	"compress/gzip"
	"encoding/hex"
	"errors"
	"io"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

var methods = []string{"none", "gzip", "lzip", "zstd", "xz", "bzip2"}

// others decompress with other packages, as far as they accept the same.
var others = map[string]func([]byte) (io.Reader, error){
	"gzip": func(b []byte) (io.Reader, error) { return gzip.NewReader(bytes.NewReader(b)) },
	"zstd": func(b []byte) (io.Reader, error) {
		return zstd.NewReader(bytes.NewReader(b), zstd.WithDecoderConcurrency(1),
			zstd.WithDecoderMaxMemory(1<<24), zstd.WithDecoderMaxWindow(1<<24))
	},
	"xz": func(b []byte) (io.Reader, error) {
		return xz.ReaderConfig{}.NewReader(bytes.NewReader(b))
	},
}

func FuzzOpen(f *testing.F) {
	small := archive(20, 300)
	for i, method := range methods {
		if method == "bzip2" {
			b, err := hex.DecodeString(foxBzip2)
			must(f, err)
			f.Add(byte(i), b)
			continue
		}
		compressed := compressors[method](f, small)
		f.Add(byte(i), compressed)
		f.Add(byte(i), append(bytes.Clone(compressed), compressors[method](f, nil)...))
	}
	f.Add(byte(1), gzipMember(f, 31, "\x03\x00abcname\x00comment\x00", true, small))
	f.Add(byte(4), xzData(f, small, xz.WriterConfig{DictCap: 1 << 16, CheckSum: xz.SHA256, BlockSize: 100}))
	f.Fuzz(func(t *testing.T, m byte, data []byte) {
		method := methods[int(m)%len(methods)]
		const limit = 1 << 20
		if method == "xz" && bytes.IndexByte(data, 0x21) >= 0 {
			// The dictionary is made before there are data; so that this does not only clear
			// memory, the large ones are left to TestXz.
			i := bytes.IndexByte(data, 0x21)
			if i+2 < len(data) && data[i+2] > 20 {
				return
			}
		}
		z := open(t, method, bytes.NewReader(data))
		got, err := io.ReadAll(io.LimitReader(z, limit))
		must(t, z.Close())

		z = open(t, method, iotest.HalfReader(bytes.NewReader(data)))
		again, errAgain := io.ReadAll(io.LimitReader(z, limit))
		must(t, z.Close())
		if (err == nil) != (errAgain == nil) || err == nil && !bytes.Equal(got, again) {
			t.Fatalf("%s: %d bytes, %v; in small parts %d bytes, %v", method, len(got), err, len(again), errAgain)
		}
		if len(got) == limit {
			return
		}
		if errors.Is(err, io.EOF) {
			t.Fatalf("%s: %v", method, err)
		}

		other := others[method]
		if other == nil {
			return
		}
		r, errOther := other(data)
		var want []byte
		if errOther == nil {
			want, errOther = io.ReadAll(io.LimitReader(r, limit))
		}
		if err == nil && errOther == nil && !bytes.Equal(got, want) {
			t.Fatalf("%s: other data than those of another package", method)
		}
		// The other reader of xz takes an end too early for an end.
		if err != nil && errOther == nil && len(want) < limit && method == "gzip" {
			t.Fatalf("%s: %v; another package accepts it", method, err)
		}
	})
}
