// SPDX-License-Identifier: GPL-3.0-or-later

package decompress

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

// repeated gives the same bytes again and again and counts them.
type repeated struct {
	part []byte
	n    int64
}

func (r *repeated) Read(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		m := copy(p[n:], r.part[r.n%int64(len(r.part)):])
		n += m
		r.n += int64(m)
	}
	return n, nil
}

// TestNothing gives data without end that nothing comes out of: that has to end.
func TestNothing(t *testing.T) {
	const most = 4 << 20 // of what takes microseconds for each empty member
	emptyBzip2, err := hex.DecodeString("425a683917724538509000000000")
	must(t, err)
	nothing := map[string]struct {
		method string
		part   []byte
		first  []byte
	}{
		"gzip, members":  {method: "gzip", part: compressors["gzip"](t, nil)},
		"gzip, blocks":   {"gzip", []byte{0, 0, 0, 0xFF, 0xFF}, []byte("\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff")},
		"lzip, members":  {method: "lzip", part: compressors["lzip"](t, nil)},
		"zstd, frames":   {method: "zstd", part: compressors["zstd"](t, nil)},
		"zstd, skipped":  {method: "zstd", part: []byte("\x50\x2a\x4d\x18\x08\x00\x00\x0012345678")},
		"xz, streams":    {method: "xz", part: compressors["xz"](t, nil)},
		"xz, padding":    {"xz", make([]byte, 8), compressors["xz"](t, nil)},
		"bzip2, streams": {method: "bzip2", part: emptyBzip2},
	}
	for name, test := range nothing {
		t.Run(name, func(t *testing.T) {
			source := &repeated{part: test.part}
			z := open(t, test.method, io.MultiReader(bytes.NewReader(test.first), source))
			defer z.Close()
			n, err := z.Read(make([]byte, 100))
			if n != 0 || !errors.Is(err, errNothing) {
				t.Errorf("%d bytes, error %v", n, err)
			}
			if source.n > most {
				t.Errorf("after %d bytes", source.n)
			}
		})
	}
	// What a byte comes out of now and then has to end too.
	source := &repeated{part: append(bytes.Repeat(compressors["zstd"](t, nil), 1000), compressors["zstd"](t, []byte{1})...)}
	z := open(t, "zstd", source)
	defer z.Close()
	if n, err := io.Copy(io.Discard, z); n == 0 || !errors.Is(err, errNothing) || source.n > most {
		t.Errorf("%d bytes of %d, error %v", n, source.n, err)
	}
}

// TestContained checks that a fault of a decoder is an error.
func TestContained(t *testing.T) {
	for _, method := range methods {
		z := open(t, method, strings.NewReader(""))
		z.r = faulty{}
		for range 2 {
			_, err := z.Read(make([]byte, 10))
			testhelp.WantError(t, method, err, "decoder failed: index out of range")
		}
		z.Close()
	}
	if _, err := open(t, "none", iotest.ErrReader(errClosed)).Read(nil); err != errClosed {
		t.Errorf("error %v", err)
	}
}

type faulty struct{}

func (faulty) Read([]byte) (int, error) { panic("index out of range") }
