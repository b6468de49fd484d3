// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"context"
	"fmt"
	"slices"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/lanes"
)

// Sink takes the blocks that [Encode] makes; nil takes none. It is given a block and its reference,
// which is the hash of the block. It returns when it is done with the memory of the block, which it
// must not change; a sink that wants more blocks under way than the encoder has goroutines can copy
// the block and return. An error ends the encoding. The same block may be put more than once, and
// several calls are made at the same time.
type Sink func(ctx context.Context, ref Reference, block []byte) error

// hashedAtOnce is how many blocks an encoder hashes in one call, at most: small blocks then stay in
// the cache nearest to the processor from one step to the next, and the turn that a key takes in
// each call is not felt.
const hashedAtOnce = 32

// levelEncoder encodes the nodes of one level.
type levelEncoder struct {
	level  int
	size   BlockSize
	secret *ConvergenceSecret // nil for internal nodes
	sink   Sink
	pairs  []Pair // of what was encoded last
}

// encode encodes whole nodes in place and puts their blocks. The pairs are valid until the next
// call.
func (l *levelEncoder) encode(ctx context.Context, plaintext []byte) ([]Pair, error) {
	l.pairs = l.pairs[:0]
	var keys, references [hashedAtOnce][32]byte
	var nodes [hashedAtOnce][]byte
	for part := range slices.Chunk(plaintext, hashedAtOnce*int(l.size)) {
		n := 0
		for node := range slices.Chunk(part, int(l.size)) {
			nodes[n] = node
			n++
		}
		encodeNodes(keys[:n], references[:n], nodes[:n], (*[32]byte)(l.secret), l.level)
		for i, block := range nodes[:n] {
			l.pairs = append(l.pairs, Pair{references[i], keys[i]})
			if l.sink == nil {
				continue
			}
			if err := l.sink(ctx, references[i], block); err != nil {
				return nil, fmt.Errorf("storing block %v: %w", Reference(references[i]), err)
			}
		}
	}
	return l.pairs, nil
}

// encodeNodes makes blocks of nodes of a level, in place.
func encodeNodes(keys, references [][32]byte, nodes [][]byte, secret *[32]byte, level int) {
	lanes.Sum256(keys, nodes, secret)
	for i, node := range nodes {
		lanes.XORKeyStream(node, node, &keys[i], byte(level))
	}
	lanes.Sum256(references, nodes, nil)
}

// treeBuilder makes the internal nodes of a tree while the pairs of its leaves arrive in order.
type treeBuilder struct {
	size   BlockSize
	sink   Sink
	levels []treeLevel // the highest one is never empty
}

// treeLevel collects the pairs of the nodes at one level, until they fill nodes of the next.
type treeLevel struct {
	pairs []byte
	nodes levelEncoder // of the next level
}

// add takes the pairs of the next nodes at the given level, level 0 being the leaves.
func (t *treeBuilder) add(ctx context.Context, level int, pairs []Pair) error {
	if level == len(t.levels) {
		t.levels = append(t.levels, treeLevel{nodes: levelEncoder{level: level + 1, size: t.size, sink: t.sink}})
	}
	for _, pair := range pairs {
		l := &t.levels[level]
		l.pairs = appendPair(l.pairs, pair)
		// That is one large node, or as many small ones as are hashed at once.
		if len(l.pairs) == int(BlockSize32KiB) {
			if err := t.flush(ctx, level); err != nil {
				return err
			}
		}
	}
	return nil
}

// flush makes nodes of the pairs collected at a level.
func (t *treeBuilder) flush(ctx context.Context, level int) error {
	l := &t.levels[level]
	plaintext := append(l.pairs, zeroBlock[:-len(l.pairs)&(int(t.size)-1)]...)
	l.pairs = plaintext[:0]
	made, err := l.nodes.encode(ctx, plaintext)
	if err != nil {
		return err
	}
	return t.add(ctx, level+1, made)
}

// finish makes the nodes that are not full and returns the capability. At least one pair must have
// been added. A single pair on top is the root.
func (t *treeBuilder) finish(ctx context.Context) (ReadCapability, error) {
	for level := 0; ; level++ {
		pairs := t.levels[level].pairs
		if len(pairs) == pairSize && level == len(t.levels)-1 {
			root := pairAt(pairs, 0)
			return ReadCapability{BlockSize: t.size, Level: level, Root: root.Reference, Key: root.Key}, nil
		}
		if len(pairs) > 0 {
			if err := t.flush(ctx, level); err != nil {
				return ReadCapability{}, err
			}
		}
	}
}
