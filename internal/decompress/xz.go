// SPDX-License-Identifier: GPL-3.0-or-later

package decompress

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"io"
	"math"
	"slices"

	"github.com/ulikunitz/xz/lzma"
)

// errXz is in the chain of errors about the container.
var errXz = errors.New("invalid xz data")

func xzError(format string, a ...any) error {
	return fmt.Errorf("%w: %s", errXz, fmt.Sprintf(format, a...))
}

const (
	xzMagic       = "\xFD7zXZ\x00"
	xzFooterMagic = "YZ"
	xzLZMA2       = 0x21

	// A decoder, with a dictionary of its own, is made for each block. Those of all blocks together
	// may have this many bytes, and so many more per byte of data, so that a stream of small blocks
	// with large dictionaries, which nothing makes, does not keep a machine busy.
	xzDictionaries        = 1 << 30
	xzDictionariesPerByte = 64
)

var crc64Table = crc64.MakeTable(crc64.ECMA)

// An xzReader decompresses the .xz format (https://tukaani.org/xz/xz-file-format.txt, version
// 1.2.1) with its one usual filter, LZMA2. What is decoded by the library is the contents of a
// block; the container is read here, because the library's reader for it makes a dictionary of any
// size that a header gives.
type xzReader struct {
	in    *xzInput
	begun bool
	flags [2]byte

	// The block at hand.
	block   io.Reader // nil between blocks
	check   hash.Hash // nil if there is none
	first   int64     // position of its header
	began   int64     // position of its compressed data
	sizes   [2]int64  // of the compressed data and of the data, or -1
	blockN  int64     // bytes of data so far
	data    int64     // bytes of data of all blocks so far
	windows int64     // bytes of the dictionaries so far

	inStream bool
	blocks   uint64 // of the stream
}

func newXzReader(r *bufio.Reader) *xzReader { return &xzReader{in: &xzInput{r: r}} }

func (x *xzReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for {
		if x.block != nil {
			n, err := x.block.Read(p)
			x.blockN += int64(n)
			x.data += int64(n)
			if x.check != nil {
				x.check.Write(p[:n])
			}
			switch {
			case err != nil && x.in.err != nil:
				// The cause is the source; the library does not say so.
				err = noEOF(x.in.err)
			case err == io.EOF:
				err = x.endBlock()
			case err == io.ErrUnexpectedEOF:
				err = xzError("compressed data")
			}
			if n > 0 || err != nil {
				return n, err
			}
			continue
		}
		if err := x.next(); err != nil {
			return 0, err
		}
	}
}

// next reads what comes before the data of the next block. It returns io.EOF at the end of the last
// stream.
func (x *xzReader) next() error {
	if !x.inStream {
		if err := x.streamHeader(); err != nil {
			return err
		}
	}
	x.first = x.in.n
	size, err := x.in.ReadByte()
	if err != nil {
		return noEOF(err)
	}
	if size == 0 {
		return x.index()
	}
	header := make([]byte, (int(size)+1)*4)
	header[0] = size
	if err := x.in.full(header[1:]); err != nil {
		return err
	}
	return x.blockHeader(header)
}

// streamHeader reads the header of a stream, and padding before it if it is not the first.
func (x *xzReader) streamHeader() error {
	var b [12]byte
	for {
		n, err := io.ReadFull(x.in, b[:4])
		if err == io.EOF && x.begun && n == 0 {
			return io.EOF
		}
		if err != nil {
			return noEOF(err)
		}
		if !x.begun || !zeros(b[:4]) {
			break
		}
	}
	if err := x.in.full(b[4:]); err != nil {
		return err
	}
	if string(b[:6]) != xzMagic {
		return xzError("no stream header")
	}
	if crc32.ChecksumIEEE(b[6:8]) != binary.LittleEndian.Uint32(b[8:]) {
		return xzError("CRC of a stream header")
	}
	x.flags = [2]byte(b[6:8])
	if _, err := newCheck(x.flags); err != nil {
		return err
	}
	x.begun, x.inStream, x.blocks = true, true, 0
	return nil
}

func newCheck(flags [2]byte) (hash.Hash, error) {
	if flags[0] == 0 {
		switch flags[1] {
		case 0:
			return nil, nil
		case 1:
			return crc32.NewIEEE(), nil
		case 4:
			return crc64.New(crc64Table), nil
		case 10:
			return sha256.New(), nil
		}
	}
	return nil, xzError("unknown flags %#x of a stream", flags)
}

func (x *xzReader) blockHeader(b []byte) error {
	n := len(b) - 4
	if crc32.ChecksumIEEE(b[:n]) != binary.LittleEndian.Uint32(b[n:]) {
		return xzError("CRC of a block header")
	}
	flags := b[1]
	if flags&0x3C != 0 {
		return xzError("unknown flags %#x of a block", flags)
	}
	r := bytes.NewReader(b[2:n])
	x.sizes = [2]int64{-1, -1}
	for i, flag := range []byte{0x40, 0x80} {
		if flags&flag != 0 {
			left := r.Len()
			size, err := binary.ReadUvarint(r)
			if err != nil || size > math.MaxInt64 || left-r.Len() != len(binary.AppendUvarint(nil, size)) {
				return xzError("block header")
			}
			x.sizes[i] = int64(size)
		}
	}
	filter := make([]byte, 3)
	if _, err := io.ReadFull(r, filter); err != nil || flags&3 != 0 || filter[0] != xzLZMA2 || filter[1] != 1 {
		return xzError("filters other than LZMA2")
	}
	if !zeros(b[n-r.Len() : n]) {
		return xzError("unknown contents of a block header")
	}
	dictionary, err := lzma.DecodeDictCap(filter[2])
	if err != nil {
		return xzError("size of a dictionary")
	}
	if dictionary > maxWindow {
		return fmt.Errorf("dictionary of %d bytes, the limit is %d", dictionary, maxWindow)
	}
	if x.sizes[1] >= 0 {
		dictionary = max(min(dictionary, x.sizes[1]), lzma.MinDictCap)
	}
	x.windows += dictionary
	if x.windows > xzDictionaries+xzDictionariesPerByte*x.data {
		return xzError("small blocks with large dictionaries")
	}
	x.began, x.blockN = x.in.n, 0
	x.check, _ = newCheck(x.flags)
	x.block, err = lzma.Reader2Config{DictCap: int(dictionary)}.NewReader2(x.in)
	if err != nil {
		return noEOF(err)
	}
	return nil
}

// endBlock reads what comes after the data of a block.
func (x *xzReader) endBlock() error {
	x.block = nil
	compressed := x.in.n - x.began
	if x.sizes[0] >= 0 && x.sizes[0] != compressed || x.sizes[1] >= 0 && x.sizes[1] != x.blockN {
		return xzError("sizes of a block")
	}
	if err := x.in.padding(compressed); err != nil {
		return err
	}
	if x.check != nil {
		want := make([]byte, x.check.Size())
		if err := x.in.full(want); err != nil {
			return err
		}
		got := x.check.Sum(nil)
		if x.flags[1] != 10 { // the CRCs are written with the low byte first
			slices.Reverse(got)
		}
		if !bytes.Equal(got, want) {
			return xzError("checksum of a block")
		}
	}
	x.blocks++
	return nil
}

// index reads the index, behind its first byte, and the footer. What it says of blocks, the length
// of each with its header and that of its data, is of no use here.
func (x *xzReader) index() error {
	x.in.crc = crc32.NewIEEE()
	x.in.crc.Write([]byte{0})
	// Numbers are as those of package binary: seven bits in each byte, the low ones first.
	blocks, err := binary.ReadUvarint(x.in)
	if err == nil && blocks != x.blocks {
		err = xzError("index of another number of blocks than %d", x.blocks)
	}
	for range 2 * x.blocks {
		if err == nil {
			_, err = binary.ReadUvarint(x.in)
		}
	}
	if err != nil {
		return noEOF(err)
	}
	if err := x.in.padding(x.in.n - x.first); err != nil {
		return err
	}
	crc := x.in.crc.Sum32()
	x.in.crc = nil
	size := x.in.n - x.first // without its CRC
	var b [4 + 12]byte
	if err := x.in.full(b[:]); err != nil {
		return err
	}
	footer := b[4:]
	switch {
	case binary.LittleEndian.Uint32(b[:]) != crc:
		return xzError("CRC of the index")
	case binary.LittleEndian.Uint32(footer) != crc32.ChecksumIEEE(footer[4:10]):
		return xzError("CRC of the footer")
	case int64(binary.LittleEndian.Uint32(footer[4:])) != size/4:
		return xzError("size of the index")
	case [2]byte(footer[8:10]) != x.flags || string(footer[10:]) != xzFooterMagic:
		return xzError("footer")
	}
	x.inStream = false
	return nil
}

func zeros(b []byte) bool { return bytes.Count(b, []byte{0}) == len(b) }

// An xzInput counts what is read through it.
type xzInput struct {
	r   *bufio.Reader
	n   int64
	crc hash.Hash32 // of what is read, if not nil
	err error       // the first error
}

func (i *xzInput) Read(p []byte) (int, error) {
	n, err := i.r.Read(p)
	i.note(p[:n], err)
	return n, err
}

func (i *xzInput) ReadByte() (byte, error) {
	b, err := i.r.ReadByte()
	if err != nil {
		i.note(nil, err)
		return 0, err
	}
	i.n++
	if i.crc != nil {
		i.crc.Write([]byte{b})
	}
	return b, nil
}

func (i *xzInput) note(p []byte, err error) {
	i.n += int64(len(p))
	if i.crc != nil {
		i.crc.Write(p)
	}
	if err != nil && i.err == nil {
		i.err = err
	}
}

// full reads all of p.
func (i *xzInput) full(p []byte) error {
	_, err := io.ReadFull(i, p)
	return noEOF(err)
}

// padding reads what makes n a multiple of four.
func (i *xzInput) padding(n int64) error {
	b := make([]byte, -n&3)
	if err := i.full(b); err != nil {
		return err
	}
	if !zeros(b) {
		return xzError("padding")
	}
	return nil
}
