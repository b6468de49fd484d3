// SPDX-License-Identifier: GPL-3.0-or-later

package lzip

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"testing"
	"testing/iotest"

	"github.com/ulikunitz/xz/lzma"
)

const fuzzDictionary = 1 << 20

// oracle decodes all members with a decoder that is not ours. strict says that it accepts them;
// lenient, that it does not, but for something that lzip permits.
func oracle(data []byte) (out []byte, strict, lenient bool) {
	r := bytes.NewReader(data)
	for n := 0; ; n++ {
		if r.Len() == 0 {
			return out, n > 0, false
		}
		var h [headerSize]byte
		if _, err := io.ReadFull(r, h[:]); err != nil {
			return out, false, false
		}
		began := len(data) - r.Len() - headerSize
		dict, err := parseHeader(h)
		if err != nil || dict > fuzzDictionary {
			return out, false, false
		}
		header := []byte{0x5D, 0, 0, 0, 0}
		binary.LittleEndian.PutUint32(header[1:], uint32(dict))
		header = append(header, "\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF"...)
		// One byte at a time, so that it stops behind the marker.
		z, err := lzma.NewReader(&joined{header, r})
		if err != nil {
			return out, false, false
		}
		member, err := io.ReadAll(io.LimitReader(z, 8<<20))
		out = append(out, member...)
		if err != nil {
			// A code that is not 0 behind the marker is no error for lzip. A sync-flush marker is
			// an end marker for this decoder.
			return out, false, z.EOSMarker()
		}
		t := make([]byte, trailerSize)
		if _, err := io.ReadFull(r, t); err != nil {
			return out, false, z.EOSMarker()
		}
		if binary.LittleEndian.Uint32(t) != crc32.ChecksumIEEE(member) ||
			binary.LittleEndian.Uint64(t[4:]) != uint64(len(member)) ||
			binary.LittleEndian.Uint64(t[12:]) != uint64(len(data)-r.Len()-began) {
			return out, false, z.EOSMarker()
		}
	}
}

// joined reads header and then r, byte by byte.
type joined struct {
	header []byte
	r      *bytes.Reader
}

func (j *joined) ReadByte() (byte, error) {
	if len(j.header) > 0 {
		b := j.header[0]
		j.header = j.header[1:]
		return b, nil
	}
	return j.r.ReadByte()
}

func (j *joined) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	b, err := j.ReadByte()
	if err != nil {
		return 0, err
	}
	p[0] = b
	return 1, nil
}

func FuzzReader(f *testing.F) {
	names, err := filepath.Glob(filepath.Join("..", "..", "testdata", "guix-mirror", "nar", "lzip", "*"))
	if err != nil {
		f.Fatal(err)
	}
	for _, name := range append(names, "testdata/sync-flush.lz") {
		data, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
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
	if len(got) == limit {
		return
	}
	want, strict, lenient := oracle(data)
	switch {
	case err == nil && strict:
		if !bytes.Equal(got, want) {
			t.Fatal("data other than the oracle's")
		}
	case err == nil && !lenient:
		t.Fatal("accepted, and the oracle does not")
	case err != nil && strict:
		// A marker that is not an end marker is one for the oracle.
		if !bytes.Contains([]byte(err.Error()), []byte("marker")) && !bytes.Contains([]byte(err.Error()), []byte("beginning")) {
			t.Fatalf("the oracle accepts it: %v", err)
		}
	}
}
