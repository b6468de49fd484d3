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
	// Ended, if it is not nil, is called when the archive is whole, before what follows is read.
	// Then errors of the feeder are the end: its owner knows by a hash whether the archive is right.
	Ended func()

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
}

type openDirectory struct {
	last string // name of the entry read last, "" before the first
	path int    // length of the path of this directory below the root, with a slash
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
	var n Node
	if r.failed == nil {
		n = r.next()
	}
	if r.failed != nil {
		r.release()
		return Node{}, r.failed
	}
	return n, nil
}

// release lets go of the memory.
func (r *Reader) release() {
	r.chunk.Release()
	r.chunk, r.rest = Chunk{}, nil
}

// fail notes the first error. All that is read after it is empty.
func (r *Reader) fail(format string, a ...any) {
	if r.failed == nil {
		r.failed = fmt.Errorf("malformed nar at byte %d: %w", r.offset, fmt.Errorf(format, a...))
	}
}

func (r *Reader) next() Node {
	if r.state == inContents {
		r.skipContents()
	}
	switch r.state {
	case atRoot:
		// Often it is a page that says why there is none.
		if b := r.take(len(tokensMagic)); r.failed == nil && string(b) != tokensMagic {
			r.fail("it begins with %q", b)
		}
		return r.node("")
	case inDirectory:
		switch token := r.token(); string(token) {
		case ")":
			r.open = r.open[:len(r.open)-1]
			r.endNode()
			return Node{Kind: End}
		case "entry":
			return r.entry()
		default:
			r.fail("%q where an entry or the end of a directory is due", token)
		}
	case atEnd:
		if r.Ended != nil {
			r.Ended()
		}
		for len(r.rest) == 0 && r.failed == nil {
			r.refill()
		}
		if r.failed != nil && r.Ended != nil {
			r.failed = io.EOF
		}
		r.fail("bytes after the end of the archive")
	}
	return Node{}
}

// entry reads an entry from behind the word "entry".
func (r *Reader) entry() Node {
	r.expect("(", "name")
	name := string(r.string(MaxName))
	dir := &r.open[len(r.open)-1]
	switch err := CheckName(name); {
	case err != nil:
		r.fail("%w", err)
	case name == dir.last:
		r.fail("entry %q twice", name)
	case name < dir.last:
		r.fail("entry %q after %q", name, dir.last)
	case dir.path+len(name) > MaxPath:
		r.fail("path of entry %q is longer than %d bytes", name, MaxPath)
	}
	dir.last = name
	r.expect("node")
	return r.node(name)
}

// node reads a node up to its contents or entries.
func (r *Reader) node(name string) Node {
	r.expect("(", "type")
	n := Node{Name: name}
	switch kind := r.token(); string(kind) {
	case "directory":
		n.Kind = Directory
		d := openDirectory{}
		if len(r.open) > 0 {
			d.path = r.open[len(r.open)-1].path + len(name) + 1
		}
		r.open = append(r.open, d)
		r.state = inDirectory
	case "symlink":
		n.Kind = Symlink
		r.expect("target")
		n.Target = string(r.string(MaxTarget))
		if err := CheckTarget(n.Target); err != nil {
			r.fail("%w", err)
		}
		r.expect(")")
		r.endNode()
	case "regular":
		n.Kind = Regular
		token := r.token()
		if string(token) == "executable" {
			n.Executable = true
			r.expect("")
			token = r.token()
		}
		if string(token) != "contents" {
			r.fail("%q where contents are due", token)
		}
		if n.Size = r.uint64(); n.Size > 1<<63-1 {
			r.fail("file of %d bytes", n.Size)
		}
		r.size, r.left = n.Size, n.Size
		r.state = inContents
	default:
		r.fail("unknown node type %q", kind)
	}
	return n
}

// endNode reads what follows a node whose own parenthesis has been read: the one of the entry
// around it.
func (r *Reader) endNode() {
	if len(r.open) == 0 {
		r.state = atEnd
		return
	}
	r.state = inDirectory
	r.expect(")")
}

// Contents implements [Nodes].
func (r *Reader) Contents() (Chunk, error) {
	if r.failed == nil && (r.state != inContents || r.left == 0) {
		return Chunk{}, io.EOF
	}
	c := r.contents()
	if r.failed != nil {
		r.release()
	}
	return c, r.failed
}

// contents returns the next piece of the contents under way, of which there must be some left.
func (r *Reader) contents() Chunk {
	if !r.more() {
		return Chunk{}
	}
	b := r.rest[:min(r.left, uint64(len(r.rest)))]
	r.rest = r.rest[len(b):]
	r.offset += uint64(len(b))
	r.left -= uint64(len(b))
	c := Chunk{b, r.chunk.owner}
	c.Retain()
	return c
}

// skipContents reads the rest of the contents under way, and what ends the file.
func (r *Reader) skipContents() {
	for r.left > 0 && r.failed == nil {
		r.contents().Release()
	}
	r.padded(0, padding(r.size))
	r.expect(")")
	r.endNode()
}

// refill gets the next chunk; its errors are the feeder's.
func (r *Reader) refill() {
	r.release()
	if r.chunk, r.failed = r.feeder.Next(); r.failed == nil {
		r.rest = r.chunk.Bytes
	}
}

// more waits for bytes inside the archive, and reports whether there are some.
func (r *Reader) more() bool {
	for len(r.rest) == 0 && r.failed == nil {
		if r.refill(); r.failed == io.EOF {
			r.failed = fmt.Errorf("truncated nar: %w", io.ErrUnexpectedEOF)
		}
	}
	return r.failed == nil
}

// take returns the next n bytes, valid until the next call; none after an error.
func (r *Reader) take(n int) []byte {
	if len(r.rest) >= n && r.failed == nil {
		b := r.rest[:n]
		r.rest = r.rest[n:]
		r.offset += uint64(n)
		return b
	}
	r.scratch = r.scratch[:0]
	for len(r.scratch) < n {
		if !r.more() {
			return nil
		}
		m := min(n-len(r.scratch), len(r.rest))
		r.scratch = append(r.scratch, r.rest[:m]...)
		r.rest = r.rest[m:]
		r.offset += uint64(m)
	}
	return r.scratch
}

func (r *Reader) uint64() uint64 {
	b := r.take(8)
	if r.failed != nil {
		return 0
	}
	return binary.LittleEndian.Uint64(b)
}

// string reads a string of at most limit bytes, valid until the next call.
func (r *Reader) string(limit int) []byte {
	size := r.uint64()
	if size > uint64(limit) {
		r.fail("string of %d bytes where at most %d are expected", size, limit)
		return nil
	}
	return r.padded(int(size), padding(size))
}

// padded returns the next n bytes, behind which so many zero bytes must be.
func (r *Reader) padded(n, padding int) []byte {
	b := r.take(n + padding)
	if r.failed != nil {
		return nil
	}
	for _, c := range b[n:] {
		if c != 0 {
			r.fail("padding is not zero")
		}
	}
	return b[:n]
}

// token reads one of the words of the grammar, none of which is longer than the magic string. It is
// valid until the next call.
func (r *Reader) token() []byte { return r.string(len(magic)) }

func (r *Reader) expect(words ...string) {
	for _, w := range words {
		if b := r.token(); string(b) != w {
			r.fail("%q where %q is due", b, w)
		}
	}
}
