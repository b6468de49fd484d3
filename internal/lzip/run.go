// SPDX-License-Identifier: GPL-3.0-or-later

package lzip

// What made run stop.
type stop uint8

const (
	stopFull     stop = iota // the window has reached the position asked for
	stopInput                // what is left of the input may not be a whole symbol
	stopEnd                  // end-of-stream marker
	stopSync                 // sync-flush marker
	stopMarker               // a marker of another kind
	stopDistance             // a distance beyond the data so far or the dictionary
)

// maxSymbol is the greatest number of bytes of input that decoding one symbol takes. The longest
// symbol is a match: at most 22 bits with probabilities, of which the least likely takes 6.05 bits
// from the interval (31/2048), and 26 without, in all 160; the interval may have been short of 8
// bits before, so that at most 21 bytes are shifted in.
const maxSymbol = 21

// slack is how many bytes run may read and write beyond the end of a match.
const slack = 16

// markers has what the lengths of a marker mean, from the least one on.
var markers = [3]stop{stopEnd, stopSync, stopMarker}

// afterLiteral is the state after a literal.
var afterLiteral = [states]uint8{0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 4, 5}

// run decodes symbols until the window's position is at end or beyond (by less than a match), or
// the input's position is above lim. For each symbol that starts at lim or before, maxSymbol bytes
// must be there to be read.
func (d *decoder) run(end, lim int) stop {
	m := &d.model
	buf := d.window
	rng, code := d.rng, d.code
	pos, state, prev := d.pos, d.state, d.prev
	rep0, rep1, rep2, rep3 := d.rep0, d.rep1, d.rep2, d.rep3
	why := stopFull
	for pos < end {
		if int(d.ip) > lim {
			why = stopInput
			break
		}
		posState := uint64(pos) & (posStates - 1)
		index := (state*posStates + posState) & (states*posStates - 1)

		rng, code = d.refill(rng, code)
		p := uint64(m.isMatch[index])
		bound := (rng >> probBits) * p
		if code < bound {
			rng = bound
			m.isMatch[index] = uint16(p + (1<<probBits-p)>>probMove)
			t := &m.literal[prev>>5]
			var s uint64
			if state < 7 {
				s, rng, code = d.tree((*tree)(t[:]), 8, rng, code)
			} else {
				// A state of 7 or more means that there has been a match, so that rep0 is sound.
				from := pos - int(rep0) - 1
				if from < 0 {
					from += d.ring
				}
				s, rng, code = d.matchedLiteral(t, uint64(buf[from]), rng, code)
			}
			prev = byte(s)
			buf[pos] = prev
			pos++
			state = uint64(afterLiteral[state&(states-1)])
			continue
		}
		rng -= bound
		code -= bound
		m.isMatch[index] = uint16(p - p>>probMove)
		afterMatch := (state + 9) >> 4 // 1 in the states from 7

		var n uint64
		var repeated, older, long bool
		if repeated, rng, code = d.flag(&m.isRep[state&(states-1)], rng, code); !repeated {
			n, rng, code = d.length(&m.matchLen, posState, rng, code)
			var dist uint64
			dist, rng, code = d.distance(n, rng, code)
			if dist >= d.dictSize {
				why = stopDistance
				if dist == 0xFFFFFFFF {
					rng, code = d.refill(rng, code)
					why = markers[min(n-minMatch, 2)]
				}
				break
			}
			rep3, rep2, rep1, rep0 = rep2, rep1, rep0, uint32(dist)
			state = 7 + 3*afterMatch
		} else {
			if older, rng, code = d.flag(&m.isRepG0[state&(states-1)], rng, code); !older {
				if long, rng, code = d.flag(&m.isRep0L[index], rng, code); !long {
					from := pos - int(rep0) - 1
					if from < 0 {
						if !d.full {
							why = stopDistance
							break
						}
						from += d.ring
					}
					prev = buf[from]
					buf[pos] = prev
					pos++
					state = 9 + 2*afterMatch
					continue
				}
			} else if older, rng, code = d.flag(&m.isRepG1[state&(states-1)], rng, code); !older {
				rep1, rep0 = rep0, rep1
			} else if older, rng, code = d.flag(&m.isRepG2[state&(states-1)], rng, code); !older {
				rep2, rep1, rep0 = rep1, rep0, rep2
			} else {
				rep3, rep2, rep1, rep0 = rep2, rep1, rep0, rep3
			}
			n, rng, code = d.length(&m.repLen, posState, rng, code)
			state = 8 + 3*afterMatch
		}

		from := pos - int(rep0) - 1
		if from < 0 {
			if !d.full {
				why = stopDistance
				break
			}
			from += d.ring
			if from+int(n) > d.ring {
				// Across the end of the ring: seldom.
				for range n {
					buf[pos] = buf[from]
					pos++
					if from++; from == d.ring {
						from = 0
					}
				}
				prev = buf[pos-1]
				continue
			}
		}
		if n <= 16 && rep0 >= 15 {
			*(*[16]byte)(buf[pos:]) = *(*[16]byte)(buf[from:])
		} else {
			copyMatch(buf, pos, from, int(n))
		}
		pos += int(n)
		prev = buf[pos-1]
	}
	d.rng, d.code = rng, code
	d.pos, d.state, d.prev = pos, state, prev
	d.rep0, d.rep1, d.rep2, d.rep3 = rep0, rep1, rep2, rep3
	return why
}

// copyMatch copies n bytes from buf[from:] to buf[pos:], as a loop over single bytes would: where
// the two overlap, what was written is read again.
func copyMatch(buf []byte, pos, from, n int) {
	if from > pos { // in a ring
		copy(buf[pos:pos+n], buf[from:])
		return
	}
	for end := pos + n; pos < end; {
		pos += copy(buf[pos:end], buf[from:pos])
	}
}
