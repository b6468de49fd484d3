// SPDX-License-Identifier: GPL-3.0-or-later

package nar

import (
	"bufio"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// A Tree is a file tree on disk as [Nodes]. It must not change meanwhile: the Next after a file
// that has is an error.
type Tree struct {
	// Rename, if not nil, gives the name of an entry in the archive for the one that it has on
	// disk, both of the same length. It is set before the first call of Next.
	Rename func(name string) string

	root    string
	started bool
	open    []listing

	file *os.File    // the Regular under way, nil when there is none
	info os.FileInfo // of file, as it was
	left uint64
	pool Pool
}

// listing is a directory that is being walked: its path and the entries to come, the next one last.
type listing struct {
	path    string
	entries []entry
	length  int // of the path in the archive, with a slash
}

// entry is a name on disk and in the archive.
type entry struct{ disk, name string }

// NewTree returns a walk through the file tree at path, which may be a directory, a file or a
// symbolic link; a link is not followed. An owner's execute permission makes a file executable, as
// Guix, guix/serialization.scm: write-file-tree has it. Anything that an archive cannot hold is an
// error of Next. The walk is done when Next returns an error, which io.EOF is too; whoever stops
// earlier must call Close.
func NewTree(path string) *Tree { return &Tree{root: path} }

// Close ends the walk early.
func (t *Tree) Close() {
	if t.file != nil {
		t.file.Close()
		t.file = nil
	}
}

// Next implements [Nodes].
func (t *Tree) Next() (Node, error) {
	if err := t.checkFile(); err != nil {
		return Node{}, err
	}
	t.Close()
	if !t.started {
		t.started = true
		return t.visit(t.root, "")
	}
	if len(t.open) == 0 {
		return Node{}, io.EOF
	}
	dir := &t.open[len(t.open)-1]
	if len(dir.entries) == 0 {
		t.open = t.open[:len(t.open)-1]
		return Node{Kind: End}, nil
	}
	e := dir.entries[len(dir.entries)-1]
	dir.entries = dir.entries[:len(dir.entries)-1]
	if dir.length+len(e.name) > MaxPath {
		return Node{}, fmt.Errorf("%s: path of entry %q is longer than %d bytes", t.root, e.name, MaxPath)
	}
	return t.visit(dir.path+"/"+e.disk, e.name)
}

// checkFile returns an error if the Regular under way has changed.
func (t *Tree) checkFile() error {
	if t.file == nil {
		return nil
	}
	info, err := t.file.Stat()
	if err == nil && (info.Size() != t.info.Size() || !info.ModTime().Equal(t.info.ModTime())) {
		err = fmt.Errorf("%s has changed while it was read", filepath.Clean(t.file.Name()))
	}
	return err
}

// File returns the open file of the Regular that Next returned last, nil if it is empty. It is
// valid until the next call of Next. A caller that reads it otherwise than by ReadAt must not call
// Contents.
func (t *Tree) File() *os.File { return t.file }

func (t *Tree) visit(path, name string) (Node, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return Node{}, err
	}
	n := Node{Name: name}
	switch info.Mode().Type() {
	case os.ModeDir:
		n.Kind = Directory
		d := listing{path: path}
		if len(t.open) > 0 {
			d.length = t.open[len(t.open)-1].length + len(name) + 1
		}
		if d.entries, err = t.readNames(path); err != nil {
			return n, err
		}
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
		t.left, t.info = n.Size, info
		return n, nil
	}
	return n, fmt.Errorf("%s is neither a regular file, a directory nor a symbolic link", path)
}

// readNames returns the entries of a directory in descending order of their names in the archive.
func (t *Tree) readNames(path string) ([]entry, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	entries := make([]entry, len(names))
	for i, name := range names {
		entries[i] = entry{name, name}
		if t.Rename != nil {
			entries[i].name = t.Rename(name)
		}
	}
	slices.SortFunc(entries, func(a, b entry) int { return strings.Compare(b.name, a.name) })
	for i := 1; i < len(entries); i++ {
		if entries[i].name == entries[i-1].name {
			return nil, fmt.Errorf("%s would have the entry %q twice", path, entries[i].name)
		}
	}
	return entries, nil
}

// Contents implements [Nodes].
func (t *Tree) Contents() (Chunk, error) {
	if t.file == nil || t.left == 0 {
		return Chunk{}, io.EOF
	}
	c := t.pool.Get()
	c.Bytes = c.Bytes[:min(t.left, PieceSize)]
	if _, err := io.ReadFull(t.file, c.Bytes); err != nil {
		c.Release()
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			err = fmt.Errorf("%s became shorter while it was read", filepath.Clean(t.file.Name()))
		}
		return Chunk{}, err
	}
	t.left -= uint64(len(c.Bytes))
	return c, nil
}

// Write writes the archive of the whole tree that nodes holds to w. It returns the number of bytes
// written, and the first error of either side.
func Write(w io.Writer, nodes Nodes) (written int64, err error) {
	out := bufio.NewWriterSize(w, 32<<10)
	put := func(b []byte) error {
		n, err := out.Write(b)
		written += int64(n)
		return err
	}
	var framer Framer
	var frame []byte
	err = Walk(nodes, func(n Node) error {
		frame = framer.AppendNode(frame[:0], n)
		err := put(frame)
		for n.Kind == Regular && err == nil {
			var c Chunk
			if c, err = nodes.Contents(); err == nil {
				err = put(c.Bytes)
				c.Release()
			} else if err == io.EOF {
				err = put(framer.AppendContentsEnd(frame[:0]))
				break
			}
		}
		return err
	})
	if err == nil {
		err = out.Flush()
	}
	return written, err
}

// Hash returns the SHA-256 of the archive of the whole tree that nodes holds, and its length in
// bytes. It fails as [Write] does, and when ctx ends.
func Hash(ctx context.Context, nodes Nodes) (sum [sha256.Size]byte, size uint64, err error) {
	h := sha256.New()
	n, err := Write(Until(ctx, h), nodes)
	return [sha256.Size]byte(h.Sum(nil)), uint64(n), err
}

// HashTree is Hash of the file tree at path.
func HashTree(ctx context.Context, path string) (sum [sha256.Size]byte, size uint64, err error) {
	tree := NewTree(path)
	defer tree.Close()
	return Hash(ctx, tree)
}

// Until returns a writer that writes to w until ctx ends, and fails then with the error of ctx.
func Until(ctx context.Context, w io.Writer) io.Writer { return until{ctx, w} }

type until struct {
	ctx context.Context
	w   io.Writer
}

// Write implements [io.Writer].
func (u until) Write(p []byte) (int, error) {
	if err := u.ctx.Err(); err != nil {
		return 0, err
	}
	return u.w.Write(p)
}
