// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"context"
	"errors"
	"fmt"
)

// Blocks is where a reader gets blocks from.
type Blocks interface {
	// Get returns the encrypted block with the given reference, of which the caller expects it to have the given size. It
	// may write the block to dst, whose length is 0 and whose capacity is at least size, and return the part it wrote; or
	// it may return memory of its own, which nobody may change from then on. It must not use dst after it has returned.
	//
	// For a block that it does not have it returns an error that wraps [ErrNotFound]. It need not verify what it returns:
	// the reader does. It must be safe for many calls at the same time, and return soon after the context has ended.
	Get(ctx context.Context, ref Reference, size BlockSize, dst []byte) ([]byte, error)
}

// VerifiedBlocks is a [Blocks] that checks each block against its reference before it returns it, so that it can ask
// somewhere else if it is not the block. Readers then do not check it a second time, which would take about half as long
// again as decoding.
type VerifiedBlocks interface {
	Blocks
	// Verified does nothing. Who implements it promises that every block that Get returns has passed [Verify], and has the
	// size that was asked for.
	Verified()
}

// A Starter is a source of blocks that can be asked without a goroutine that waits for the answer: thousands of requests in
// flight then cost little more than the memory of their blocks, and answers that come together are looked at together.
type Starter interface {
	Blocks
	// Starts reports whether it makes sense to call Start, as far as is known.
	Starts() bool
	// Start begins what Get does, without waiting, and returns the request; or nil if that cannot be done at the moment, upon
	// which the caller may call Get. It calls answered once, from any goroutine and perhaps before it returns, as soon as
	// there is an answer or a failure; answered must not wait, and call nothing of the source. From then on Finish may be
	// called, when Start has returned, too. The memory dst is as for Get, and in use until then.
	Start(ref Reference, size BlockSize, dst []byte, answered func()) Request
}

// A Request is a block that a [Starter] has been asked for. The caller verifies the block, because many blocks are verified in
// much less time together than one by one.
type Request interface {
	// Cancel makes answered be called soon, if it has not been. It must not be called once Finish has been.
	Cancel()
	// Finish returns what Get would return, but not verified; not even its length need be right. It must be called once, after
	// answered has been. An error that does not wrap [ErrNotFound] may be worth a call of Get.
	Finish() ([]byte, error)
	// Verified must be called once after Finish, before the block is changed: with nil, with the error of Finish, or with a
	// [BlockError] if the block is a wrong one. It returns that error, with what the source has to say about it.
	Verified(err error) error
}

var (
	errNodeSingle  = errors.New("root has a single reference")
	errNodePartial = errors.New("internal node is not full, but not the last of its level")
)

// getBlock gets and verifies a block. Memory is where a source may put it.
func getBlock(ctx context.Context, blocks Blocks, ref Reference, size BlockSize, memory []byte) ([]byte, error) {
	block, err := blocks.Get(ctx, ref, size, memory[:0])
	if err != nil {
		return nil, gettingError(ref, err)
	}
	if _, ok := blocks.(VerifiedBlocks); ok && len(block) == int(size) {
		return block, nil
	}
	if err := verifySize(ref, block, size); err != nil {
		return nil, err
	}
	return block, nil
}

func gettingError(ref Reference, err error) error {
	return fmt.Errorf("getting block %v: %w", ref, err)
}

// getLeaf fills plaintext, which has the length of a block, with a leaf (ERIS 1.0.0, section "Decoding").
func getLeaf(ctx context.Context, blocks Blocks, pair Pair, size BlockSize, plaintext []byte) error {
	block, err := getBlock(ctx, blocks, pair.Reference, size, plaintext)
	if err != nil {
		return err
	}
	Decrypt(plaintext, block, pair.Key, 0)
	return nil
}

// getNode fills plaintext, which has the length of a block, with an internal node at the given level of the content that
// the capability denotes.
func getNode(ctx context.Context, blocks Blocks, capability *ReadCapability, pair Pair, level int, plaintext []byte) (Node, error) {
	block, err := getBlock(ctx, blocks, pair.Reference, capability.BlockSize, plaintext)
	if err != nil {
		return Node{}, err
	}
	node, err := DecryptNode(plaintext, block, pair.Key, level)
	if err != nil {
		return Node{}, nodeError(capability, pair, err)
	}
	return node, nil
}

func nodeError(capability *ReadCapability, pair Pair, err error) error {
	return &ContentError{capability.Root, fmt.Errorf("block %v: %w", pair.Reference, err)}
}

// checkFull checks a node that is not the last of its level.
func checkFull(node Node, capability *ReadCapability, pair Pair) error {
	if node.Len() != capability.BlockSize.Arity() {
		return nodeError(capability, pair, errNodePartial)
	}
	return nil
}

// spine is what the right-most path of a tree tells of the whole: because all nodes but the last of each level are full,
// the number of leaves, and of nodes at every level, follows from the numbers of pairs on that path, and the length from
// its leaf.
type spine struct {
	capability ReadCapability
	limit      int64               // greatest length allowed
	pairs      [maxLevel + 1]int64 // per level, in the right-most node
	before     int64               // leaves left of the path, as far as it is known
}

// newSpine checks what can be checked before anything is fetched: that the capability is valid, and that its level does
// not by itself promise more than the limit.
func newSpine(capability ReadCapability, limit int64) (spine, error) {
	if err := capability.Validate(); err != nil {
		return spine{}, &ContentError{capability.Root, err}
	}
	s := spine{capability: capability, limit: limit}
	if capability.BlockSize.least(capability.Level) > limit {
		return spine{}, s.tooLarge()
	}
	return s, nil
}

func (s *spine) tooLarge() error {
	return &ContentError{s.capability.Root, fmt.Errorf("%w of %d bytes", ErrTooLarge, s.limit)}
}

// root returns the pair of the root.
func (s *spine) root() Pair {
	return Pair{s.capability.Root, s.capability.Key}
}

// node takes the node of the path at the given level, from the root downwards, and returns the pair of the next block of
// the path. The limit is applied at once, so that a tree that describes too much is refused before its length is known.
func (s *spine) node(level int, n Node) (Pair, error) {
	if level == s.capability.Level && n.Len() < 2 {
		return Pair{}, &ContentError{s.capability.Root, errNodeSingle}
	}
	s.pairs[level] = int64(n.Len())
	s.before += int64(n.Len()-1) << ((level - 1) * s.capability.BlockSize.arityBits())
	if s.before > s.limit/int64(s.capability.BlockSize) {
		return Pair{}, s.tooLarge()
	}
	return n.Pair(n.Len() - 1), nil
}

// leaf takes the leaf at the end of the path, and returns what of it is content, and the length of the content.
func (s *spine) leaf(plaintext []byte) (tail []byte, length int64, err error) {
	tail, err = Unpad(plaintext)
	if err != nil {
		return nil, 0, &ContentError{s.capability.Root, err}
	}
	length = s.before*int64(s.capability.BlockSize) + int64(len(tail))
	if length > s.limit || length < 0 { // below 0 on overflow, when there is no other limit
		return nil, 0, s.tooLarge()
	}
	return tail, length, nil
}

// counts returns the number of nodes at every level, once the path is known; that of level 0 is the number of leaves.
func (s *spine) counts() (counts [maxLevel + 1]int64) {
	counts[s.capability.Level] = 1
	for level := s.capability.Level; level > 0; level-- {
		counts[level-1] = (counts[level]-1)*int64(s.capability.BlockSize.Arity()) + s.pairs[level]
	}
	return counts
}
