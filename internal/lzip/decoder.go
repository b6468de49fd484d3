// SPDX-License-Identifier: GPL-3.0-or-later

package lzip

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"

	"golang.org/x/sys/unix"
)

const (
	// inputSize is a power of two that a 16-bit number counts up to, so that the position needs no
	// check.
	inputSize = 1 << 16
	// inputLimit is how many bytes of it are used: enough is left that a symbol that starts at the
	// last of them does not go around.
	inputLimit = inputSize - 64

	// pieceSize is how much is decoded at a time, in bytes: little enough that it is still in the
	// second-level cache when it is checked, hashed and written.
	pieceSize = 64 << 10
	// leastPiece is how much is handed out, in bytes, before input is waited for.
	leastPiece = 16 << 10

	// leastRing is the least size of a window, in bytes; it lets pieces of members with a small
	// dictionary be large nevertheless.
	leastRing = 4 * pieceSize
	// ringSlack is how much the ring is larger than the dictionary, in bytes: what is written
	// beyond a match never destroys what can still be referred to.
	ringSlack = 1 << 12
)

// A decoder decodes one member at a time from its source, into a window that is the dictionary and
// the output at once.
type decoder struct {
	// The range decoder and the state of the LZMA decoder.
	rng, code              uint64
	state                  uint64
	rep0, rep1, rep2, rep3 uint32
	prev                   byte
	ip                     uint16 // next byte of in
	dictSize               uint64 // bytes

	// The window is a ring of ring bytes; what lies behind it takes the part of a match that
	// crosses its end. full says that the ring has been filled once.
	window []byte
	ring   int
	pos    int
	full   bool
	start  int // data from here to pos are not handed out yet

	in    [inputSize]byte
	inEnd int
	inErr error // what the source has ended with
	inOff int64 // position of in[0] in the source
	src   io.Reader

	began   int64 // position of the member's header in the source
	size    uint64
	crc     uint32
	pending bool // a range decoder must be initialised

	model model
}

// close gives the window back.
func (d *decoder) close() {
	if d.window == nil {
		return
	}
	if err := unix.Munmap(d.window); err != nil {
		panic(err) // it fails only for what is not such memory
	}
	d.window = nil
}

// available is how many bytes of input are in memory.
func (d *decoder) available() int { return d.inEnd - int(d.ip) }

// need reads until n bytes of input are in memory. It returns io.ErrUnexpectedEOF if the source
// ends before.
func (d *decoder) need(n int) error {
	if d.available() >= n {
		return nil
	}
	copy(d.in[:], d.in[d.ip:d.inEnd])
	d.inOff += int64(d.ip)
	d.inEnd -= int(d.ip)
	d.ip = 0
	for idle := 0; d.inErr == nil && d.inEnd < n; {
		m, err := d.src.Read(d.in[d.inEnd:inputLimit])
		d.inEnd += m
		d.inErr = err
		if m > 0 {
			idle = 0
		} else if idle++; idle == 100 && err == nil {
			d.inErr = io.ErrNoProgress
		}
	}
	if d.inEnd >= n {
		return nil
	}
	return d.inputError()
}

// inputError is the error for a member that is not complete when the source has ended.
func (d *decoder) inputError() error {
	if d.inErr == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return d.inErr
}

// begin reads the header of a member. It returns io.EOF if the source ends where a header would
// begin.
func (d *decoder) begin(maxDict int) error {
	if err := d.need(headerSize); err != nil {
		if err == io.ErrUnexpectedEOF && d.available() == 0 {
			return io.EOF
		}
		return err
	}
	dict, err := parseHeader([headerSize]byte(d.in[d.ip:]))
	if err != nil {
		return err
	}
	if dict > maxDict {
		return fmt.Errorf("%w: %d bytes, the limit is %d", errDictionary, dict, maxDict)
	}
	d.began = d.inOff + int64(d.ip)
	d.ip += headerSize

	ring := ringFor(dict)
	if len(d.window) < ring+maxMatch+slack {
		d.close()
		// Memory outside of the heap is taken only where it is written to, whatever a header asks
		// for, and given back at once: two items in a row never hold two windows.
		d.window, err = unix.Mmap(-1, 0, ring+maxMatch+slack, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		if err != nil {
			return fmt.Errorf("memory for a window of %d bytes: %w", ring, err)
		}
		d.ring = ring
	}
	d.dictSize = uint64(dict)
	d.pos, d.start, d.full = 0, 0, false
	d.state, d.prev = 0, 0
	d.rep0, d.rep1, d.rep2, d.rep3 = 0, 0, 0, 0
	d.size, d.crc = 0, 0
	d.model.reset()
	d.pending = true
	return nil
}

// ringFor is the least size of the window, in bytes, for a dictionary.
func ringFor(dict int) int { return max(dict+ringSlack, leastRing) &^ (posStates - 1) }

// next returns the next piece of the member, which stays as it is until the next call, and io.EOF
// with the last one, when the trailer was read and is right. With another error there is no piece.
func (d *decoder) next() ([]byte, error) {
	if d.pos >= d.ring {
		// The data from ring on belong at the beginning.
		n := copy(d.window, d.window[d.ring:d.pos])
		d.pos, d.start, d.full = n, 0, true
	}
	end := min(d.start+pieceSize, d.ring)
	for {
		if d.pending {
			if err := d.initRange(); err != nil {
				return nil, err
			}
		}
		if d.available() < maxSymbol && d.inErr == nil {
			if d.pos-d.start >= leastPiece {
				return d.piece(), nil
			}
			if err := d.need(maxSymbol); err != nil && err != io.ErrUnexpectedEOF {
				return nil, err
			}
		}
		// A trailer follows the last symbol, an end marker, which itself takes more than one byte.
		// So where the source has ended, no symbol of a whole member starts later than this either,
		// and what is decoded before the end is noticed does not come from beyond it.
		why := d.run(end, d.inEnd-maxSymbol)
		if int(d.ip) > d.inEnd {
			return nil, d.inputError()
		}
		switch why {
		case stopFull:
			return d.piece(), nil
		case stopInput:
			if d.inErr != nil {
				return nil, d.inputError()
			}
		case stopSync:
			d.pending = true
		case stopEnd:
			piece := d.piece()
			if err := d.trailer(); err != nil {
				return nil, err
			}
			return piece, io.EOF
		case stopDistance:
			return nil, formatError("distance beyond the data")
		default:
			return nil, formatError("marker of an unknown kind")
		}
	}
}

// piece takes what was decoded and not handed out yet.
func (d *decoder) piece() []byte {
	p := d.window[d.start:d.pos:d.pos]
	if d.pos > d.ring {
		// What lies behind the ring comes with the next piece, once it is where it belongs.
		p = d.window[d.start:d.ring:d.ring]
	}
	d.start += len(p)
	d.size += uint64(len(p))
	d.crc = crc32.Update(d.crc, crc32.IEEETable, p)
	return p
}

// initRange starts a range-coded stream: the first byte is always zero, and four bytes of code
// follow. A code that is not below the interval cannot be.
func (d *decoder) initRange() error {
	if err := d.need(5); err != nil {
		return err
	}
	b := d.in[d.ip : d.ip+5]
	d.ip += 5
	d.rng, d.code = 0xFFFFFFFF, uint64(binary.BigEndian.Uint32(b[1:]))
	d.pending = false
	if b[0] != 0 || d.code >= d.rng {
		return formatError("bad beginning of the compressed data")
	}
	return nil
}

// trailer reads the trailer and compares it with what was decoded.
func (d *decoder) trailer() error {
	if err := d.need(trailerSize); err != nil {
		return err
	}
	t := d.in[d.ip : d.ip+trailerSize]
	d.ip += trailerSize
	member := uint64(d.inOff + int64(d.ip) - d.began)
	if crc := binary.LittleEndian.Uint32(t); crc != d.crc {
		return formatError("CRC of the data is %08x instead of %08x", d.crc, crc)
	}
	if size := binary.LittleEndian.Uint64(t[4:]); size != d.size {
		return formatError("%d bytes of data instead of %d", d.size, size)
	}
	if size := binary.LittleEndian.Uint64(t[12:]); size != member {
		return formatError("member of %d bytes instead of %d", member, size)
	}
	return nil
}
