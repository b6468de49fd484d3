// SPDX-License-Identifier: GPL-3.0-or-later

package content

import (
	"fmt"
	"math"
	"math/bits"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// This file decides which block a fetcher requests next, and knows the contents as far as that
// needs. All of it runs under the lock of the fetcher.

// nodeCursor points at the next node of one level to be requested.
type nodeCursor struct {
	content int   // index in contents
	node    int64 // index in its level
}

// content is one content of the sequence, from the time it is added until its last leaf has been
// handed out.
type content struct {
	shape  shape
	want   Want
	kin    *fetch.Kin // its root and those of others
	nth    int
	open   bool
	length int64
	tail   []byte // what of the last leaf is content
	first  int64  // position of its first leaf
	rows   []row  // per level

	// The slot of the left-most leaf, once it has one.
	hasSlot bool
	slot    uint64
}

// row is the part of one level of a content's tree that is in memory: the right-most node, and a
// run of nodes that were requested, and have children that were not.
type row struct {
	count int64     // of nodes at this level
	last  *buffer   // the right-most node; nil once it is of no more use
	from  int64     // index of the first of the run
	run   []*buffer // nil where the node has not come yet

	// The left-most node, unless it is the right-most one, too, is requested together with the
	// right-most path, so that the first leaf need not wait for one round trip for each level once
	// more. Here it waits for its turn.
	left *buffer
}

// pathStep is the next block of a path.
type pathStep struct {
	kind    requestKind
	content *content
	level   int
	block   named
}

func (c *content) blockSize() eris.BlockSize { return c.shape.capability.BlockSize }
func (c *content) rootLevel() int            { return c.shape.capability.Level }

// node returns the index-th node of a level, or nil if it has not come.
func (c *content) node(level int, index int64) *buffer {
	r := &c.rows[level]
	if index == r.count-1 {
		return r.last
	}
	if i := index - r.from; i < int64(len(r.run)) {
		return r.run[i]
	}
	return nil
}

// leastLeaves returns the number of leaves that a content has at least, known from its capability
// alone.
func (c *content) leastLeaves() int64 {
	return least(c.blockSize(), c.rootLevel())/int64(c.blockSize()) + 1
}

// take finds the next block to request: first what everything else waits for.
func (f *fetcher) take(r *request) bool {
	if f.takePath(r) {
		return true
	}
	if f.paused {
		return false
	}
	for level := f.top - 1; level > 0; level-- {
		if f.takeNode(r, level) {
			return true
		}
	}
	return f.takeLeaf(r)
}

func (f *fetcher) fill(r *request, kind requestKind, c *content, level int, block named, on account) {
	r.kind, r.content, r.level = kind, c, level
	r.buffer = f.buffer(c.blockSize(), on)
	r.Pair, r.Size, r.Dst = block.Pair, c.blockSize(), r.buffer.data[:0]
	r.Kin, r.Nth = block.kin, block.nth
}

// takePath goes on with a path, or starts one.
func (f *fetcher) takePath(r *request) bool {
	r.node = 0
	if len(f.paths) > 0 {
		next := f.paths[0]
		if next.kind == pathRequest {
			r.node = next.content.shape.before // if it is a leaf
		}
		f.paths[0] = pathStep{}
		f.paths = f.paths[1:]
		f.fill(r, next.kind, next.content, next.level, next.block, onPath)
		return true
	}
	if f.opening == len(f.contents) {
		return false
	}
	c := f.contents[f.opening]
	levels := int64(c.rootLevel()) + 1
	bytes := (2*levels - 1) * int64(c.blockSize()) // both paths, without the root twice
	// When nothing else is left to hand out, the next is opened in any case, or there would be no
	// end of waiting.
	if f.opening > 0 || f.head != f.tail {
		if f.pathBytes+bytes > f.pathBudget {
			return false
		}
		if f.openedLeaves+f.openingLeaves-f.requested >= levels*f.leavesAhead[sizeIndex(c.blockSize())] {
			return false
		}
	}
	f.opening++
	f.openingLeaves += c.leastLeaves()
	f.pathBytes += bytes
	root := eris.Pair{Reference: c.shape.capability.Root, Key: c.shape.capability.Key}
	f.fill(r, pathRequest, c, c.rootLevel(), named{root, c.kin, c.nth}, onPath)
	return true
}

// takeNode finds the next internal node of a level, if its parent is there and its leaves are near
// enough.
func (f *fetcher) takeNode(r *request, level int) bool {
	cursor := &f.nextNodes[level]
	for cursor.content < f.opened {
		c := f.contents[cursor.content]
		if c.rootLevel() <= level {
			*cursor = nodeCursor{content: cursor.content + 1}
			continue
		}
		bits, node := arityBits(c.blockSize()), cursor.node
		position := c.first + node<<(level*bits)
		if position >= f.requested+int64(level)*f.leavesAhead[sizeIndex(c.blockSize())] {
			return false
		}
		parent := c.node(level+1, node>>bits)
		if parent == nil {
			return false
		}
		row := &c.rows[level]
		switch node {
		case row.count - 1:
			f.passed(c, level, node)
			*cursor = nodeCursor{content: cursor.content + 1}
			continue
		case 0: // was requested when its parent came
			row.run = append(row.run, row.left)
			row.left = nil
			cursor.node++
			continue
		}
		r.node = node
		f.fill(r, nodeRequest, c, level, parent.child(node), onNone)
		row.run = append(row.run, nil)
		f.passed(c, level, node)
		cursor.node++
		return true
	}
	return false
}

// takeLeaf finds the next leaf, if its parent is there and there is room. It is neither the first
// nor the last of its content, which come with the paths: see addEarlyLeaves.
func (f *fetcher) takeLeaf(r *request) bool {
	if f.opened == 0 {
		return false
	}
	c := f.contents[0]
	// When nothing else is left to hand out, one is requested in any case, whatever the holders of
	// others do.
	if f.leafBytes+int64(c.blockSize()) > f.leafBudget && f.head != f.tail {
		return false
	}
	parent := c.node(1, f.nextLeaf>>arityBits(c.blockSize()))
	if parent == nil {
		return false
	}
	r.slot, r.node = f.tail, f.nextLeaf
	f.fill(r, leafRequest, c, 0, parent.child(f.nextLeaf), onLeaf)
	f.push(slot{content: c, buffer: r.buffer, bytes: r.buffer.data})
	f.passed(c, 0, f.nextLeaf)
	f.nextLeaf++
	f.addEarlyLeaves()
	return true
}

// addEarlyLeaves gives the first and the last leaf of a content their slots when it is their turn.
// They need no request, because they were requested with the paths.
func (f *fetcher) addEarlyLeaves() {
	for f.opened > 0 {
		c := f.contents[0]
		row := &c.rows[0]
		switch f.nextLeaf {
		case row.count - 1:
			f.push(slot{content: c, buffer: row.last, bytes: c.tail, done: true, last: true})
			row.last = nil
			f.removeFirst()
		case 0:
			c.hasSlot, c.slot = true, f.tail
			f.push(slot{content: c})
			if row.left != nil {
				f.completeLeft(c, 0, row.left)
			}
			f.nextLeaf++
		default:
			return
		}
	}
}

// completeLeft puts a block of a left-most path, which has come, in its place.
func (f *fetcher) completeLeft(c *content, level int, b *buffer) {
	row := &c.rows[level]
	switch {
	case level > 0 && len(row.run) > 0:
		row.run[0] = b
	case level == 0 && c.hasSlot:
		s := f.slotAt(c.slot)
		s.buffer, s.bytes, s.done = b, b.data, true
		row.left = nil
	default:
		row.left = b
	}
}

// passed is told that a block was requested, or need not be. If it was the last child of its
// parent, the parent is of no more use.
func (f *fetcher) passed(c *content, level int, index int64) {
	bits := arityBits(c.blockSize())
	if index != c.rows[level].count-1 && (index+1)&(1<<bits-1) != 0 {
		return
	}
	r := &c.rows[level+1]
	if index>>bits == r.count-1 {
		f.put(r.last)
		r.last = nil
	} else {
		f.put(r.run[0])
		r.run[0] = nil
		r.run = r.run[1:]
		r.from++
	}
}

// removeFirst forgets the first content, all of whose leaves have been requested.
func (f *fetcher) removeFirst() {
	c := f.contents[0]
	for i := range c.rows {
		f.put(c.rows[i].last)
		c.rows[i].last = nil
	}
	f.contents[0] = nil
	f.contents = f.contents[1:]
	f.opened--
	f.opening--
	f.nextLeaf = 0
	for i := range f.nextNodes {
		if cursor := &f.nextNodes[i]; cursor.content > 0 {
			cursor.content--
		} else {
			cursor.node = 0
		}
	}
}

func (f *fetcher) push(s slot) {
	if f.tail-f.head == uint64(len(f.slots)) {
		larger := make([]slot, max(64, 2*len(f.slots)))
		for i := f.head; i != f.tail; i++ {
			larger[i&uint64(len(larger)-1)] = *f.slotAt(i)
		}
		f.slots = larger
	}
	*f.slotAt(f.tail) = s
	f.tail++
	f.requested++
}

func (f *fetcher) slotAt(i uint64) *slot { return &f.slots[i&uint64(len(f.slots)-1)] }

// add takes more contents, or fails if one of them is to be refused outright.
func (f *fetcher) add(wants []Want) {
	if len(wants) == 0 {
		return
	}
	kin := &fetch.Kin{Refs: make([]eris.Reference, len(wants)), Origin: wants[0].Origin}
	for i, want := range wants {
		kin.Refs[i] = want.Capability.Root
		s, err := newShape(want.Capability, want.Limit)
		if err != nil {
			f.fail(err)
			return
		}
		f.contents = append(f.contents, &content{
			shape: s, want: want, kin: kin, nth: i, rows: make([]row, want.Capability.Level+1),
		})
	}
}

// setOpen is told that the path of a content is complete.
func (f *fetcher) setOpen(c *content, tail []byte, length int64) {
	counts := c.shape.counts()
	for level := range c.rows {
		c.rows[level].count = counts[level]
	}
	c.tail, c.length, c.open = tail, length, true
	f.top = max(f.top, c.rootLevel())
	for f.opened < f.opening && f.contents[f.opened].open {
		c := f.contents[f.opened]
		if c.length > f.totalLimit-f.totalLength {
			f.fail(c.shape.fault(fmt.Errorf("with those before it, %w of %d bytes in all", ErrTooLarge, f.totalLimit)))
			return
		}
		f.totalLength += c.length
		c.first = f.openedLeaves
		f.openedLeaves += c.rows[0].count
		f.openingLeaves -= c.leastLeaves()
		f.opened++
	}
	f.addEarlyLeaves()
}

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
