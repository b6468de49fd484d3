// SPDX-License-Identifier: GPL-3.0-or-later

package decompress

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"testing"
	"testing/iotest"

	"github.com/ulikunitz/xz"
)

var methods = []string{"none", "gzip", "lzip", "zstd", "xz", "bzip2"}

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
	f.Add(byte(4), xzData(f, small, xz.WriterConfig{DictCap: 1 << 16, CheckSum: xz.SHA256, BlockSize: 100}))
	f.Fuzz(func(t *testing.T, m byte, data []byte) {
		method := methods[int(m)%len(methods)]
		const limit = 1 << 20
		// The dictionary is made before there are data; so that this does not only clear memory,
		// the large ones are left to TestXz.
		if i := bytes.IndexByte(data, 0x21); method == "xz" && i >= 0 && i+2 < len(data) && data[i+2] > 20 {
			return
		}
		z := open(t, method, bytes.NewReader(data))
		got, err := io.ReadAll(io.LimitReader(z, limit))
		z.Close()

		z = open(t, method, iotest.HalfReader(bytes.NewReader(data)))
		again, errAgain := io.ReadAll(io.LimitReader(z, limit))
		z.Close()
		if (err == nil) != (errAgain == nil) || err == nil && !bytes.Equal(got, again) {
			t.Fatalf("%s: %d bytes, %v; in small parts %d bytes, %v", method, len(got), err, len(again), errAgain)
		}
		if errors.Is(err, io.EOF) {
			t.Fatalf("%s: %v", method, err)
		}
	})
}
