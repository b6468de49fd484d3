// SPDX-License-Identifier: GPL-3.0-or-later

package nar

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// A Tree is a file tree on disk as [Nodes]. It must not change meanwhile.
type Tree struct {
	root    string
	started bool
	open    []listing
	path    int // length of the path of the directory under way

	file *os.File // the Regular under way, nil when there is none
	left uint64
	free sync.Pool // of *buffer
}

// listing is a directory that is being walked: its path and the entries to come, the next one last.
type listing struct {
	path    string
	entries []string
	length  int // of its own name and slash in the path below the root
}

// contentsPiece is how much of a file is read at once, in bytes.
const contentsPiece = 128 << 10

// NewTree returns a walk through the file tree at path, which may be a directory, a file or a
// symbolic link; a link is not followed. An owner's execute permission makes a file executable, as
// Guix, guix/serialization.scm: write-file-tree has it. Anything that an archive cannot hold is an
// error of Next. The walk is done when Next returns an error, which io.EOF is too; whoever stops
// earlier must call Close.
func NewTree(path string) *Tree { return &Tree{root: path} }

// Close ends the walk early.
func (t *Tree) Close() { t.closeFile() }

func (t *Tree) closeFile() {
	if t.file != nil {
		t.file.Close()
		t.file = nil
	}
}

// Next implements [Nodes].
func (t *Tree) Next() (Node, error) {
	t.closeFile()
	if !t.started {
		t.started = true
		return t.visit(t.root, "")
	}
	if len(t.open) == 0 {
		return Node{}, io.EOF
	}
	dir := &t.open[len(t.open)-1]
	if len(dir.entries) == 0 {
		t.path -= dir.length
		t.open = t.open[:len(t.open)-1]
		return Node{Kind: End}, nil
	}
	name := dir.entries[len(dir.entries)-1]
	dir.entries = dir.entries[:len(dir.entries)-1]
	if t.path+len(name) > MaxPath {
		return Node{}, fmt.Errorf("%s: path of entry %q is longer than %d bytes", t.root, name, MaxPath)
	}
	return t.visit(dir.path+"/"+name, name)
}

func (t *Tree) visit(path, name string) (Node, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return Node{}, err
	}
	n := Node{Name: name}
	switch info.Mode().Type() {
	case os.ModeDir:
		if len(t.open) == MaxDepth {
			return n, fmt.Errorf("%s: more than %d directories deep", t.root, MaxDepth)
		}
		n.Kind = Directory
		d := listing{path: path}
		if len(t.open) > 0 {
			d.length = len(name) + 1
		}
		if d.entries, err = readNames(path); err != nil {
			return n, err
		}
		t.path += d.length
		t.open = append(t.open, d)
		return n, nil
	case os.ModeSymlink:
		n.Kind = Symlink
		if n.Target, err = os.Readlink(path); err != nil {
			return n, err
		}
		if err := CheckTarget(n.Target); err != nil {
			return n, fmt.Errorf("%s: %w", path, err)
		}
		return n, nil
	case 0:
		n.Kind = Regular
		n.Executable = info.Mode()&0o100 != 0
		n.Size = uint64(info.Size())
		if n.Size == 0 {
			return n, nil
		}
		// Not through a link that has taken the file's place, and without waiting for the writer of
		// a pipe that has.
		t.file, err = os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			return n, err
		}
		t.left = n.Size
		return n, nil
	}
	return n, fmt.Errorf("%s is neither a regular file, a directory nor a symbolic link", path)
}

// readNames returns the names of a directory in descending order of their bytes.
func readNames(path string) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	slices.SortFunc(names, func(a, b string) int { return strings.Compare(b, a) })
	return names, nil
}

// Contents implements [Nodes].
func (t *Tree) Contents() (Chunk, error) {
	if t.file == nil || t.left == 0 {
		return Chunk{}, io.EOF
	}
	c := t.memory()
	n, err := io.ReadFull(t.file, c.Bytes)
	if err != nil {
		c.Release()
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return Chunk{}, fmt.Errorf("%s became shorter while it was read", filepath.Clean(t.file.Name()))
	} else if err != nil {
		return Chunk{}, err
	}
	t.left -= uint64(n)
	return c, nil
}

// memory returns memory for the next piece of contents. That of whole pieces is used again, because
// to clear it and to return it to the system costs as much as to hash it.
func (t *Tree) memory() Chunk {
	if t.left < contentsPiece {
		return Chunk{Bytes: make([]byte, t.left)}
	}
	b, _ := t.free.Get().(*buffer)
	if b == nil {
		b = &buffer{bytes: make([]byte, contentsPiece), home: func(b *buffer) { t.free.Put(b) }}
	}
	return b.lend(contentsPiece)
}

// Write writes the archive of the whole tree that nodes holds to w. It returns the number of bytes
// written, and the first error of either side.
func Write(w io.Writer, nodes Nodes) (written int64, err error) {
	var framer Framer
	var frame []byte
	put := func(b []byte) error {
		n, err := w.Write(b)
		written += int64(n)
		return err
	}
	for {
		n, err := nodes.Next()
		if err == io.EOF {
			return written, put(frame)
		} else if err != nil {
			return written, err
		}
		frame = framer.AppendNode(frame, n)
		if n.Kind == Regular {
			for {
				c, err := nodes.Contents()
				if err == io.EOF {
					break
				} else if err != nil {
					return written, err
				}
				if len(frame) > 0 {
					err = put(frame)
					frame = frame[:0]
				}
				if err == nil {
					err = put(c.Bytes)
				}
				c.Release()
				if err != nil {
					return written, err
				}
			}
			frame = framer.AppendContentsEnd(frame)
		}
		if len(frame) >= 32<<10 {
			if err := put(frame); err != nil {
				return written, err
			}
			frame = frame[:0]
		}
	}
}
