// SPDX-License-Identifier: GPL-3.0-or-later

package lzip

// Numbers of the LZMA algorithm that the lzip format fixes: three bits of literal context, no
// literal position bits, two position bits, and four recent distances. (Lzip manual, "Format of the
// LZMA stream in lzip files"; Internet draft draft-diaz-lzip.)
const (
	litContexts = 8  // one per value of the three high bits of the byte before
	posStates   = 4  // one per value of the two low bits of the position
	states      = 16 // twelve are used; sixteen let an index be masked
	lenStates   = 4  // match lengths 2, 3, 4 and above choose the slot tree

	minMatch = 2
	maxMatch = 273 // longest match: 2 + 8 + 8 + 256 - 1

	slotModelled = 4  // first slot that has further bits
	slotDirect   = 14 // first slot whose middle bits have no probabilities

	probBits = 11
	probInit = 1 << (probBits - 1)
	probMove = 5 // adaptation rate
)

// lenModel holds the probabilities of a length: eight short ones and eight middle ones per position
// state, and 256 long ones.
type lenModel struct {
	choice, choice2 uint16
	low, mid        [posStates][8]uint16
	high            [256]uint16
}

// model is all that the decoder has learnt about the member so far. A tree of n bits is an array of
// 1<<n probabilities of which number 0 is not used: node s has the children 2s and 2s+1.
//
// A literal has three trees side by side: the plain one, and at 0x100 and 0x200 those for literals
// after a match, while the bits decoded so far agree with the byte that the match would have given
// next, whose next bit is 0 or 1.
type model struct {
	isMatch  [states * posStates]uint16
	isRep    [states]uint16
	isRepG0  [states]uint16
	isRepG1  [states]uint16
	isRepG2  [states]uint16
	isRep0L  [states * posStates]uint16
	slot     [lenStates][64]uint16
	special  [128]uint16
	align    [16]uint16
	matchLen lenModel
	repLen   lenModel
	literal  [litContexts][0x300]uint16
}

func (m *model) reset() {
	setInit(m.isMatch[:])
	setInit(m.isRep[:])
	setInit(m.isRepG0[:])
	setInit(m.isRepG1[:])
	setInit(m.isRepG2[:])
	setInit(m.isRep0L[:])
	for i := range m.slot {
		setInit(m.slot[i][:])
	}
	setInit(m.special[:])
	setInit(m.align[:])
	m.matchLen.reset()
	m.repLen.reset()
	for i := range m.literal {
		setInit(m.literal[i][:])
	}
}

func (l *lenModel) reset() {
	l.choice, l.choice2 = probInit, probInit
	for i := range l.low {
		setInit(l.low[i][:])
		setInit(l.mid[i][:])
	}
	setInit(l.high[:])
}

func setInit(p []uint16) {
	for i := range p {
		p[i] = probInit
	}
}
