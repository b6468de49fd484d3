// SPDX-License-Identifier: GPL-3.0-or-later

package content

import (
	"fmt"
	"math"
	"math/bits"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// maxLevel is the greatest level of the root that a valid capability has.
const maxLevel = 14

func arityBits(size eris.BlockSize) int { return bits.TrailingZeros(uint(size.Arity())) }

// least returns the least length in bytes of content whose root is at the given level: one byte
// more than what the level below can hold. This is what makes a high level a promise of a great
// length, known before anything is fetched.
func least(size eris.BlockSize, level int) int64 {
	if level == 0 {
		return 0
	}
	shift := (level-1)*arityBits(size) + bits.TrailingZeros(uint(size))
	if shift >= 63 {
		return math.MaxInt64
	}
	return 1 << shift
}

// shape is what the right-most path of a tree tells of the whole: because all nodes but the last of
// each level are full, the number of leaves, and of nodes at every level, follows from the numbers
// of pairs on that path, and the length from its leaf.
type shape struct {
	capability eris.ReadCapability
	limit      int64               // greatest length allowed
	pairs      [maxLevel + 1]int64 // per level, in the right-most node
	before     int64               // leaves left of the path, as far as it is known
}

// newShape checks what can be checked before anything is fetched: that the capability is valid, and
// that its level does not by itself promise more than the limit.
func newShape(capability eris.ReadCapability, limit int64) (shape, error) {
	s := shape{capability: capability, limit: limit}
	if err := capability.Validate(); err != nil {
		return s, s.fault(err)
	}
	if least(capability.BlockSize, capability.Level) > limit {
		return s, s.tooLarge()
	}
	return s, nil
}

func (s *shape) fault(err error) error { return &Error{s.capability.Root, err} }

func (s *shape) faultAt(ref eris.Reference, err error) error {
	return s.fault(fmt.Errorf("block %v: %w", ref, err))
}

func (s *shape) tooLarge() error { return s.fault(fmt.Errorf("%w of %d bytes", ErrTooLarge, s.limit)) }

// node takes the node of the path at the given level, from the root downwards. The limit is applied
// at once, so that a tree that describes too much is refused before its length is known.
func (s *shape) node(level int, n eris.Node) error {
	if level == s.capability.Level && n.Len() < 2 {
		return s.fault(errNodeSingle)
	}
	s.pairs[level] = int64(n.Len())
	s.before += int64(n.Len()-1) << ((level - 1) * arityBits(s.capability.BlockSize))
	if s.before > s.limit/int64(s.capability.BlockSize) {
		return s.tooLarge()
	}
	return nil
}

// leaf takes the leaf at the end of the path, and returns what of it is content, and the length of
// the content.
func (s *shape) leaf(plaintext []byte) (tail []byte, length int64, err error) {
	tail, err = eris.Unpad(plaintext)
	if err != nil {
		return nil, 0, s.fault(err)
	}
	length = s.before*int64(s.capability.BlockSize) + int64(len(tail))
	if length > s.limit || length < 0 { // below 0 on overflow, when there is no other limit
		return nil, 0, s.tooLarge()
	}
	return tail, length, nil
}

// counts returns the number of nodes at every level, once the path is known; that of level 0 is the
// number of leaves.
func (s *shape) counts() (counts [maxLevel + 1]int64) {
	counts[s.capability.Level] = 1
	for level := s.capability.Level; level > 0; level-- {
		counts[level-1] = (counts[level]-1)*int64(s.capability.BlockSize.Arity()) + s.pairs[level]
	}
	return counts
}
