// SPDX-License-Identifier: GPL-3.0-or-later

package nar

import (
	"encoding/binary"
	"fmt"
	"io"
)

// A Reader turns the bytes of an archive into nodes; it implements [Nodes]. It accepts exactly the
// archives that the daemon's own importer accepts (Guix, nix/libutil/archive.cc: parse): one
// archive per tree, with names in order, zero padding, and nothing behind it. It never allocates by
// a length that the archive claims, and memory does not grow but with the depth of the tree.
type Reader struct {
	feeder  Feeder
	chunk   Chunk  // what is being read; its owner is held once
	rest    []byte // the part of chunk that is not read yet
	scratch []byte // for what spans chunks
	offset  uint64 // of rest in the archive
	failed  error

	state readerState
	left  uint64 // of the contents under way
	size  uint64 // of the contents under way
	open  []openDirectory
	path  int // length of the path of the directory under way
}

type openDirectory struct {
	last string // name of the entry read last, "" before the first
	name int    // length of this directory's own name and slash
}

type readerState uint8

const (
	atRoot readerState = iota
	inDirectory
	inContents
	atEnd
)

// NewReader returns a reader of the archive that feeder brings. It takes what feeder hands out and
// releases it; the feeder itself stays the caller's, and so does closing it.
func NewReader(feeder Feeder) *Reader { return &Reader{feeder: feeder} }

// Next implements [Nodes]. Errors of the archive name the offset of the fault.
func (r *Reader) Next() (Node, error) {
	if r.failed != nil {
		return Node{}, r.failed
	}
	n, err := r.next()
	if err != nil {
		return Node{}, r.fail(err)
	}
	return n, nil
}

// fail makes err final and lets go of the memory.
func (r *Reader) fail(err error) error {
	r.failed = err
	r.chunk.Release()
	r.chunk, r.rest = Chunk{}, nil
	return err
}

func (r *Reader) errorf(format string, a ...any) error {
	return fmt.Errorf("malformed nar at byte %d: %w", r.offset, fmt.Errorf(format, a...))
}

func (r *Reader) next() (Node, error) {
	if r.state == inContents {
		if err := r.skipContents(); err != nil {
			return Node{}, err
		}
	}
	switch r.state {
	case atRoot:
		if err := r.expect(magic); err != nil {
			return Node{}, err
		}
		return r.node("")
	case inDirectory:
		token, err := r.token()
		if err != nil {
			return Node{}, err
		}
		switch token {
		case ")":
			last := len(r.open) - 1
			r.path -= r.open[last].name
			r.open = r.open[:last]
			return Node{Kind: End}, r.endNode()
		case "entry":
			return r.entry()
		}
		return Node{}, r.errorf("%q where an entry or the end of a directory is due", token)
	}
	// atEnd
	for len(r.rest) == 0 {
		if err := r.refill(); err == io.EOF {
			return Node{}, io.EOF
		} else if err != nil {
			return Node{}, err
		}
	}
	return Node{}, r.errorf("bytes after the end of the archive")
}

// entry reads an entry from behind the word "entry".
func (r *Reader) entry() (Node, error) {
	if err := r.expect("(", "name"); err != nil {
		return Node{}, err
	}
	b, err := r.string(MaxName)
	if err != nil {
		return Node{}, fmt.Errorf("entry name: %w", err)
	}
	name := string(b)
	if err := CheckName(name); err != nil {
		return Node{}, r.errorf("%w", err)
	}
	dir := &r.open[len(r.open)-1]
	switch {
	case name == dir.last:
		return Node{}, r.errorf("entry %q twice", name)
	case name < dir.last:
		return Node{}, r.errorf("entry %q after %q", name, dir.last)
	case r.path+len(name) > MaxPath:
		return Node{}, r.errorf("path of entry %q is longer than %d bytes", name, MaxPath)
	}
	dir.last = name
	if err := r.expect("node"); err != nil {
		return Node{}, err
	}
	return r.node(name)
}

// node reads a node up to its contents or entries.
func (r *Reader) node(name string) (Node, error) {
	if err := r.expect("(", "type"); err != nil {
		return Node{}, err
	}
	kind, err := r.token()
	if err != nil {
		return Node{}, err
	}
	n := Node{Name: name}
	switch kind {
	case "directory":
		n.Kind = Directory
		d := openDirectory{}
		if len(r.open) > 0 {
			d.name = len(name) + 1
		}
		r.path += d.name
		r.open = append(r.open, d)
		r.state = inDirectory
		return n, nil
	case "symlink":
		n.Kind = Symlink
		if err := r.expect("target"); err != nil {
			return n, err
		}
		b, err := r.string(MaxTarget)
		if err != nil {
			return n, fmt.Errorf("target of symbolic link %q: %w", name, err)
		}
		n.Target = string(b)
		if err := CheckTarget(n.Target); err != nil {
			return n, r.errorf("%w", err)
		}
		if err := r.expect(")"); err != nil {
			return n, err
		}
		return n, r.endNode()
	case "regular":
		n.Kind = Regular
		token, err := r.token()
		if err != nil {
			return n, err
		}
		if token == "executable" {
			n.Executable = true
			if err := r.expect(""); err != nil {
				return n, err
			}
			if token, err = r.token(); err != nil {
				return n, err
			}
		}
		if token != "contents" {
			return n, r.errorf("%q where contents are due", token)
		}
		if n.Size, err = r.uint64(); err != nil {
			return n, err
		}
		if n.Size > 1<<63-1 {
			return n, r.errorf("file of %d bytes", n.Size)
		}
		r.size, r.left = n.Size, n.Size
		r.state = inContents
		return n, nil
	}
	return n, r.errorf("unknown node type %q", kind)
}

// endNode reads what follows a node whose own parenthesis has been read: the one of the entry
// around it.
func (r *Reader) endNode() error {
	if len(r.open) == 0 {
		r.state = atEnd
		return nil
	}
	r.state = inDirectory
	return r.expect(")")
}

// Contents implements [Nodes].
func (r *Reader) Contents() (Chunk, error) {
	if r.failed != nil {
		return Chunk{}, r.failed
	}
	if r.state != inContents || r.left == 0 {
		return Chunk{}, io.EOF
	}
	c, err := r.contents()
	if err != nil {
		return Chunk{}, r.fail(err)
	}
	return c, nil
}

func (r *Reader) contents() (Chunk, error) {
	for len(r.rest) == 0 {
		if err := r.refill(); err != nil {
			return Chunk{}, unexpected(err)
		}
	}
	b := r.rest[:min(r.left, uint64(len(r.rest)))]
	r.rest = r.rest[len(b):]
	r.offset += uint64(len(b))
	r.left -= uint64(len(b))
	c := Chunk{b, r.chunk.owner}
	c.Retain()
	return c, nil
}

// skipContents reads the rest of the contents under way, and what ends the file.
func (r *Reader) skipContents() error {
	for r.left > 0 {
		c, err := r.contents()
		if err != nil {
			return err
		}
		c.Release()
	}
	if _, err := r.padded(0, padding(r.size)); err != nil {
		return err
	}
	if err := r.expect(")"); err != nil {
		return err
	}
	return r.endNode()
}

// refill gets the next chunk; its errors are the feeder's.
func (r *Reader) refill() error {
	r.chunk.Release()
	r.chunk, r.rest = Chunk{}, nil
	c, err := r.feeder.Next()
	if err != nil {
		return err
	}
	r.chunk, r.rest = c, c.Bytes
	return nil
}

// take returns the next n bytes, valid until the next call.
func (r *Reader) take(n int) ([]byte, error) {
	if len(r.rest) >= n {
		b := r.rest[:n]
		r.rest = r.rest[n:]
		r.offset += uint64(n)
		return b, nil
	}
	r.scratch = r.scratch[:0]
	for len(r.scratch) < n {
		if len(r.rest) == 0 {
			if err := r.refill(); err != nil {
				return nil, unexpected(err)
			}
			continue
		}
		m := min(n-len(r.scratch), len(r.rest))
		r.scratch = append(r.scratch, r.rest[:m]...)
		r.rest = r.rest[m:]
		r.offset += uint64(m)
	}
	return r.scratch, nil
}

func (r *Reader) uint64() (uint64, error) {
	b, err := r.take(8)
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint64(b), nil
}

// string reads a string of at most limit bytes, valid until the next call.
func (r *Reader) string(limit int) ([]byte, error) {
	size, err := r.uint64()
	if err != nil {
		return nil, err
	}
	if size > uint64(limit) {
		return nil, r.errorf("string of %d bytes where at most %d are expected", size, limit)
	}
	return r.padded(int(size), padding(size))
}

// padded returns the next n bytes, behind which so many zero bytes must be.
func (r *Reader) padded(n, padding int) ([]byte, error) {
	b, err := r.take(n + padding)
	if err != nil {
		return nil, err
	}
	for _, c := range b[n:] {
		if c != 0 {
			return nil, r.errorf("padding is not zero")
		}
	}
	return b[:n], nil
}

// token reads one of the words of the grammar, none of which is longer than the magic string.
func (r *Reader) token() (string, error) {
	b, err := r.string(len(magic))
	if err != nil {
		return "", err
	}
	// Without an allocation for the words that occur once per node.
	switch string(b) {
	case ")":
		return ")", nil
	case "entry":
		return "entry", nil
	case "regular":
		return "regular", nil
	case "contents":
		return "contents", nil
	case "executable":
		return "executable", nil
	case "directory":
		return "directory", nil
	case "symlink":
		return "symlink", nil
	}
	return string(b), nil
}

func (r *Reader) expect(words ...string) error {
	for _, w := range words {
		b, err := r.string(len(magic))
		if err != nil {
			return err
		}
		if string(b) != w {
			return r.errorf("%q where %q is due", b, w)
		}
	}
	return nil
}

// unexpected turns the end of the stream into the error that it is inside an archive.
func unexpected(err error) error {
	if err == io.EOF {
		return fmt.Errorf("truncated nar: %w", io.ErrUnexpectedEOF)
	}
	return err
}
