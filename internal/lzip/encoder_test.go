// SPDX-License-Identifier: GPL-3.0-or-later

package lzip

import (
	"encoding/binary"
	"hash/crc32"
	"math/bits"
)

// A memberEncoder makes a member out of symbols that its user chooses, sound or not, and keeps what
// they stand for, so that every kind of symbol can be tested, which no compressor promises to use.
type memberEncoder struct {
	model model
	state int
	rep   [4]uint32
	data  []byte // what the symbols so far stand for

	out     []byte // the member's LZMA stream
	low     uint64
	rng     uint32
	cache   byte
	pending int

	// While follow is set, literal chooses the bits that a decoder would read from a stream that
	// has code now and target after it.
	follow bool
	code   uint32
	target []byte
}

func newMemberEncoder() *memberEncoder {
	e := &memberEncoder{rng: 0xFFFFFFFF, pending: 1}
	e.model.reset()
	return e
}

func (e *memberEncoder) shift() {
	if e.low < 0xFF000000 || e.low > 0xFFFFFFFF {
		carry := byte(e.low >> 32)
		for c := e.cache; e.pending > 0; e.pending-- {
			e.out = append(e.out, c+carry)
			c = 0xFF
		}
		e.cache = byte(e.low >> 24)
	}
	e.pending++
	e.low = uint64(uint32(e.low) << 8)
}

func (e *memberEncoder) normalise() {
	for e.rng < 1<<24 {
		e.rng <<= 8
		e.shift()
		if e.follow {
			e.code <<= 8
			if len(e.target) > 0 {
				e.code |= uint32(e.target[0])
				e.target = e.target[1:]
			}
		}
	}
}

// bit encodes a bit, or the one that the target has, and returns it.
func (e *memberEncoder) bit(p *uint16, b int) int {
	bound := e.rng >> 11 * uint32(*p)
	if e.follow {
		b = 0
		if e.code >= bound {
			b = 1
		}
	}
	if b == 0 {
		e.rng = bound
		*p += (2048 - *p) >> 5
	} else {
		e.low += uint64(bound)
		e.rng -= bound
		*p -= *p >> 5
		e.code -= bound
	}
	e.normalise()
	return b
}

func (e *memberEncoder) tree(t []uint16, n, sym int) int {
	s := 1
	for i := n - 1; i >= 0; i-- {
		s = s<<1 | e.bit(&t[s], sym>>i&1)
	}
	return s
}

func (e *memberEncoder) reverseTree(t []uint16, n, sym int) {
	s := 1
	for i := range n {
		s = s<<1 | e.bit(&t[s], sym>>i&1)
	}
}

func (e *memberEncoder) posState() int { return len(e.data) & 3 }

func (e *memberEncoder) isMatch(b int) int {
	return e.bit(&e.model.isMatch[e.state<<2|e.posState()], b)
}

// literal encodes c. It returns false if the target that it follows has something else than a
// literal there.
func (e *memberEncoder) literal(c byte) bool {
	if e.isMatch(0) == 1 {
		return false
	}
	prev := byte(0)
	if len(e.data) > 0 {
		prev = e.data[len(e.data)-1]
	}
	t := e.model.literal[prev>>5][:]
	s := 1
	if e.state >= 7 {
		m := int(e.data[len(e.data)-1-int(e.rep[0])])
		for i := 7; i >= 0; i-- {
			b, mb := int(c)>>i&1, m>>i&1
			b = e.bit(&t[0x100+mb<<8+s], b)
			s = s<<1 | b
			if b != mb {
				for i--; i >= 0; i-- {
					s = s<<1 | e.bit(&t[s], int(c)>>i&1)
				}
			}
		}
	} else {
		s = e.tree(t, 8, int(c))
	}
	e.data = append(e.data, byte(s))
	switch {
	case e.state < 4:
		e.state = 0
	case e.state < 10:
		e.state -= 3
	default:
		e.state -= 6
	}
	return true
}

func (e *memberEncoder) length(l *lenModel, n int) {
	switch n -= 2; {
	case n < 8:
		e.bit(&l.choice, 0)
		e.tree(l.low[e.posState()][:], 3, n)
	case n < 16:
		e.bit(&l.choice, 1)
		e.bit(&l.choice2, 0)
		e.tree(l.mid[e.posState()][:], 3, n-8)
	default:
		e.bit(&l.choice, 1)
		e.bit(&l.choice2, 1)
		e.tree(l.high[:], 8, n-16)
	}
}

func (e *memberEncoder) nextState(low, high int) {
	if e.state < 7 {
		e.state = low
	} else {
		e.state = high
	}
}

// copy appends what a match stands for, as far as there is something.
func (e *memberEncoder) copy(n int) {
	for range n {
		if i := int64(len(e.data)) - 1 - int64(e.rep[0]); i >= 0 {
			e.data = append(e.data, e.data[i])
		}
	}
}

// rawMatch encodes a match with a distance, where 0 is the byte before, without taking it as done.
func (e *memberEncoder) rawMatch(dist uint32, n int) {
	e.isMatch(1)
	e.bit(&e.model.isRep[e.state], 0)
	e.length(&e.model.matchLen, n)
	t := e.model.slot[min(n-2, 3)][:]
	if dist < 4 {
		e.tree(t, 6, int(dist))
		return
	}
	high := bits.Len32(dist) - 1
	slot := high<<1 | int(dist>>(high-1)&1)
	e.tree(t, 6, slot)
	direct := high - 1
	base := uint32(2|slot&1) << direct
	if slot < 14 {
		e.reverseTree(e.model.special[int(base)-slot:], direct, int(dist-base))
		return
	}
	for i := direct - 1; i >= 4; i-- {
		e.rng >>= 1
		if dist>>i&1 == 1 {
			e.low += uint64(e.rng)
		}
		e.normalise()
	}
	e.reverseTree(e.model.align[:], 4, int(dist&15))
}

func (e *memberEncoder) match(dist uint32, n int) {
	e.rawMatch(dist, n)
	e.rep = [4]uint32{dist, e.rep[0], e.rep[1], e.rep[2]}
	e.nextState(7, 10)
	e.copy(n)
}

// repeat encodes a match with the i-th of the recent distances.
func (e *memberEncoder) repeat(i, n int) {
	e.isMatch(1)
	e.bit(&e.model.isRep[e.state], 1)
	m := &e.model
	if i == 0 {
		e.bit(&m.isRepG0[e.state], 0)
		e.bit(&m.isRep0L[e.state<<2|e.posState()], 1)
	} else {
		e.bit(&m.isRepG0[e.state], 1)
		if i == 1 {
			e.bit(&m.isRepG1[e.state], 0)
		} else {
			e.bit(&m.isRepG1[e.state], 1)
			e.bit(&m.isRepG2[e.state], i-2)
		}
	}
	dist := e.rep[i]
	copy(e.rep[1:i+1], e.rep[:i])
	e.rep[0] = dist
	e.length(&m.repLen, n)
	e.nextState(8, 11)
	e.copy(n)
}

// shortRepeat encodes one byte from the most recent distance.
func (e *memberEncoder) shortRepeat() {
	e.isMatch(1)
	e.bit(&e.model.isRep[e.state], 1)
	e.bit(&e.model.isRepG0[e.state], 0)
	e.bit(&e.model.isRep0L[e.state<<2|e.posState()], 0)
	e.nextState(9, 11)
	e.copy(1)
}

func (e *memberEncoder) marker(n int) { e.rawMatch(0xFFFFFFFF, n) }

func (e *memberEncoder) flush() {
	for range 5 {
		e.shift()
	}
}

// sync encodes a sync-flush marker and starts the range-coded stream anew, as lzlib does
// (decoder.c: LZd_decode_member).
func (e *memberEncoder) sync() {
	e.marker(3)
	e.flush()
	e.low, e.rng, e.cache, e.pending = 0, 0xFFFFFFFF, 0, 1
}

// member ends the stream with an end marker and returns the member.
func (e *memberEncoder) member(code byte) []byte {
	e.marker(2)
	e.flush()
	return wrap(code, e.out, e.data)
}

// wrap makes a member of an LZMA stream.
func wrap(code byte, stream, data []byte) []byte {
	m := append([]byte(magic), code)
	m = append(m, stream...)
	m = binary.LittleEndian.AppendUint32(m, crc32.ChecksumIEEE(data))
	m = binary.LittleEndian.AppendUint64(m, uint64(len(data)))
	return binary.LittleEndian.AppendUint64(m, uint64(len(m)+8))
}
