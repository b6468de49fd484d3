// SPDX-License-Identifier: GPL-3.0-or-later

package inflate

import "math/bits"

// An entry of a decoding table says what a code stands for. From the low end:
//
//	bits 0–5    how many bits to take, further bits included
//	bits 8–11   how many of them are the code: the further bits follow
//	bit  14     not a literal, length or distance: see below
//	bits 16–30  literal, or base of the length or distance
//	bit  31     literal
//
// If bit 14 is set, bits 16–30 are the place of a second table, bits 8–11 the
// number of bits that choose in it, and bits 0–5 the number of bits of the first
// table; or the whole is entryEnd or entryInvalid with the length of the code.
type entry = uint32

const (
	entryLiteral entry = 1 << 31
	entryOther   entry = 1 << 14
	entryTable   entry = 1 << 13 // with entryOther: a second table
	entryEnd     entry = entryOther | 1<<16
	entryInvalid entry = entryOther

	takeMask   = 63
	codeShift  = 8
	codeMask   = 15
	valueShift = 16
)

const (
	// Bits of the first tables. More make fewer second look-ups and more work per
	// block; these fit the first-level cache together.
	symbolBits   = 11
	distanceBits = 8
	lengthBits   = 7 // the code of code lengths, which has no longer codes

	// Sizes with all second tables. The most that a complete code can need is
	// 2342 and 402 (the program "enough" of zlib); build checks.
	symbolSize   = 1<<symbolBits + 512
	distanceSize = 1<<distanceBits + 256

	maxCode      = 15
	symbols      = 288
	distances    = 32
	usedSymbols  = 286 // the others have codes in the fixed code, but no meaning
	usedDistance = 30
)

// What symbols stand for (RFC 1951, section 3.2.5), without the length of the code.
var (
	symbolEntries   = makeSymbolEntries()
	distanceEntries = makeDistanceEntries()
	lengthEntries   = makeLengthEntries()
)

func makeSymbolEntries() (t [symbols]entry) {
	for i := range 256 {
		t[i] = entryLiteral | entry(i)<<valueShift
	}
	t[256] = entryEnd
	base := entry(3)
	for i := 257; i < usedSymbols; i++ {
		extra := entry(0)
		if i >= 265 {
			extra = entry(i-261) / 4
		}
		t[i] = base<<valueShift | extra
		base += 1 << extra
	}
	t[285] = 258 << valueShift
	t[286], t[287] = entryInvalid, entryInvalid
	return t
}

func makeDistanceEntries() (t [distances]entry) {
	base := entry(1)
	for i := range usedDistance {
		extra := entry(0)
		if i >= 4 {
			extra = entry(i-2) / 2
		}
		t[i] = base<<valueShift | extra
		base += 1 << extra
	}
	t[30], t[31] = entryInvalid, entryInvalid
	return t
}

func makeLengthEntries() (t [19]entry) {
	for i := range t {
		t[i] = entry(i) << valueShift
	}
	return t
}

// build fills the table of a code, of which lengths are the code lengths, in bits,
// of the symbols; 0 for a symbol without a code. The first 1<<first entries are
// chosen by that many bits. It returns false if there is no such code: if more
// codes are given than there are or, but for a single code of one bit and no code
// at all, fewer.
func build(table []entry, first int, lengths []uint8, meanings []entry) bool {
	var count [maxCode + 1]int
	for _, n := range lengths {
		count[n&maxCode]++
	}
	longest := maxCode
	for longest > 0 && count[longest] == 0 {
		longest--
	}
	left := 1
	var next [maxCode + 2]int // first place in sorted of the codes of a length
	for n := 1; n <= longest; n++ {
		left = left<<1 - count[n]
		if left < 0 {
			return false
		}
		next[n+1] = next[n] + count[n]
	}
	if left > 0 {
		if longest > 1 {
			return false
		}
		for i := range table[:1<<first] {
			table[i] = entryInvalid | 1
		}
	}
	var sorted [symbols]uint16
	places := next
	for s, n := range lengths {
		if n != 0 {
			sorted[places[n]] = uint16(s)
			places[n]++
		}
	}

	// Codes come in the order of their lengths and, among these, of the symbols.
	// The first bit of a code is its highest; in the stream it comes first, and
	// so lowest.
	code := 0
	for n := 1; n <= min(longest, first); n++ {
		for _, s := range sorted[next[n]:next[n+1]] {
			e := meaning(meanings[s], n)
			for i := reverse(code, n); i < 1<<first; i += 1 << n {
				table[i] = e
			}
			code++
		}
		code <<= 1
	}
	used := 1 << first
	prefix, start, size := -1, 0, 0
	for n := first + 1; n <= longest; n++ {
		for k, s := range sorted[next[n]:next[n+1]] {
			r := reverse(code, n)
			if p := r & (1<<first - 1); p != prefix {
				// A new second table: as many bits as the codes that share
				// the prefix need, which are the next ones.
				prefix, start = p, used
				bits := n - first
				room := 1<<bits - (count[n] - k)
				for room > 0 && first+bits < longest {
					bits++
					room = room<<1 - count[first+bits]
				}
				size = 1 << bits
				used += size
				if used > len(table) {
					return false
				}
				table[p] = entryOther | entryTable | entry(start)<<valueShift | entry(bits)<<codeShift | entry(first)
			}
			e := meaning(meanings[s], n-first)
			for i := r >> first; i < size; i += 1 << (n - first) {
				table[start+i] = e
			}
			code++
		}
		code <<= 1
	}
	return true
}

// meaning adds the length of a code in its table to what it stands for.
func meaning(e entry, n int) entry {
	return e + entry(n)<<codeShift + entry(n)
}

func reverse(code, n int) int {
	return int(bits.Reverse16(uint16(code)) >> (16 - n))
}
