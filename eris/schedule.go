// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import "fmt"

// This file decides which block a walker asks for next, and knows the contents as far as that needs. All of it runs under
// the walker's lock.

// nodeCursor points at the next node of one level to be asked for.
type nodeCursor struct {
	content int   // index in contents
	node    int64 // index in its level
}

// content is one content of the sequence, from the time it is added until its last leaf has been handed out.
type content struct {
	index  int
	spine  spine
	pair   Pair // of the next block of the path to be asked for, and its level
	level  int
	open   bool
	length int64
	tail   []byte // what of the last leaf is content
	head   []byte // the first leaf, which is not to be changed, if it is there already
	first  int64  // position of its first leaf
	rows   []row  // per level
}

// row is the part of one level of a content's tree that is in memory: the right-most node, and a run of nodes that were
// asked for, and have children that were not.
type row struct {
	count int64     // of nodes at this level
	last  *buffer   // the right-most node; nil once it is of no more use
	from  int64     // index of the first of the run
	run   []*buffer // nil where the node has not come yet

	// The left-most node, unless it is the right-most one, or the root, is asked for together with the right-most path, so that
	// the first leaf need not wait for one round trip for each level once more.
	early bool    // that has been done
	first *buffer // it has come, and is not in the run yet
}

// leftNode is a left-most node to be asked for.
type leftNode struct {
	content *content
	pair    Pair
	level   int
}

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

// take finds the next block to ask for: first what everything else waits for.
func (w *walker) take(j *job) bool {
	if w.err != nil {
		return false
	}
	if w.takePath(j) || w.takeLeft(j) {
		return true
	}
	for level := w.top - 1; level > 0; level-- {
		if w.takeNode(j, level) {
			return true
		}
	}
	return w.takeLeaf(j)
}

// takePath goes on with a right-most path, or starts one.
func (w *walker) takePath(j *job) bool {
	if len(w.paths) > 0 {
		c := w.paths[0]
		w.paths[0] = nil
		w.paths = w.paths[1:]
		w.pathJob(j, c)
		return true
	}
	if w.opening == len(w.contents) {
		return false
	}
	c := w.contents[w.opening]
	size, levels := c.spine.capability.BlockSize, int64(c.spine.capability.Level)+1
	bytes := (levels + max(0, levels-2)) * int64(size)
	// When nothing else is left to hand out, the next is opened in any case, or there would be no end of waiting.
	if w.opening > 0 || w.head != w.tail {
		if w.pathBytes+bytes > w.pathBudget {
			return false
		}
		if w.openedLeaves+w.openingLeaves-w.asked >= levels*w.leavesAhead[sizeIndex(size)] {
			return false
		}
	}
	w.opening++
	w.openingLeaves += c.leastLeaves()
	w.pathBytes += bytes
	w.pathJob(j, c)
	return true
}

func (w *walker) pathJob(j *job, c *content) {
	*j = job{kind: pathJob, content: c, pair: c.pair, level: c.level, buffer: w.buffer(c.spine.capability.BlockSize, onPath)}
}

// takeLeft goes on with a left-most path. Its memory was booked with that of the right-most one.
func (w *walker) takeLeft(j *job) bool {
	if len(w.lefts) == 0 {
		return false
	}
	left := w.lefts[0]
	w.lefts[0] = leftNode{}
	w.lefts = w.lefts[1:]
	*j = job{kind: leftJob, content: left.content, pair: left.pair, level: left.level, buffer: w.buffer(left.content.spine.capability.BlockSize, onPath)}
	return true
}

// addLeft has the left-most node of a level asked for; the root and leaves are not meant.
func (w *walker) addLeft(c *content, level int, pair Pair) {
	if level > 0 {
		c.rows[level].early = true
		w.lefts = append(w.lefts, leftNode{c, pair, level})
	}
}

// leastLeaves returns the number of leaves that a content has at least, known from its capability alone.
func (c *content) leastLeaves() int64 {
	size := c.spine.capability.BlockSize
	return size.least(c.spine.capability.Level)/int64(size) + 1
}

// takeNode finds the next internal node of a level, if its parent is there and its leaves are near enough.
func (w *walker) takeNode(j *job, level int) bool {
	cursor := &w.nextNodes[level]
	for cursor.content < w.opened {
		c := w.contents[cursor.content]
		if c.spine.capability.Level <= level {
			*cursor = nodeCursor{content: cursor.content + 1}
			continue
		}
		size, node := c.spine.capability.BlockSize, cursor.node
		position := c.first + node<<(level*size.arityBits())
		if position >= w.asked+int64(level)*w.leavesAhead[sizeIndex(size)] {
			return false
		}
		parent := c.node(level+1, node>>size.arityBits())
		if parent == nil {
			return false
		}
		if node == c.rows[level].count-1 {
			w.passed(c, level, node)
			*cursor = nodeCursor{content: cursor.content + 1}
			continue
		}
		r := &c.rows[level]
		if r.early && node == 0 {
			r.run = append(r.run, r.first)
			r.first = nil
			w.passed(c, level, node)
			cursor.node++
			continue
		}
		b := w.buffer(size, onNone)
		*j = job{
			kind: nodeJob, content: c, level: level, node: node, buffer: b,
			pair: pairAt(parent.data, int(node)&(size.Arity()-1)),
		}
		r.run = append(r.run, nil)
		w.passed(c, level, node)
		cursor.node++
		return true
	}
	return false
}

// takeLeaf finds the next leaf, if its parent is there and there is room.
func (w *walker) takeLeaf(j *job) bool {
	if w.opened == 0 {
		return false
	}
	// The last leaf of a content came with its path, so here there are leaves before it: see skipLast.
	c := w.contents[0]
	size := c.spine.capability.BlockSize
	// When nothing else is left to hand out, one is asked for in any case, whatever the holders of others do.
	if w.leafBytes+int64(size) > w.leafBudget && w.head != w.tail {
		return false
	}
	parent := c.node(1, w.nextLeaf>>size.arityBits())
	if parent == nil {
		return false
	}
	b := w.buffer(size, onLeaf)
	if w.nextLeaf == 0 && c.head != nil {
		copy(b.data, c.head)
		w.push(slot{content: c, buffer: b, bytes: b.data, done: true})
		w.passed(c, 0, w.nextLeaf)
		w.nextLeaf++
		w.skipLast()
		return w.takeLeaf(j)
	}
	*j = job{
		kind: leafJob, content: c, slot: w.tail, buffer: b,
		pair: pairAt(parent.data, int(w.nextLeaf)&(size.Arity()-1)),
	}
	w.push(slot{content: c, buffer: b, bytes: b.data})
	w.passed(c, 0, w.nextLeaf)
	w.nextLeaf++
	w.skipLast()
	return true
}

// skipLast gives the last leaf of a content its slot when all others have one. It needs no request, because it came with
// the path.
func (w *walker) skipLast() {
	for w.opened > 0 && w.nextLeaf == w.contents[0].rows[0].count-1 {
		c := w.contents[0]
		b := c.rows[0].last
		c.rows[0].last = nil
		w.push(slot{content: c, buffer: b, bytes: c.tail, done: true, last: true})
		w.removeFirst()
	}
}

// passed is told that a block was asked for, or need not be. If it was the last child of its parent, the parent is of no
// more use.
func (w *walker) passed(c *content, level int, index int64) {
	bits := c.spine.capability.BlockSize.arityBits()
	if index != c.rows[level].count-1 && (index+1)&(1<<bits-1) != 0 {
		return
	}
	r := &c.rows[level+1]
	if index>>bits == r.count-1 {
		w.put(r.last)
		r.last = nil
	} else {
		w.put(r.run[0])
		r.run[0] = nil
		r.run = r.run[1:]
		r.from++
	}
}

// removeFirst forgets the first content, all of whose leaves have been asked for.
func (w *walker) removeFirst() {
	c := w.contents[0]
	for i := range c.rows {
		w.put(c.rows[i].last)
		c.rows[i].last = nil
	}
	w.contents[0] = nil
	w.contents = w.contents[1:]
	w.opened--
	w.opening--
	w.nextLeaf = 0
	for i := range w.nextNodes {
		if cursor := &w.nextNodes[i]; cursor.content > 0 {
			cursor.content--
		} else {
			cursor.node = 0
		}
	}
}

// push adds a slot.
func (w *walker) push(s slot) {
	if w.tail-w.head == uint64(len(w.slots)) {
		larger := make([]slot, max(64, 2*len(w.slots)))
		for i := w.head; i != w.tail; i++ {
			larger[i&uint64(len(larger)-1)] = w.slots[i&uint64(len(w.slots)-1)]
		}
		w.slots = larger
	}
	w.slots[w.tail&uint64(len(w.slots)-1)] = s
	w.tail++
	w.asked++
}

// add takes more contents, or fails if one of them is to be refused outright.
func (w *walker) add(wants []Want) {
	for _, want := range wants {
		s, err := newSpine(want.Capability, want.Limit)
		if err != nil {
			w.fail(err)
			return
		}
		w.contents = append(w.contents, &content{
			index: w.added, spine: s,
			pair: s.root(), level: want.Capability.Level,
			rows: make([]row, want.Capability.Level+1),
		})
		w.added++
	}
}

// addOpened makes an open content the only one. Called once, before anything else, without the lock.
func (w *walker) addOpened(opened *Content) *content {
	w.mu.Lock()
	defer w.mu.Unlock()
	c := &content{spine: opened.spine, rows: make([]row, opened.spine.capability.Level+1), head: opened.left[0]}
	for level := range c.rows {
		r := &c.rows[level]
		r.last = &buffer{data: opened.path[level], account: foreign}
		if level > 0 && opened.left[level] != nil {
			r.early, r.first = true, &buffer{data: opened.left[level], account: foreign}
		}
	}
	w.contents = append(w.contents, c)
	w.ended = true
	w.opening = 1
	w.openingLeaves = c.leastLeaves()
	w.setOpen(c, opened.tail, opened.length)
	return c
}

// setOpen is told that the path of a content is complete.
func (w *walker) setOpen(c *content, tail []byte, length int64) {
	counts := c.spine.counts()
	for level := range c.rows {
		c.rows[level].count = counts[level]
	}
	c.tail, c.length, c.open = tail, length, true
	w.top = max(w.top, c.spine.capability.Level)
	for w.opened < w.opening && w.contents[w.opened].open {
		c := w.contents[w.opened]
		if c.length > w.totalLimit-w.totalLength {
			w.fail(&ContentError{c.spine.capability.Root, fmt.Errorf("with those before it, %w of %d bytes in all", ErrTooLarge, w.totalLimit)})
			return
		}
		w.totalLength += c.length
		c.first = w.openedLeaves
		w.openedLeaves += c.rows[0].count
		w.openingLeaves -= c.leastLeaves()
		w.opened++
	}
	w.skipLast()
}
