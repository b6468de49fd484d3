// SPDX-License-Identifier: GPL-3.0-or-later

package inflate

import (
	"encoding/binary"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/lzcopy"
)

// decodeFast decodes codes until the data reach end or less than fastInput bytes
// of input are left. It may write overshoot bytes beyond end.
//
// What is behind nbits bits in bits is the beginning of what comes next, or zero;
// adding the same again does not change it. So a refill is one load for any number
// of bits, and leaves at least 56: enough for five literals from the first table,
// or for a match, which has at most 48.
func (z *Reader) decodeFast(end int) error {
	in, out := &z.in, z.window[:]
	symbols, distances := &z.symbols, &z.distances
	bits, n := z.bits, z.nbits
	ip, pos := z.ip, z.pos
	limit := z.inEnd - fastInput
	var err error
	for ip <= limit && pos < end {
		bits |= binary.LittleEndian.Uint64(in[ip&(inputSize-1):]) << (n & 63)
		ip += int((63 - n) >> 3 & 7)
		n |= 56
		e := symbols[bits&(1<<symbolBits-1)]
		if e&entryLiteral != 0 {
			bits >>= e & takeMask
			n -= uint(e & takeMask)
			out[pos] = byte(e >> valueShift)
			pos++
			e = symbols[bits&(1<<symbolBits-1)]
			if e&entryLiteral != 0 {
				bits >>= e & takeMask
				n -= uint(e & takeMask)
				out[pos] = byte(e >> valueShift)
				pos++
				e = symbols[bits&(1<<symbolBits-1)]
				if e&entryLiteral != 0 {
					bits >>= e & takeMask
					n -= uint(e & takeMask)
					out[pos] = byte(e >> valueShift)
					pos++
					continue
				}
			}
			bits |= binary.LittleEndian.Uint64(in[ip&(inputSize-1):]) << (n & 63)
			ip += int((63 - n) >> 3 & 7)
			n |= 56
		}
		if e&entryOther != 0 {
			if e&entryTable != 0 {
				bits >>= symbolBits
				n -= symbolBits
				e = symbols[int(e>>valueShift)+int(bits&(1<<(e>>codeShift&codeMask)-1))]
				if e&entryLiteral != 0 {
					bits >>= e & takeMask
					n -= uint(e & takeMask)
					out[pos] = byte(e >> valueShift)
					pos++
					continue
				}
			}
			if e&entryOther != 0 {
				bits >>= e & takeMask
				n -= uint(e & takeMask)
				if e>>valueShift == entryEnd>>valueShift {
					z.phase = atBlock
				} else {
					err = formatError("code")
				}
				break
			}
		}
		length := int(e>>valueShift) + int(bits&(1<<(e&takeMask)-1)>>(e>>codeShift&codeMask))
		bits >>= e & takeMask
		n -= uint(e & takeMask)

		e = distances[bits&(1<<distanceBits-1)]
		if e&entryOther != 0 {
			if e&entryTable != 0 {
				bits >>= distanceBits
				n -= distanceBits
				e = distances[int(e>>valueShift)+int(bits&(1<<(e>>codeShift&codeMask)-1))]
			}
			if e&entryOther != 0 {
				err = formatError("code of a distance")
				break
			}
		}
		distance := int(e>>valueShift) + int(bits&(1<<(e&takeMask)-1)>>(e>>codeShift&codeMask))
		bits >>= e & takeMask
		n -= uint(e & takeMask)
		if distance > pos {
			err = formatError("distance beyond the data")
			break
		}
		if distance >= 16 && length <= 16 {
			*(*[16]byte)(out[pos:]) = *(*[16]byte)(out[pos-distance:])
		} else {
			lzcopy.Match(out, pos, pos-distance, length)
		}
		pos += length
	}
	z.bits, z.nbits = bits&(1<<n-1), n
	z.ip, z.pos = ip, pos
	return err
}

// decodeSlowly decodes one code, or as many as there are, near the end of the
// source.
func (z *Reader) decodeSlowly(end int) error {
	for z.pos < end && z.available() < fastInput {
		z.load()
		// What is missing counts as zero until it is used.
		bits, n := z.bits, z.nbits
		short := func(e entry) bool { return uint(e&takeMask) > n }
		e := z.symbols[bits&(1<<symbolBits-1)]
		if e&entryTable != 0 && e&entryOther != 0 && !short(e) {
			bits >>= symbolBits
			n -= symbolBits
			e = z.symbols[int(e>>valueShift)+int(bits&(1<<(e>>codeShift&codeMask)-1))]
		}
		if short(e) {
			return z.inputError()
		}
		value := int(e>>valueShift) & (1<<15 - 1)
		further := int(bits & (1<<(e&takeMask) - 1) >> (e >> codeShift & codeMask))
		bits >>= e & takeMask
		n -= uint(e & takeMask)
		switch {
		case e&entryLiteral != 0:
			z.window[z.pos] = byte(value)
			z.pos++
			z.bits, z.nbits = bits, n
			continue
		case e&entryOther != 0:
			if value != int(entryEnd>>valueShift) {
				return formatError("code")
			}
			z.bits, z.nbits = bits, n
			z.phase = atBlock
			return nil
		}
		length := value + further

		e = z.distances[bits&(1<<distanceBits-1)]
		if e&entryTable != 0 && e&entryOther != 0 && !short(e) {
			bits >>= distanceBits
			n -= distanceBits
			e = z.distances[int(e>>valueShift)+int(bits&(1<<(e>>codeShift&codeMask)-1))]
		}
		if short(e) {
			return z.inputError()
		}
		if e&entryOther != 0 {
			return formatError("code of a distance")
		}
		distance := int(e>>valueShift) + int(bits&(1<<(e&takeMask)-1)>>(e>>codeShift&codeMask))
		if distance > z.pos {
			return formatError("distance beyond the data")
		}
		z.bits, z.nbits = bits>>(e&takeMask), n-uint(e&takeMask)
		lzcopy.Match(z.window[:], z.pos, z.pos-distance, length)
		z.pos += length
	}
	return nil
}
