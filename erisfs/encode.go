// SPDX-License-Identifier: GPL-3.0-or-later

package erisfs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math"
	"runtime"
	"strings"
	"unicode/utf8"

	"golang.org/x/sync/errgroup"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// EncodeOptions say how [Encode] works. The zero value is what everything that is published must
// have, so that independent publishers come to the same capability.
type EncodeOptions struct {
	// Secret is the convergence secret of the files and of the index.
	Secret eris.ConvergenceSecret
	// Workers is how many files are encoded at a time; a core each by default.
	Workers int
	// File, if not nil, is called for each file, by several goroutines: path is as in [Entry], size
	// in bytes. It returns the sink for inner nodes of the file, and what is told its leaves, as in
	// [eris.EncodeOptions]. The sink of [Encode] is given the blocks of the index then.
	File func(path string, size uint64) (inner eris.Sink, leaves func(first int64, pairs []eris.Pair))
}

// A Result is a tree that has been encoded.
type Result struct {
	// Capability denotes the index.
	Capability eris.ReadCapability
	// NarHash is the SHA-256 of the archive of the tree, and NarSize its length in bytes.
	NarHash [sha256.Size]byte
	NarSize uint64
}

// wholeFile is the length in bytes up to which a file is collected and encoded by one worker;
// larger files are encoded by all of them, one after the other.
const wholeFile = 1 << 20

// Encode encodes a tree: it puts the blocks of each file and of the index into sink, and returns
// the capability of the index. With a nil sink it computes the capability only. The sink is called
// from several goroutines.
//
// The block size of each content is that of [eris.BlockSizeFor]. The result has been checked: the
// index, read back, makes the tree whose NarHash is in the result. A tree that has no ERIS-FS form
// is an error that wraps [ErrNotRepresentable]; what has been put by then stays in the sink. Other
// errors are those of nodes, of the sink and of ctx.
func Encode(ctx context.Context, nodes nar.Nodes, sink eris.Sink, o EncodeOptions) (Result, error) {
	if o.Workers < 1 {
		o.Workers = runtime.GOMAXPROCS(0)
	}
	group, groupContext := errgroup.WithContext(ctx)
	group.SetLimit(o.Workers + 1)
	e := &encoder{
		ctx: groupContext, group: group, nodes: nodes, sink: sink, options: o,
		hash: nar.NewHasher(groupContext),
	}
	group.Go(e.walk)
	if err := group.Wait(); err != nil {
		return Result{}, err
	}
	entries := make([]Entry, len(e.entries))
	for i, p := range e.entries {
		entries[i] = *p
	}
	index := EncodeIndex(entries)
	if err := verify(index, entries, e.hash.Size()); err != nil {
		return Result{}, fmt.Errorf("the index does not describe the tree: %w", err)
	}
	c, err := eris.Encode(ctx, bytes.NewReader(index), sink,
		eris.EncodeOptions{BlockSize: eris.BlockSizeFor(int64(len(index))), Secret: o.Secret, Workers: o.Workers})
	if err != nil {
		return Result{}, fmt.Errorf("index: %w", err)
	}
	return Result{c, e.sum, e.hash.Size()}, nil
}

type encoder struct {
	ctx     context.Context
	group   *errgroup.Group // of the walk and of small files
	nodes   nar.Nodes
	sink    eris.Sink
	options EncodeOptions

	// The rest belongs to walk until it has ended.
	hash    *nar.Hasher
	sum     [sha256.Size]byte
	entries []*Entry
	path    []string
	empty   bool // the directory under way has no entries so far
}

// walk reads the tree, encodes large files and has small ones encoded by others.
func (e *encoder) walk() error {
	defer func() { e.sum = e.hash.Finish() }()
	return e.hash.Walk(e.nodes, e.node)
}

func (e *encoder) node(n nar.Node) error {
	if !utf8.ValidString(n.Name) || !utf8.ValidString(n.Target) {
		return fmt.Errorf("%w: the name or target %.300q is not UTF-8", ErrNotRepresentable, n.Name+n.Target)
	}
	switch n.Kind {
	case nar.Directory:
		e.path = append(e.path, n.Name)
		e.empty = true
		return nil
	case nar.End:
		if e.empty {
			return fmt.Errorf("%w: directory %q is empty", ErrNotRepresentable, strings.Join(e.path[1:], "/"))
		}
		e.path = e.path[:len(e.path)-1]
		return nil
	}
	e.empty = false
	entry := &Entry{Kind: n.Kind, Executable: n.Executable, Target: n.Target}
	if len(e.path) > 0 {
		entry.Path = strings.Join(append(e.path[1:len(e.path):len(e.path)], n.Name), "/")
	}
	e.entries = append(e.entries, entry)
	if n.Kind == nar.Symlink {
		return nil
	}
	return e.file(entry, n)
}

// file encodes a file, or has it encoded.
func (e *encoder) file(entry *Entry, n nar.Node) error {
	if n.Size > wholeFile {
		return e.encode(entry, &contentsReader{next: e.contents, length: n.Size}, e.options.Workers)
	}
	var chunks []nar.Chunk
	for {
		c, err := e.contents()
		if err == io.EOF {
			break
		} else if err != nil {
			return err
		}
		chunks = append(chunks, c)
	}
	next := func() (nar.Chunk, error) {
		if len(chunks) == 0 {
			return nar.Chunk{}, io.EOF
		}
		c := chunks[0]
		chunks = chunks[1:]
		return c, nil
	}
	e.group.Go(func() error { return e.encode(entry, &contentsReader{next: next, length: n.Size}, 1) })
	return nil
}

// contents reads the next contents of the file under way, and hashes them.
func (e *encoder) contents() (nar.Chunk, error) {
	c, err := e.nodes.Contents()
	if err == nil {
		err = e.hash.Contents(c)
	}
	return c, err
}

// encode encodes the contents of a file.
func (e *encoder) encode(entry *Entry, r *contentsReader, workers int) (err error) {
	o := eris.EncodeOptions{BlockSize: eris.BlockSizeFor(int64(r.length)), Secret: e.options.Secret, Workers: workers}
	sink := e.sink
	if e.options.File != nil {
		sink, o.Leaves = e.options.File(entry.Path, r.length)
	}
	entry.Capability, err = eris.Encode(e.ctx, r, sink, o)
	if err != nil {
		return fmt.Errorf("file %.300q: %w", entry.Path, err)
	}
	return nil
}

// contentsReader reads the contents of a file.
type contentsReader struct {
	next   func() (nar.Chunk, error)
	length uint64 // in all
	chunk  nar.Chunk
	rest   []byte
}

// Len tells [eris.Encode] how much memory to take; it calls it before it reads.
func (r *contentsReader) Len() int { return int(min(r.length, math.MaxInt)) }

// Read implements io.Reader.
func (r *contentsReader) Read(p []byte) (int, error) {
	if len(r.rest) == 0 {
		r.chunk.Release()
		r.chunk = nar.Chunk{}
		c, err := r.next()
		if err != nil {
			return 0, err
		}
		r.chunk, r.rest = c, c.Bytes
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// verify reads an index back, as whoever fetches it will, and compares it with the files and links
// of the walk, in their order, from which all directories follow.
func verify(index []byte, entries []Entry, narSize uint64) error {
	limits := Limits{NarSize: max(narSize, 1<<20)}
	if len(entries) > maxEntries || int64(len(index)) > limits.IndexLength() {
		return fmt.Errorf("%w: it has too many paths, or too long ones", ErrNotRepresentable)
	}
	x, err := Decode(index, limits)
	if err != nil {
		return err
	}
	if x.Len() != len(entries) {
		return fmt.Errorf("%d entries instead of %d", x.Len(), len(entries))
	}
	for i, want := range entries {
		if x.Entry(i) != want {
			return fmt.Errorf("entry %.300q is another one", want.Path)
		}
	}
	return nil
}
