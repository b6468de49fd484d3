// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"context"
	"errors"
	"fmt"
	"slices"
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

// Encoder encodes content that is written to it. It keeps at most 256 KiB of it (32 KiB for small blocks) and, for each level
// of the tree, an internal node. It must not be used by several goroutines at a time. Encode is faster if the content can be
// read.
type Encoder struct {
	ctx    context.Context
	leaves levelEncoder
	tree   treeBuilder
	buffer []byte // content that is not encoded yet: less than fits
	pairs  []Pair
	closed bool
	result ReadCapability
	err    error // kept once something failed
}

// NewEncoder returns an Encoder that gives its blocks to the sink; a nil sink takes none, and the Encoder then merely
// computes the capability. The context is handed to the sink, and once it ends, Write and Close return its error. It
// returns an error if the block size is not valid.
func NewEncoder(ctx context.Context, sink Sink, size BlockSize, secret ConvergenceSecret) (*Encoder, error) {
	if !size.Valid() {
		return nil, fmt.Errorf("encoding: block size of %d bytes is neither 1 KiB nor 32 KiB", int(size))
	}
	return &Encoder{
		ctx:    ctx,
		leaves: levelEncoder{size: size, secret: &secret, sink: sink},
		tree:   treeBuilder{size: size, sink: sink},
	}, nil
}

// Write adds p to the content. It returns the error of the context or of the sink, which may be about content of an earlier
// Write; the content is lost then.
func (e *Encoder) Write(p []byte) (int, error) {
	if e.closed {
		return 0, errors.New("encoding: write after close")
	}
	full := min(hashedAtOnce*int(e.tree.size), turnLarge)
	written := 0
	for len(p) > 0 && e.err == nil {
		if e.err = e.ctx.Err(); e.err != nil {
			break
		}
		n := min(len(p), full-len(e.buffer))
		e.grow(n, full)
		e.buffer = append(e.buffer, p[:n]...)
		if len(e.buffer) == full {
			e.err = e.encode(e.buffer)
			e.buffer = e.buffer[:0]
		}
		if e.err == nil {
			written += n
			p = p[n:]
		}
	}
	return written, e.err
}

// grow makes room for n more bytes. Most contents are small, so the buffer starts with a block, and is doubled until full.
func (e *Encoder) grow(n, full int) {
	need := len(e.buffer) + n
	if need <= cap(e.buffer) {
		return
	}
	capacity := max(cap(e.buffer), int(e.tree.size))
	for capacity < need {
		capacity *= 2
	}
	e.buffer = append(make([]byte, 0, min(capacity, full)), e.buffer...)
}

// encode encodes complete leaves, in place.
func (e *Encoder) encode(plaintext []byte) error {
	var err error
	if e.pairs, err = e.leaves.encode(e.ctx, e.pairs[:0], plaintext); err != nil {
		return err
	}
	return addAll(e.ctx, &e.tree, 0, e.pairs)
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
		e.err = e.encode(Pad(e.buffer, e.tree.size))
	}
	if e.err == nil {
		e.result, e.err = e.tree.finish(e.ctx)
	}
	return e.result, e.err
}

// hashedAtOnce is how many blocks an encoder hashes in one call, at most: small blocks then stay in the cache nearest to the
// processor from one step to the next, and the turn that a key takes in each call is not felt.
const hashedAtOnce = 32

// levelEncoder encodes the nodes of one level in order, and puts those that differ from the one before. A run of equal
// nodes, as sparse files have it, then costs one hash per node.
type levelEncoder struct {
	level  int
	size   BlockSize
	secret *ConvergenceSecret // nil for internal nodes
	sink   Sink
	last   Pair
	any    bool
}

// encode encodes whole nodes in place, puts their blocks, and appends their pairs.
func (l *levelEncoder) encode(ctx context.Context, pairs []Pair, plaintext []byte) ([]Pair, error) {
	for len(plaintext) > 0 {
		n := min(len(plaintext), hashedAtOnce*int(l.size))
		var err error
		if pairs, err = l.encodeAtOnce(ctx, pairs, plaintext[:n]); err != nil {
			return nil, err
		}
		plaintext = plaintext[n:]
	}
	return pairs, nil
}

// encodeAtOnce is encode for up to hashedAtOnce nodes.
func (l *levelEncoder) encodeAtOnce(ctx context.Context, pairs []Pair, plaintext []byte) ([]Pair, error) {
	var keys, references [hashedAtOnce][32]byte
	var blocks [hashedAtOnce][]byte
	n := 0
	for block := range slices.Chunk(plaintext, int(l.size)) {
		blocks[n] = block
		n++
	}
	sumBlocks(keys[:n], blocks[:n], l.secret)

	// From here on blocks has only those that differ from the one before.
	different := 0
	for i, key := range keys[:n] {
		if i > 0 && key == keys[i-1] || i == 0 && l.any && Key(key) == l.last.Key {
			continue
		}
		xorKeyStream(blocks[i], blocks[i], (*Key)(&key), levelByte(l.level))
		blocks[different] = blocks[i]
		different++
	}
	sumBlocks(references[:different], blocks[:different], nil)

	next := 0
	for _, key := range keys[:n] {
		if !l.any || Key(key) != l.last.Key {
			l.last, l.any = Pair{references[next], key}, true
			if err := put(ctx, l.sink, l.last.Reference, blocks[next]); err != nil {
				return nil, err
			}
			next++
		}
		pairs = append(pairs, l.last)
	}
	return pairs, nil
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
