// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Content is one content whose right-most path has been read, so that its length is known, and its left-most one, with which most
// readers begin. It is safe for use by several goroutines at a time.
type Content struct {
	blocks Blocks
	window Window
	spine  spine
	counts [maxLevel + 1]int64
	path   [maxLevel + 1][]byte // plaintext of the right-most node of each level; the leaf at 0
	left   [maxLevel + 1][]byte // of the left-most ones below the root; nil where it could not be had
	tail   []byte               // what of that leaf is content
	length int64

	mu     sync.Mutex
	recent [maxLevel + 1]recentNode
}

// recentNode is the last node of a level that ReadAt came by.
type recentNode struct {
	index     int64
	plaintext []byte
}

// Open fetches the right-most path of a content, one block per level and one more, and at the same time the left-most path, so
// that reading can begin as soon as the length is known. It returns the Content. Limit is the
// greatest length in bytes that is acceptable; content that is longer is refused with a [*ContentError] that wraps
// [ErrTooLarge], mostly before anything is fetched. The window applies to WriteTo and NewReader.
//
// Errors are those of the package comment, or that of the context. That the left-most path cannot be had is none: the error comes
// when it is read.
func Open(ctx context.Context, blocks Blocks, capability ReadCapability, limit int64, window Window) (*Content, error) {
	s, err := newSpine(capability, limit)
	if err != nil {
		return nil, err
	}
	c := &Content{blocks: blocks, window: window, spine: s}
	leftContext, cancel := context.WithCancel(ctx)
	defer cancel()
	var left sync.WaitGroup
	err = c.readPath(ctx, func(first Pair) {
		left.Go(func() { c.readLeft(leftContext, first) })
	})
	if err != nil {
		cancel() // nobody will read
	}
	left.Wait()
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	return c, nil
}

// readPath fetches the right-most path. It calls rootRead with the first pair of the root, if that has any.
func (c *Content) readPath(ctx context.Context, rootRead func(first Pair)) (err error) {
	capability := &c.spine.capability
	pair := c.spine.root()
	for level := capability.Level; level > 0; level-- {
		if err := ctx.Err(); err != nil {
			return err
		}
		c.path[level] = make([]byte, capability.BlockSize)
		node, err := getNode(ctx, c.blocks, capability, pair, level, c.path[level])
		if err != nil {
			return err
		}
		if pair, err = c.spine.node(level, node); err != nil {
			return err
		}
		if level == capability.Level {
			rootRead(node.Pair(0))
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	c.path[0] = make([]byte, capability.BlockSize)
	if err := getLeaf(ctx, c.blocks, pair, capability.BlockSize, c.path[0]); err != nil {
		return err
	}
	if c.tail, c.length, err = c.spine.leaf(c.path[0]); err != nil {
		return err
	}
	c.counts = c.spine.counts()
	return nil
}

// readLeft fetches the left-most path below the root, as far as it can be had. Nothing of it is on the right-most path, because a
// root has two pairs at least.
func (c *Content) readLeft(ctx context.Context, pair Pair) {
	capability := c.spine.capability
	for level := capability.Level - 1; level > 0; level-- {
		plaintext := make([]byte, capability.BlockSize)
		node, err := getNode(ctx, c.blocks, &capability, pair, level, plaintext)
		if err != nil || checkFull(node, &capability, pair) != nil {
			return
		}
		c.left[level] = plaintext
		pair = node.Pair(0)
	}
	plaintext := make([]byte, capability.BlockSize)
	if getLeaf(ctx, c.blocks, pair, capability.BlockSize, plaintext) == nil {
		c.left[0] = plaintext
	}
}

// Size returns the length of the content in bytes.
func (c *Content) Size() int64 { return c.length }

// Capability returns the capability that the content was opened with.
func (c *Content) Capability() ReadCapability { return c.spine.capability }

// ReadAt fills p with the content from the given offset in bytes on, as io.ReaderAt has it: it returns the number of bytes
// read, and an error if they are fewer than len(p), io.EOF at the end of the content. It fetches one block after the other,
// and remembers the last internal node of each level; for long parts WriteTo and NewReader are faster.
func (c *Content) ReadAt(ctx context.Context, p []byte, offset int64) (int, error) {
	if offset < 0 {
		return 0, errors.New("reading content: negative offset")
	}
	size := int64(c.spine.capability.BlockSize)
	var memory []byte
	n := 0
	for n < len(p) && offset < c.length {
		if err := ctx.Err(); err != nil {
			return n, err
		}
		index, skip := offset/size, int(offset%size)
		leaf := c.tail
		if index == 0 && c.left[0] != nil {
			leaf = c.left[0]
		} else if index < c.counts[0]-1 {
			pair, err := c.pair(ctx, 0, index)
			if err != nil {
				return n, err
			}
			// A whole leaf needs no detour.
			leaf = p[n:]
			if skip > 0 || len(leaf) < int(size) {
				if memory == nil {
					memory = make([]byte, size)
				}
				leaf = memory
			}
			leaf = leaf[:size:size]
			if err := getLeaf(ctx, c.blocks, pair, c.spine.capability.BlockSize, leaf); err != nil {
				return n, err
			}
		}
		m := min(len(leaf)-skip, len(p)-n)
		if &leaf[skip] != &p[n] {
			copy(p[n:], leaf[skip:])
		}
		n += m
		offset += int64(m)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// pair returns the pair of the index-th block at a level below the root.
func (c *Content) pair(ctx context.Context, level int, index int64) (Pair, error) {
	arity := int64(c.spine.capability.BlockSize.Arity())
	parent, slot := index/arity, int(index%arity)
	if parent == c.counts[level+1]-1 {
		return pairAt(c.path[level+1], slot), nil
	}
	if parent == 0 && c.left[level+1] != nil {
		return pairAt(c.left[level+1], slot), nil
	}
	c.mu.Lock()
	recent := c.recent[level+1]
	c.mu.Unlock()
	if recent.plaintext == nil || recent.index != parent {
		pair, err := c.pair(ctx, level+1, parent) // no deeper than the level of the root
		if err != nil {
			return Pair{}, err
		}
		recent = recentNode{parent, make([]byte, c.spine.capability.BlockSize)}
		node, err := getNode(ctx, c.blocks, &c.spine.capability, pair, level+1, recent.plaintext)
		if err == nil {
			err = checkFull(node, &c.spine.capability, pair)
		}
		if err != nil {
			return Pair{}, err
		}
		c.mu.Lock()
		c.recent[level+1] = recent
		c.mu.Unlock()
	}
	return pairAt(recent.plaintext, slot), nil
}

// WriteTo writes the whole content to w, with as many requests in flight as the window allows, and returns the number of
// bytes written. Every byte written belongs to a verified block and stands at its place; after an error, what was written
// is a prefix of the content. Errors are those of the package comment, of the context, or of w.
func (c *Content) WriteTo(ctx context.Context, w io.Writer) (int64, error) {
	r := c.NewReader(ctx)
	defer r.Close()
	return r.WriteTo(w)
}

// NewReader returns a reader of the whole content, which fetches ahead as far as the window allows. It must be closed. The
// context ends it.
func (c *Content) NewReader(ctx context.Context) *Reader {
	return &Reader{sequence: newSequenceOf(ctx, c)}
}

// Reader reads one content from start to end. It must not be used by several goroutines at a time.
type Reader struct {
	sequence *Sequence
	leaf     Leaf
	rest     []byte // of the leaf
	err      error
}

// Read reads the next bytes of the content. Errors are those of the package comment, or that of the context.
func (r *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := r.fill(); err != nil {
		return 0, err
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// fill gets the next leaf when the last one is used up.
func (r *Reader) fill() error {
	for len(r.rest) == 0 {
		r.leaf.Release()
		if r.err != nil {
			return r.err
		}
		if r.leaf, r.err = r.sequence.Leaf(); r.err != nil {
			return r.err
		}
		r.rest = r.leaf.Bytes
	}
	return nil
}

// WriteTo writes what is left of the content to w, without a copy in between.
func (r *Reader) WriteTo(w io.Writer) (int64, error) {
	var written int64
	for {
		if err := r.fill(); err == io.EOF {
			return written, nil
		} else if err != nil {
			return written, err
		}
		n, err := w.Write(r.rest)
		if n < 0 || n > len(r.rest) {
			return written, fmt.Errorf("writing content: writer returned a count of %d for %d bytes", n, len(r.rest))
		}
		written += int64(n)
		r.rest = r.rest[n:]
		if err == nil && len(r.rest) > 0 {
			err = io.ErrShortWrite
		}
		if err != nil {
			return written, err
		}
	}
}

// Close cancels all requests in flight and waits for them. It always returns nil.
func (r *Reader) Close() error {
	return r.sequence.Close()
}
