// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"
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

// A worker takes this many bytes of content at a time. For small blocks it is exactly a subtree of
// two levels, so that workers make nearly all internal nodes too; for large ones it is the 8 leaves
// that are hashed best together, and there is one internal node for 64 turns.
const (
	turn       = 256 << 10
	levelSmall = 2 // of the root of a turn in small blocks
)

// waitingTurns is how many turns per worker may be done out of order before the workers wait for
// the one that is late.
const waitingTurns = 32

// maxEmptyReads is how often a reader may return nothing and no error.
const maxEmptyReads = 100

// Encode reads content to its end, gives its blocks to the sink, and returns its read capability
// once the sink has them all. With a nil sink it merely computes the capability.
//
// It keeps one buffer of at most 256 KiB per worker, and one more; the sink is called by up to as
// many goroutines at a time as there are workers. Content that fits one buffer is encoded without
// further goroutines. The reader is never used by two goroutines at a time, but by different ones
// one after the other. If it has the method Len of [bytes.Reader], memory for short content is made
// to measure.
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
	w := newEncodeWorker(sink, size, options)
	pairs, err := w.encode(ctx, 0, pad(content, size))
	if err != nil {
		return ReadCapability{}, err
	}
	tree := treeBuilder{size: size, sink: sink}
	if err := addAll(ctx, &tree, 0, pairs); err != nil {
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

func addAll(ctx context.Context, tree *treeBuilder, level int, pairs []Pair) error {
	for _, pair := range pairs {
		if err := tree.add(ctx, level, pair); err != nil {
			return err
		}
	}
	return nil
}

// encodeWorker encodes one turn after another.
type encodeWorker struct {
	levels [levelSmall + 1]levelEncoder // those of internal nodes are for turns that are subtrees
	nodes  []byte                       // the plaintexts of one level of internal nodes
	pairs  []Pair
	leaves func(first int64, pairs []Pair)
}

func newEncodeWorker(sink Sink, size BlockSize, options EncodeOptions) *encodeWorker {
	w := new(encodeWorker)
	for level := range w.levels {
		w.levels[level] = levelEncoder{level: level, size: size, sink: sink}
	}
	w.levels[0].secret = &options.Secret
	if w.leaves = options.Leaves; w.leaves != nil {
		w.levels[0].sink = nil
	}
	return w
}

// encode encodes the whole leaves of a turn in place. The pairs are valid until the next call.
func (w *encodeWorker) encode(ctx context.Context, number int64, plaintext []byte) ([]Pair, error) {
	var err error
	w.pairs, err = w.levels[0].encode(ctx, w.pairs[:0], plaintext)
	if err == nil && w.leaves != nil {
		w.leaves(number*int64(turn/w.levels[0].size), w.pairs)
	}
	return w.pairs, err
}

// encodeSubtree encodes content in place, of which every node up to the top level is full, and
// returns the one pair there. It goes level by level, for nodes to be hashed many at a time.
func (w *encodeWorker) encodeSubtree(ctx context.Context, number int64, content []byte) (Pair, error) {
	if _, err := w.encode(ctx, number, content); err != nil {
		return Pair{}, err
	}
	for level := 1; level < len(w.levels); level++ {
		w.nodes = w.nodes[:0]
		for _, pair := range w.pairs {
			w.nodes = appendPair(w.nodes, pair)
		}
		var err error
		if w.pairs, err = w.levels[level].encode(ctx, w.pairs[:0], w.nodes); err != nil {
			return Pair{}, err
		}
	}
	return w.pairs[0], nil
}

// parallelEncoder is the state that the workers of one Encode share. They read in turns, encode on
// their own, and hand in pairs; whoever hands in the turn that is next in order goes on to build
// the tree as far as it can.
type parallelEncoder struct {
	size BlockSize
	most int // turns that may wait

	in     sync.Mutex // held while reading
	reader io.Reader
	turns  int64 // turns read so far
	atEnd  bool  // the reader has said io.EOF
	ended  bool  // the last turn has been read

	out      sync.Mutex
	room     sync.Cond
	waiting  map[int64]encodedTurn
	next     int64 // the turn that the tree needs next
	building bool  // a worker is using the tree
	tree     treeBuilder
}

// encodedTurn is what became of one turn: pairs at one level of the tree.
type encodedTurn struct {
	level int
	pairs []Pair
}

func encodeParallel(ctx context.Context, r io.Reader, sink Sink, size BlockSize, options EncodeOptions, workers int) (ReadCapability, error) {
	p := &parallelEncoder{
		size: size, most: workers * waitingTurns,
		reader:  r,
		waiting: make(map[int64]encodedTurn),
		tree:    treeBuilder{size: size, sink: sink},
	}
	p.room.L = &p.out
	group, groupCtx := errgroup.WithContext(ctx)
	// Workers that wait for room must not outlive an error.
	stop := context.AfterFunc(groupCtx, func() {
		p.out.Lock()
		defer p.out.Unlock()
		p.room.Broadcast()
	})
	defer stop()
	for range workers {
		group.Go(func() error { return p.work(groupCtx, newEncodeWorker(sink, size, options)) })
	}
	if err := group.Wait(); err != nil {
		return ReadCapability{}, err
	}
	return p.tree.finish(ctx)
}

// work encodes turns until the content ends.
func (p *parallelEncoder) work(ctx context.Context, w *encodeWorker) error {
	buffer := make([]byte, turn)
	for last := false; !last; {
		var content []byte
		var number int64
		var err error
		if content, number, last, err = p.read(ctx, buffer); content == nil || err != nil {
			return err
		}
		var encoded encodedTurn
		if p.size == BlockSize1KiB && !last {
			root, err := w.encodeSubtree(ctx, number, content)
			if err != nil {
				return err
			}
			encoded = encodedTurn{levelSmall, []Pair{root}}
		} else {
			if last {
				content = pad(content, p.size)
			}
			pairs, err := w.encode(ctx, number, content)
			if err != nil {
				return err
			}
			encoded = encodedTurn{0, slices.Clone(pairs)}
		}
		if err := p.handIn(ctx, number, encoded); err != nil {
			return err
		}
	}
	return nil
}

// read takes the next turn from the reader. The content is nil if there is none. The last turn is
// the only one that is not full; it may be empty.
func (p *parallelEncoder) read(ctx context.Context, buffer []byte) (content []byte, number int64, last bool, err error) {
	p.in.Lock()
	defer p.in.Unlock()
	if p.ended {
		return nil, 0, false, nil
	}
	if err := ctx.Err(); err != nil {
		return nil, 0, false, err
	}
	n := 0
	if !p.atEnd {
		if n, p.atEnd, err = readFull(p.reader, buffer); err != nil {
			p.ended = true
			return nil, 0, false, fmt.Errorf("encoding: %w", err)
		}
	}
	// The reader may have filled the buffer and said io.EOF at once: the padding then needs a turn
	// of its own.
	p.ended = p.atEnd && n < len(buffer)
	p.turns++
	return buffer[:n], p.turns - 1, p.ended, nil
}

// handIn gives the pairs of a turn to the tree, now or when those before it have come.
func (p *parallelEncoder) handIn(ctx context.Context, number int64, turn encodedTurn) error {
	p.out.Lock()
	defer p.out.Unlock()
	for number != p.next && len(p.waiting) >= p.most {
		if err := ctx.Err(); err != nil {
			return err
		}
		p.room.Wait()
	}
	p.waiting[number] = turn
	if p.building {
		return nil // the one who builds will come to it
	}
	p.building = true
	for {
		turn, ok := p.waiting[p.next]
		if !ok {
			break
		}
		delete(p.waiting, p.next)
		p.next++
		p.room.Broadcast()
		p.out.Unlock()
		err := addAll(ctx, &p.tree, turn.level, turn.pairs)
		p.out.Lock()
		if err != nil {
			return err // and building stays set, so that nobody uses the tree again
		}
	}
	p.building = false
	return nil
}
