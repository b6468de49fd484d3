// SPDX-License-Identifier: GPL-3.0-or-later

// Package inflate decompresses DEFLATE (RFC 1951) from a stream. Gzip is what
// every substitute server offers, and this package takes about half of the
// processor time that zlib and the usual Go packages take. Start with [NewReader].
//
// A [Reader] does not read more of the compressed stream than it must know of: what
// follows it, such as the trailer of a gzip member, is there for [Reader.ReadFull].
package inflate

import (
	"errors"
	"fmt"
	"io"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/lzcopy"
)

// ErrFormat is in the chain of every error that says that the data are not sound
// DEFLATE data. Data that end too early are not among them: those give
// io.ErrUnexpectedEOF.
var ErrFormat = errors.New("invalid deflate data")

func formatError(what string) error { return fmt.Errorf("%w: %s", ErrFormat, what) }

const (
	history  = 32 << 10 // farthest distance, in bytes
	maxMatch = 258

	inputSize = 64 << 10
	// padding lets the fast loop load eight bytes at any place of the input.
	padding = 8
	// fastInput is how many bytes of input one turn of the fast loop may need.
	fastInput = 16

	// pieceSize is how much is decoded at a time, in bytes.
	pieceSize = 64 << 10
	// leastPiece is how much is handed out, in bytes, before input is waited for.
	leastPiece = 16 << 10
	// overshoot is how far one turn of the fast loop may write beyond the end of
	// a piece.
	overshoot = 8 + maxMatch + lzcopy.Slack
	// The window moves down when this much is in it.
	windowSize = history + 4*pieceSize
)

type phase uint8

const (
	atBlock  phase = iota // a block header follows
	inStored              // stored bytes of a block follow
	inCodes               // codes of a block follow
)

// A Reader decompresses one DEFLATE stream after the other. It is not safe for
// concurrent use.
type Reader struct {
	// Bits of the input that are taken from in and not yet used, the next one
	// lowest, and their number.
	bits  uint64
	nbits uint

	ip    int // next byte of in
	inEnd int
	inErr error // what the source has ended with
	src   io.Reader

	pos    int // where the next byte of data goes in window
	start  int // data from here to pos were not handed out yet
	phase  phase
	last   bool // the block is the last
	stored int  // bytes left of a stored block
	err    error

	symbols   [symbolSize]entry
	distances [distanceSize]entry
	lengths   [1 << lengthBits]entry

	in     [inputSize + padding]byte
	window [windowSize + overshoot]byte
}

// NewReader returns a Reader for the stream that r begins with. It reads from r
// only when data are asked for, in pieces of up to 64 KiB.
func NewReader(r io.Reader) *Reader { return &Reader{src: r} }

// Reset makes z ready for another stream, which follows what was read so far.
func (z *Reader) Reset() {
	z.align()
	z.pos, z.start, z.phase, z.last, z.err = 0, 0, atBlock, false, nil
}

// Next returns the next piece of the data, which is never empty, belongs to z and
// stays as it is until the next call of any method; and io.EOF after the last. It
// returns io.ErrUnexpectedEOF if the source ends before the stream does, an error
// with [ErrFormat] in its chain, or the error of the source.
func (z *Reader) Next() ([]byte, error) {
	if z.pos >= windowSize {
		copy(z.window[:history], z.window[z.pos-history:z.pos])
		z.pos = history
	}
	z.start = z.pos
	end := min(z.pos+pieceSize, windowSize)
	for z.pos < end && z.err == nil {
		if z.available() < fastInput && z.inErr == nil {
			if z.pos-z.start >= leastPiece {
				break
			}
			z.fill(fastInput)
		}
		switch z.phase {
		case atBlock:
			z.err = z.block()
		case inStored:
			z.err = z.copyStored(end)
		case inCodes:
			if z.available() >= fastInput {
				z.err = z.decodeFast(end)
			} else {
				z.err = z.decodeSlowly(end)
			}
		}
	}
	if z.pos == z.start {
		return nil, z.err
	}
	return z.window[z.start:z.pos:z.pos], nil
}

// ReadFull fills p from what follows the stream, from the next whole byte on. It
// returns io.EOF if there is nothing, io.ErrUnexpectedEOF if there is less, or the
// error of the source.
func (z *Reader) ReadFull(p []byte) error {
	z.align()
	for n := 0; n < len(p); {
		if z.available() == 0 {
			if z.fill(1); z.available() == 0 {
				if z.inErr == io.EOF && n > 0 {
					return io.ErrUnexpectedEOF
				}
				return z.inErr
			}
		}
		m := copy(p[n:], z.in[z.ip:z.inEnd])
		z.ip += m
		n += m
	}
	return nil
}

func (z *Reader) available() int { return z.inEnd - z.ip }

// fill reads until n bytes of input are in memory, besides those that bits has, or
// the source ends.
func (z *Reader) fill(n int) {
	n += int(z.nbits >> 3)
	z.giveBack()
	copy(z.in[:], z.in[z.ip:z.inEnd])
	z.inEnd -= z.ip
	z.ip = 0
	for idle := 0; z.inErr == nil && z.inEnd < n; {
		m, err := z.src.Read(z.in[z.inEnd:inputSize])
		z.inEnd += m
		z.inErr = err
		if m > 0 {
			idle = 0
		} else if idle++; idle == 100 && err == nil {
			z.inErr = io.ErrNoProgress
		}
	}
}

// inputError is the error for a stream that is not complete when the source has
// ended.
func (z *Reader) inputError() error {
	if z.inErr == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return z.inErr
}

// giveBack puts whole bytes back from bits to the input. They are still there: only
// fill moves it.
func (z *Reader) giveBack() {
	z.ip -= int(z.nbits >> 3)
	z.nbits &= 7
	z.bits &= 1<<z.nbits - 1
}

// align drops the rest of a byte that was begun.
func (z *Reader) align() {
	z.giveBack()
	z.bits, z.nbits = 0, 0
}

// want sees to it that n bits, at most 32, are in bits. With an error, all that
// there are have been put there.
func (z *Reader) want(n uint) error {
	if z.nbits >= n {
		return nil
	}
	if z.nbits+8*uint(z.available()) < n {
		z.fill(int(n+7) / 8)
	}
	z.load()
	if z.nbits < n {
		return z.inputError()
	}
	return nil
}

// load takes as many bytes from the input as bits has room for.
func (z *Reader) load() {
	for z.nbits <= 56 && z.available() > 0 {
		z.bits |= uint64(z.in[z.ip]) << z.nbits
		z.ip++
		z.nbits += 8
	}
}

// take returns the next n bits, which must be there.
func (z *Reader) take(n uint) int {
	v := z.bits & (1<<n - 1)
	z.bits >>= n
	z.nbits -= n
	return int(v)
}

// block reads the header of a block (RFC 1951, section 3.2.3).
func (z *Reader) block() error {
	if z.last {
		return io.EOF
	}
	if err := z.want(3); err != nil {
		return err
	}
	z.last = z.take(1) == 1
	switch z.take(2) {
	case 0:
		z.take(z.nbits & 7)
		if err := z.want(32); err != nil {
			return err
		}
		n, complement := z.take(16), z.take(16)
		if n != complement^0xFFFF {
			return formatError("length of a stored block")
		}
		z.align()
		z.stored, z.phase = n, inStored
		return nil
	case 1:
		z.fixedCodes()
		z.phase = inCodes
		return nil
	case 2:
		z.phase = inCodes
		return z.dynamicCodes()
	default:
		return formatError("type of a block")
	}
}

func (z *Reader) fixedCodes() {
	var l [symbols]uint8
	for i := range l {
		switch {
		case i < 144:
			l[i] = 8
		case i < 256:
			l[i] = 9
		case i < 280:
			l[i] = 7
		default:
			l[i] = 8
		}
	}
	build(z.symbols[:], symbolBits, l[:], symbolEntries[:])
	for i := range distances {
		l[i] = 5
	}
	build(z.distances[:], distanceBits, l[:distances], distanceEntries[:])
}

// lengthOrder is the order in which the lengths of the code of code lengths come.
var lengthOrder = [19]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// dynamicCodes reads the codes of a block (RFC 1951, section 3.2.7).
func (z *Reader) dynamicCodes() error {
	if err := z.want(14); err != nil {
		return err
	}
	nsymbols, ndistances, nlengths := z.take(5)+257, z.take(5)+1, z.take(4)+4
	if nsymbols > usedSymbols || ndistances > usedDistance {
		return formatError("number of codes")
	}
	var l [symbols + distances]uint8
	for _, i := range lengthOrder[:nlengths] {
		if err := z.want(3); err != nil {
			return err
		}
		l[i] = uint8(z.take(3))
	}
	if !build(z.lengths[:], lengthBits, l[:19], lengthEntries[:]) {
		return formatError("code of code lengths")
	}
	clear(l[:19])
	for i := 0; i < nsymbols+ndistances; {
		// A code and its further bits; what is beyond the end of the source
		// counts as zero until it is used.
		_ = z.want(lengthBits + 7)
		e := z.lengths[z.bits&(1<<lengthBits-1)]
		if e&entryOther != 0 {
			if z.nbits < lengthBits {
				return z.inputError()
			}
			return formatError("code length")
		}
		n := uint(e & takeMask)
		value := e >> valueShift
		extra := [...]uint{2, 3, 7}[max(int(value)-16, 0)]
		if value < 16 {
			extra = 0
		}
		if n+extra > z.nbits {
			return z.inputError()
		}
		z.take(n)
		if value < 16 {
			l[i] = uint8(value)
			i++
			continue
		}
		repeat := z.take(extra)
		fill := uint8(0)
		switch value {
		case 16:
			if i == 0 {
				return formatError("repeated code length")
			}
			repeat += 3
			fill = l[i-1]
		case 17:
			repeat += 3
		case 18:
			repeat += 11
		}
		if i+repeat > nsymbols+ndistances {
			return formatError("repeated code length")
		}
		for range repeat {
			l[i] = fill
			i++
		}
	}
	if l[256] == 0 {
		return formatError("no end of block")
	}
	if !build(z.symbols[:], symbolBits, l[:nsymbols], symbolEntries[:]) {
		return formatError("code of literals and lengths")
	}
	if !build(z.distances[:], distanceBits, l[nsymbols:nsymbols+ndistances], distanceEntries[:]) {
		return formatError("code of distances")
	}
	return nil
}

// copyStored copies bytes of a stored block.
func (z *Reader) copyStored(end int) error {
	for z.stored > 0 && z.pos < end {
		n := copy(z.window[z.pos:end], z.in[z.ip:min(z.inEnd, z.ip+z.stored)])
		z.ip += n
		z.pos += n
		z.stored -= n
		if n == 0 {
			if z.inErr != nil {
				return z.inputError()
			}
			z.fill(1)
		}
	}
	if z.stored == 0 {
		z.phase = atBlock
	}
	return nil
}
