// SPDX-License-Identifier: GPL-3.0-or-later

package lzip

// The range decoder narrows the interval rng by one bit at a time: the bit is 0 if code lies below
// the bound that the bit's probability sets, and each bit changes the probability it was coded
// with. Both numbers stay below 1<<32 and are kept in 64-bit words, which saves the compiler
// extensions; code < rng holds from the start of a range-coded stream to its end.
//
// Everything below is written so that the compiler of Go 1.26 makes for amd64 about the machine
// code one would write by hand; the decoder takes 0.55 to 0.7 of the processor time of lzip 1.23.
// What that is made of, as the change in processor time on shared libraries and on text:
//
//   - bits of trees decoded with conditional moves: a branch for them is mispredicted too often
//     (-26 %, -24 %);
//   - both children of a node loaded before the bit is known that chooses between them (-12 %, -9 %);
//   - short matches copied in the loop, 16 bytes at once, instead of in a function (-4 %, -2 %);
//   - the position of the input in memory: registers are scarce (about -5 %);
//   - trees in functions of their own, so that each has all registers for itself.

// refill brings rng back to at least 1<<24. It needs one byte of input at most.
func (d *decoder) refill(rng, code uint64) (uint64, uint64) {
	if rng < 1<<24 {
		rng <<= 8
		code = code<<8 | uint64(d.in[d.ip])
		d.ip++
	}
	return rng, code
}

// choose decodes a bit of probability p and, with it, chooses p0 or p1. It returns the probability
// after adaptation as q.
//
// The condition is tested again and again because that is what becomes conditional moves: one test
// for the machine.
func choose(rng, code, p, p0, p1 uint64) (r, c, q, next, bit uint64) {
	bound := (rng >> probBits) * p
	r = rng - bound
	c = code - bound
	q = p
	next = p1
	zero := code < bound
	if zero {
		r = bound
	}
	if zero {
		c = code
	}
	if zero {
		// p - (p-2017)>>5 is p + (2048-p)>>5: one shift serves both ways.
		q = p - (1<<probBits - 1<<probMove + 1)
	}
	if zero {
		next = p0
	}
	if !zero {
		bit = 1
	}
	q = p - uint64(int64(q)>>probMove)
	return
}

// flag decodes a bit by a branch.
//
//go:noinline
func (d *decoder) flag(t *uint16, rng, code uint64) (set bool, r, c uint64) {
	rng, code = d.refill(rng, code)
	p := uint64(*t)
	bound := (rng >> probBits) * p
	if code < bound {
		*t = uint16(p + (1<<probBits-p)>>probMove)
		return false, bound, code
	}
	*t = uint16(p - p>>probMove)
	return true, rng - bound, code - bound
}

// tree decodes a symbol of so many bits; the result is above by 1<<bits.
//
//go:noinline
func (d *decoder) tree(t *tree, bits int, rng, code uint64) (sym, r, c uint64) {
	var q, bit uint64
	s, p := uint64(1), uint64(t[1])
	for range bits - 1 {
		i := s & 0x7f
		rng, code = d.refill(rng, code)
		rng, code, q, p, bit = choose(rng, code, p, uint64(t[2*i]), uint64(t[2*i+1]))
		t[i] = uint16(q)
		s = 2*i + bit
	}
	rng, code = d.refill(rng, code)
	rng, code, q, _, bit = choose(rng, code, p, 0, 0)
	t[s&0xff] = uint16(q)
	return 2*s + bit, rng, code
}

// matchedLiteral decodes a literal after a match, where the match would have given the byte m. The
// byte is the low eight bits of the result.
//
// off is 0x100 as long as the bits agree with those of m and 0 from the first that differs; i is
// the node at hand. Of the two nodes that may come next, the one that agrees with m is in a tree
// for literals after a match and the other one is in the plain tree.
//
//go:noinline
func (d *decoder) matchedLiteral(t *[0x300]uint16, m, rng, code uint64) (sym, r, c uint64) {
	var q, bit uint64
	m <<= 1
	off, s := uint64(0x100), uint64(1)
	i := off + m&off + s
	p := uint64(t[i])
	for range 7 {
		o1 := m & off
		o0 := off ^ o1
		m, s = m<<1, 2*s
		i0, i1 := s+o0+m&o0, s+1+o1+m&o1
		rng, code = d.refill(rng, code)
		rng, code, q, p, bit = choose(rng, code, p, uint64(t[i0]), uint64(t[i1]))
		t[i] = uint16(q)
		off = o1 ^ off&(bit-1)
		s += bit
		i = s + off + m&off
	}
	rng, code = d.refill(rng, code)
	rng, code, q, _, bit = choose(rng, code, p, 0, 0)
	t[i] = uint16(q)
	return 2*s + bit, rng, code
}

// reversed turns a node of the last level of the alignment tree into the four bits that lead to it,
// the first of them lowest.
var reversed = [16]uint8{0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15}

// length decodes the length of a match, in bytes.
func (d *decoder) length(l *lenModel, posState, rng, code uint64) (n, r, c uint64) {
	far, rng, code := d.flag(&l.choice, rng, code)
	if !far {
		n, rng, code = d.tree(&l.low[posState&(posStates-1)], 3, rng, code)
		return n - 8 + minMatch, rng, code
	}
	if far, rng, code = d.flag(&l.choice2, rng, code); !far {
		n, rng, code = d.tree(&l.mid[posState&(posStates-1)], 3, rng, code)
		return n - 8 + minMatch + 8, rng, code
	}
	n, rng, code = d.tree(&l.high, 8, rng, code)
	return n - 256 + minMatch + 16, rng, code
}

// distance decodes how far back a match of n bytes lies: 0 is the byte just before.
func (d *decoder) distance(n, rng, code uint64) (dist, r, c uint64) {
	slot, rng, code := d.tree(&d.model.slot[min(n-minMatch, lenStates-1)], 6, rng, code)
	slot &= 63
	if slot < slotModelled {
		return slot, rng, code
	}
	bits := slot>>1 - 1
	dist = 2 | slot&1
	if slot < slotDirect {
		dist <<= bits & 7
		t := &d.model.special
		base := dist - slot
		s := uint64(1)
		for k := range bits {
			i := (base + s) & 127
			var q, bit uint64
			rng, code = d.refill(rng, code)
			rng, code, q, _, bit = choose(rng, code, uint64(t[i]), 0, 0)
			t[i] = uint16(q)
			s = 2*s + bit
			dist += bit << (k & 7)
		}
		return dist, rng, code
	}
	for range bits - 4 {
		rng, code = d.refill(rng, code)
		rng >>= 1
		c := code - rng
		zero := code < rng
		if zero {
			c = code
		}
		code = c
		bit := uint64(0)
		if !zero {
			bit = 1
		}
		dist = 2*dist + bit
	}
	low, rng, code := d.tree(&d.model.align, 4, rng, code)
	return dist<<4 | uint64(reversed[low&15]), rng, code
}
