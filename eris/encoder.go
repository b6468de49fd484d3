// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"context"
	"errors"
	"fmt"
)

// Sink takes the blocks that an encoder makes.
type Sink interface {
	// Put is given a block and its reference, which is the hash of the block. It returns when it is done with the memory
	// of the block, which it must not change; a sink that wants more blocks under way than the encoder has goroutines can
	// copy the block and return. An error ends the encoding. The same block may be put more than once.
	//
	// [Encoder] makes one call at a time; [Encode] makes as many calls at the same time as it has workers.
	Put(ctx context.Context, ref Reference, block []byte) error
}

// SinkFunc makes a [Sink] of a function.
type SinkFunc func(ctx context.Context, ref Reference, block []byte) error

// Put calls f.
func (f SinkFunc) Put(ctx context.Context, ref Reference, block []byte) error {
	return f(ctx, ref, block)
}

// Encoder encodes content that is written to it. It needs no more memory than two blocks and, for each level of the tree,
// an internal node. It must not be used by several goroutines at a time. Encode is faster if the content can be read.
type Encoder struct {
	ctx     context.Context
	leaves  leafEncoder
	tree    treeBuilder
	partial []byte // the start of the leaf that is not complete yet; its capacity is that of a leaf
	block   []byte // where blocks are made
	closed  bool
	result  ReadCapability
	err     error // kept once something failed
}

// NewEncoder returns an Encoder that gives its blocks to the sink; a nil sink takes none, and the Encoder then merely
// computes the capability. The context is handed to the sink, and once it ends, Write and Close return its error. It
// returns an error if the block size is not valid.
func NewEncoder(ctx context.Context, sink Sink, size BlockSize, secret ConvergenceSecret) (*Encoder, error) {
	if !size.Valid() {
		return nil, fmt.Errorf("encoding: block size of %d bytes is neither 1 KiB nor 32 KiB", int(size))
	}
	return &Encoder{
		ctx:     ctx,
		leaves:  leafEncoder{encrypter: NewEncrypter(secret), sink: sink},
		tree:    treeBuilder{size: size, sink: sink},
		partial: make([]byte, 0, size),
		block:   make([]byte, size),
	}, nil
}

// Write adds p to the content. It returns the error of the context or of the sink; the content is lost then.
func (e *Encoder) Write(p []byte) (int, error) {
	if e.closed {
		return 0, errors.New("encoding: write after close")
	}
	written := 0
	for len(p) > 0 && e.err == nil {
		if e.err = e.ctx.Err(); e.err != nil {
			break
		}
		n := int(e.tree.size)
		if len(e.partial) == 0 && len(p) >= n {
			e.err = e.leaf(p[:n])
		} else {
			n = min(len(p), n-len(e.partial))
			e.partial = append(e.partial, p[:n]...)
			if len(e.partial) == int(e.tree.size) {
				e.err = e.leaf(e.partial)
				e.partial = e.partial[:0]
			}
		}
		if e.err == nil {
			written += n
			p = p[n:]
		}
	}
	return written, e.err
}

// leaf encodes one complete leaf.
func (e *Encoder) leaf(plaintext []byte) error {
	pair, err := e.leaves.encode(e.ctx, e.block, plaintext)
	if err != nil {
		return err
	}
	return e.tree.add(e.ctx, 0, pair)
}

// Close ends the content and returns its read capability, once the sink has every block. It returns the error of the
// context, of the sink, or of an earlier Write. Further calls return the same again.
func (e *Encoder) Close() (ReadCapability, error) {
	if e.closed {
		return e.result, e.err
	}
	e.closed = true
	if e.err == nil {
		e.err = e.ctx.Err()
	}
	if e.err == nil {
		e.err = e.leaf(Pad(e.partial, e.tree.size))
	}
	if e.err == nil {
		e.result, e.err = e.tree.finish(e.ctx)
	}
	return e.result, e.err
}

// leafEncoder encodes leaves, and puts those that differ from the one before. A run of equal leaves, as sparse files have
// it, then costs one hash per leaf.
type leafEncoder struct {
	encrypter *Encrypter
	sink      Sink
	last      Pair
	any       bool
}

// encode writes the block of the leaf to dst, which may be plaintext, and puts it.
func (l *leafEncoder) encode(ctx context.Context, dst, plaintext []byte) (Pair, error) {
	key := l.encrypter.leafKey(plaintext)
	if l.any && key == l.last.Key {
		return l.last, nil
	}
	pair := encryptWith(key, dst, plaintext, 0)
	if err := put(ctx, l.sink, pair.Reference, dst); err != nil {
		return Pair{}, err
	}
	l.last, l.any = pair, true
	return pair, nil
}

func put(ctx context.Context, sink Sink, ref Reference, block []byte) error {
	if sink == nil {
		return nil
	}
	if err := sink.Put(ctx, ref, block); err != nil {
		return fmt.Errorf("storing block %v: %w", ref, err)
	}
	return nil
}

// treeBuilder makes the internal nodes of a tree while the pairs of its leaves arrive in order. It holds one unfinished
// node per level.
type treeBuilder struct {
	size   BlockSize
	sink   Sink
	levels []treeLevel
	block  []byte
}

// treeLevel collects the pairs of the nodes at one level, until they fill a node of the next.
type treeLevel struct {
	pairs []byte // with the capacity of a block
	last  Pair   // of the last node that was made of such pairs, to recognise an equal one
	made  bool
}

// add takes the pair of the next node at the given level, level 0 being the leaves. Pairs of a higher level may be added
// only where the levels below have no unfinished node.
func (t *treeBuilder) add(ctx context.Context, level int, pair Pair) error {
	for {
		for len(t.levels) <= level {
			t.levels = append(t.levels, treeLevel{pairs: make([]byte, 0, t.size)})
		}
		l := &t.levels[level]
		l.pairs = appendPair(l.pairs, pair)
		if len(l.pairs) < int(t.size) {
			return nil
		}
		var err error
		if pair, err = t.flush(ctx, level); err != nil {
			return err
		}
		level++
	}
}

// flush makes a node of the pairs collected at a level.
func (t *treeBuilder) flush(ctx context.Context, level int) (Pair, error) {
	l := &t.levels[level]
	plaintext := l.pairs[:t.size]
	clear(plaintext[len(l.pairs):])
	l.pairs = l.pairs[:0]
	if t.block == nil {
		t.block = make([]byte, t.size)
	}
	key := Key(Sum(plaintext)) // the same hash, with another meaning
	if l.made && key == l.last.Key {
		return l.last, nil
	}
	pair := encryptWith(key, t.block, plaintext, level+1)
	if err := put(ctx, t.sink, pair.Reference, t.block); err != nil {
		return Pair{}, err
	}
	l.last, l.made = pair, true
	return pair, nil
}

// finish makes the nodes that are not full and returns the capability. At least one pair must have been added. A level's
// pairs become a node if there is more than one, or if a higher level has any; a single pair on top is the root.
func (t *treeBuilder) finish(ctx context.Context) (ReadCapability, error) {
	for level := 0; ; level++ {
		pairs := t.levels[level].pairs
		if len(pairs) == pairSize && !t.pairsAbove(level) {
			root := pairAt(pairs, 0)
			return ReadCapability{BlockSize: t.size, Level: level, Root: root.Reference, Key: root.Key}, nil
		}
		if len(pairs) == 0 {
			continue
		}
		pair, err := t.flush(ctx, level)
		if err != nil {
			return ReadCapability{}, err
		}
		if err := t.add(ctx, level+1, pair); err != nil {
			return ReadCapability{}, err
		}
	}
}

func (t *treeBuilder) pairsAbove(level int) bool {
	for _, l := range t.levels[level+1:] {
		if len(l.pairs) > 0 {
			return true
		}
	}
	return false
}
