// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"runtime"
	"slices"

	"golang.org/x/sync/errgroup"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/lanes"
)

// EncodeOptions says how Encode encodes. The zero value follows every recommendation: the block
// size by the length of the content, the null convergence secret, a worker per core.
type EncodeOptions struct {
	BlockSize BlockSize         // 0: the size that BlockSizeFor returns for the length of the content
	Secret    ConvergenceSecret // zero: the null convergence secret
	Workers   int               // goroutines that hash, encrypt and put; below 1: runtime.GOMAXPROCS(0)
	// Leaves, if not nil, is told the pairs of the leaves, of which the first has the given number,
	// instead of the sink being given their blocks: [EncodeLeaves] makes them again. It must not
	// keep the pairs, and is called as the sink is.
	Leaves func(first int64, pairs []Pair)
}

// turn is how many bytes of content a worker takes at a time: many leaves that are hashed best
// together.
const turn = 256 << 10

// waitingTurns is how many turns per worker may be done out of order before the workers wait for
// the one that is late.
const waitingTurns = 32

// maxEmptyReads is how often a reader may return nothing and no error.
const maxEmptyReads = 100

// Encode reads content to its end, gives its blocks to the sink, and returns its read capability
// once the sink has them all. With a nil sink it merely computes the capability.
//
// It keeps one buffer of at most 256 KiB per worker, and one more; the sink is called by up to as
// many goroutines at a time as there are workers, and one more. Content that fits one buffer is
// encoded without further goroutines. The reader is never used by two goroutines at a time, but by
// different ones one after the other. If it has the method Len of [bytes.Reader], memory for short
// content is made to measure.
//
// The first error ends it: one of the reader (io.EOF alone is the end of the content), of the sink,
// or of the context. A call of Read that is under way cannot be interrupted, and Encode waits for
// it. What was put by then stays in the sink.
func Encode(ctx context.Context, r io.Reader, sink Sink, options EncodeOptions) (ReadCapability, error) {
	size := options.BlockSize
	if size != 0 && !size.Valid() {
		return ReadCapability{}, fmt.Errorf("encoding: block size of %d bytes is neither 1 KiB nor 32 KiB", int(size))
	}
	if err := ctx.Err(); err != nil {
		return ReadCapability{}, err
	}
	content, ended, err := firstTurn(r)
	if err != nil {
		return ReadCapability{}, fmt.Errorf("encoding: %w", err)
	}
	if size == 0 {
		size = BlockSize32KiB
		if ended { // a reader may return the last bytes together with io.EOF
			size = BlockSizeFor(int64(len(content)))
		}
	}
	if !ended {
		workers := options.Workers
		if workers < 1 {
			workers = runtime.GOMAXPROCS(0)
		}
		return encodeParallel(ctx, io.MultiReader(bytes.NewReader(content), r), sink, size, options, workers)
	}
	tree := treeBuilder{size: size, sink: sink}
	pairs, err := newLeafEncoder(sink, size, options).encode(ctx, 0, pad(content, size))
	if err == nil {
		err = tree.add(ctx, 0, pairs)
	}
	if err != nil {
		return ReadCapability{}, err
	}
	return tree.finish(ctx)
}

// firstTurn reads a turn, or what there is if the content ends before. Most contents are small, so
// it takes a whole buffer only if it has to.
func firstTurn(r io.Reader) (content []byte, ended bool, err error) {
	var buffer []byte
	if l, ok := r.(interface{ Len() int }); ok {
		n := min(max(l.Len(), 0), turn-1)
		size := int(BlockSizeFor(int64(n)))
		buffer = make([]byte, n+1, (n/size+1)*size) // with room for the padding
	} else {
		buffer = make([]byte, smallContent)
	}
	n, ended, err := readFull(r, buffer)
	if err != nil || ended || len(buffer) == turn {
		return buffer[:n], ended, err
	}
	content = make([]byte, turn)
	m, ended, err := readFull(r, content[copy(content, buffer):])
	return content[:n+m], ended, err
}

// readFull reads until b is full or the content ends. Unlike io.ReadFull it takes only io.EOF for
// the end: a reader's own io.ErrUnexpectedEOF, which says that its input was cut off, must not pass
// for a shorter content.
func readFull(r io.Reader, b []byte) (n int, ended bool, err error) {
	for empty := 0; n < len(b); {
		m, err := r.Read(b[n:])
		if m < 0 || m > len(b)-n {
			return n, false, fmt.Errorf("reader returned a count of %d for %d bytes", m, len(b)-n)
		}
		n += m
		if err == io.EOF {
			return n, true, nil
		}
		if err != nil {
			return n, false, err
		}
		if empty++; m > 0 {
			empty = 0
		}
		if empty >= maxEmptyReads {
			return n, false, io.ErrNoProgress
		}
	}
	return n, false, nil
}

// leafEncoder encodes the leaves of one turn after another.
type leafEncoder struct {
	levelEncoder
	buffer []byte // for a turn
	told   func(first int64, pairs []Pair)
}

func newLeafEncoder(sink Sink, size BlockSize, options EncodeOptions) *leafEncoder {
	if options.Leaves != nil {
		sink = nil
	}
	return &leafEncoder{levelEncoder: levelEncoder{size: size, secret: &options.Secret, sink: sink}, told: options.Leaves}
}

// encode does so with the whole leaves of a turn, and tells their pairs.
func (l *leafEncoder) encode(ctx context.Context, number int64, plaintext []byte) ([]Pair, error) {
	pairs, err := l.levelEncoder.encode(ctx, plaintext)
	if err == nil && l.told != nil {
		l.told(number*int64(turn/l.size), pairs)
	}
	return pairs, err
}

// turns is one Encode on several cores: turns are read one after the other, and encoded by as many
// goroutines as there are encoders.
type turns struct {
	size  BlockSize
	free  chan *leafEncoder
	order chan chan []Pair // what becomes of each turn, in the order of the content
	group *errgroup.Group
}

func encodeParallel(ctx context.Context, r io.Reader, sink Sink, size BlockSize, options EncodeOptions, workers int) (ReadCapability, error) {
	t := &turns{size: size, free: make(chan *leafEncoder, workers), order: make(chan chan []Pair, workers*waitingTurns)}
	for range workers {
		t.free <- newLeafEncoder(sink, size, options)
	}
	tree := treeBuilder{size: size, sink: sink}
	var groupCtx context.Context
	t.group, groupCtx = errgroup.WithContext(ctx)
	t.group.Go(func() error { return t.read(groupCtx, r) })
	t.group.Go(func() error {
		for result := range t.order {
			if err := tree.add(groupCtx, 0, <-result); err != nil {
				return err
			}
		}
		return nil
	})
	if err := t.group.Wait(); err != nil {
		return ReadCapability{}, err
	}
	return tree.finish(ctx)
}

// read has one turn after the other encoded, until the content ends.
func (t *turns) read(ctx context.Context, r io.Reader) error {
	defer close(t.order)
	ended := false
	for number := int64(0); !ended; number++ {
		var leaves *leafEncoder
		select {
		case leaves = <-t.free:
		case <-ctx.Done():
			return ctx.Err()
		}
		if leaves.buffer == nil {
			leaves.buffer = make([]byte, turn, turn+int(t.size)) // with room for the padding
		}
		var n int
		var err error
		if n, ended, err = readFull(r, leaves.buffer); err != nil {
			return fmt.Errorf("encoding: %w", err)
		}
		content := leaves.buffer[:n]
		if ended {
			content = pad(content, t.size)
		}
		result := make(chan []Pair, 1)
		select {
		case t.order <- result:
		case <-ctx.Done():
			return ctx.Err()
		}
		t.group.Go(func() error { return t.encode(ctx, leaves, number, content, result) })
	}
	return nil
}

// encode encodes one turn. If that fails the result has no pairs.
func (t *turns) encode(ctx context.Context, leaves *leafEncoder, number int64, content []byte, result chan<- []Pair) error {
	defer close(result)
	pairs, err := leaves.encode(ctx, number, content)
	if err == nil {
		result <- slices.Clone(pairs)
		t.free <- leaves
	}
	return err
}

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
