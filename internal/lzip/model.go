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

// A tree is the probabilities of a symbol of eight bits at most. Number 0 is not used: node s has
// the children 2s and 2s+1.
type tree [0x100]uint16

// lenModel holds the probabilities of a length: eight short ones and eight middle ones per position
// state, and 256 long ones.
type lenModel struct {
	choice, choice2 uint16
	low, mid        [posStates]tree
	high            tree
}

// model is all that the decoder has learnt about the member so far.
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
	slot     [lenStates]tree
	special  [128]uint16
	align    tree
	matchLen lenModel
	repLen   lenModel
	literal  [litContexts][0x300]uint16
}

// reset forgets all.
func (m *model) reset() {
	setInit(m.isMatch[:], m.isRep[:], m.isRepG0[:], m.isRepG1[:], m.isRepG2[:], m.isRep0L[:], m.special[:], m.align[:])
	for i := range m.slot {
		setInit(m.slot[i][:])
	}
	for _, l := range []*lenModel{&m.matchLen, &m.repLen} {
		l.choice, l.choice2 = probInit, probInit
		for i := range l.low {
			setInit(l.low[i][:], l.mid[i][:])
		}
		setInit(l.high[:])
	}
	for i := range m.literal {
		setInit(m.literal[i][:])
	}
}

func setInit(all ...[]uint16) {
	for _, p := range all {
		for i := range p {
			p[i] = probInit
		}
	}
}
