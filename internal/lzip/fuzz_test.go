// SPDX-License-Identifier: GPL-3.0-or-later

package lzip

import (
	"bytes"
	"encoding/binary"
	"io"
	"os"
	"path/filepath"
	"testing"
	"testing/iotest"

	"github.com/ulikunitz/xz/lzma"
)

const fuzzDictionary = 1 << 20

func FuzzReader(f *testing.F) {
	names, err := filepath.Glob(filepath.Join("..", "..", "testdata", "guix-mirror", "nar", "lzip", "*"))
	must(f, err)
	for _, name := range append(names, "testdata/sync-flush.lz") {
		data, err := os.ReadFile(name)
		must(f, err)
		if len(data) < 2000 {
			f.Add(data)
		}
	}
	small := compress(f, words(30, 300), code4K)
	f.Add(small)
	f.Add(append(bytes.Clone(small), compress(f, make([]byte, 9000), code4K)...))
	f.Add(bytes.Repeat(compress(f, []byte("x"), code4K), 4))
	e := newMemberEncoder()
	for i := range 40 {
		e.literal(byte(i))
		e.match(uint32(i/2), 2+i*6)
		e.repeat(i%4, 2+i)
		e.shortRepeat()
	}
	f.Add(e.member(code4K))
	f.Fuzz(func(t *testing.T, data []byte) {
		// Let the checks of the trailer be passed.
		for _, fix := range []bool{false, true} {
			if fix {
				if data = withTrailer(data); data == nil {
					return
				}
			}
			check(t, data)
		}
	})
}

// withTrailer replaces the trailer of the first member, wherever that ends, by the right one.
func withTrailer(data []byte) []byte {
	d := new(decoder)
	defer d.close()
	d.src = bytes.NewReader(data)
	if d.begin(fuzzDictionary) != nil {
		return nil
	}
	var size int
	for {
		p, err := d.next()
		size += len(p)
		if err == io.EOF {
			return nil // it is right
		}
		if err != nil {
			break
		}
		if size > 4<<20 {
			return nil
		}
	}
	// The trailer was read, and is not right.
	end := int(d.inOff) + int(d.ip)
	if end < headerSize+5+trailerSize || end > len(data) {
		return nil
	}
	fixed := bytes.Clone(data)
	t := fixed[end-trailerSize:]
	binary.LittleEndian.PutUint32(t, d.crc)
	binary.LittleEndian.PutUint64(t[4:], d.size)
	binary.LittleEndian.PutUint64(t[12:], uint64(end))
	return fixed
}

func check(t *testing.T, data []byte) {
	const limit = 4 << 20
	read := func(r io.Reader) ([]byte, error) {
		z := NewReader(r, fuzzDictionary)
		defer z.Close()
		return io.ReadAll(io.LimitReader(z, limit))
	}
	got, err := read(bytes.NewReader(data))
	slow, errSlow := read(iotest.HalfReader(bytes.NewReader(data)))
	if (err == nil) != (errSlow == nil) {
		t.Fatalf("%v, in small parts %v", err, errSlow)
	}
	if err == nil && !bytes.Equal(got, slow) {
		t.Fatal("different data")
	}
	if err != nil {
		return
	}
	// The first member begins with what another decoder makes of it, for which a sync-flush marker
	// is the end.
	dict, _ := parseHeader([headerSize]byte(data))
	header := binary.LittleEndian.AppendUint32([]byte{0x5D}, uint32(dict))
	header = append(header, "\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF"...)
	other, err := lzma.NewReader(io.MultiReader(bytes.NewReader(header), bytes.NewReader(data[headerSize:])))
	if err != nil {
		t.Fatalf("accepted, and another decoder does not: %v", err)
	}
	want, err := io.ReadAll(io.LimitReader(other, limit))
	if err == nil && !bytes.HasPrefix(got, want) {
		t.Fatal("data other than those of another decoder")
	}
}
