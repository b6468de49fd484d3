// SPDX-License-Identifier: GPL-3.0-or-later

package delta

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/reuse"
)

// ErrTooLarge is the error of [Write] for a delta that is longer than it may be.
var ErrTooLarge = errors.New("the delta is too large")

// WriteOptions say how [Write] works.
type WriteOptions struct {
	// Replacements are the hashes that are replaced in the base first.
	Replacements []reuse.Replacement
	// MaxSize is the length in bytes of the longest delta that is of use; 0 is any.
	MaxSize int64
	// Scratch is the directory for a file in which the delta is kept until it is complete; empty is
	// that of the system for temporary files.
	Scratch string
}

// Write writes a delta that makes the file tree at tree of the one at base, and returns its length
// in bytes. The same trees make the same delta. It needs about 150 MiB of memory, and for each GB
// of changed files some minutes of a processor. It fails with [ErrTooLarge] as soon as that is
// clear, and before anything is written.
func Write(ctx context.Context, w io.Writer, tree, base string, o WriteOptions) (int64, error) {
	size, err := write(ctx, w, tree, base, o)
	if err != nil {
		return 0, fmt.Errorf("delta from %s to %s: %w", base, tree, err)
	}
	return size, nil
}

func write(ctx context.Context, w io.Writer, tree, base string, o WriteOptions) (int64, error) {
	b, err := openBase(base)
	if err != nil {
		return 0, err
	}
	frames, err := os.CreateTemp(o.Scratch, ".delta-")
	if err != nil {
		return 0, err
	}
	defer frames.Close()
	if err := os.Remove(frames.Name()); err != nil {
		return 0, err
	}
	x := &writer{ctx: ctx, o: o, base: b, frames: frames, replacer: reuse.NewReplacer(o.Replacements), copier: reuse.NewReplacer(nil)}
	if err := x.findBases(base); err != nil {
		return 0, err
	}
	x.replacements()
	if err := x.walk(tree); err != nil {
		return 0, err
	}
	index := compressIndex(x.index)
	if len(index) > maxIndex {
		return 0, fmt.Errorf("%w: index of %d bytes", ErrTooLarge, len(index))
	}
	head := append([]byte(magic), version, encoder)
	head = binary.LittleEndian.AppendUint32(head, uint32(len(index)))
	size := int64(len(head)+len(index)) + x.written
	if o.MaxSize > 0 && size > o.MaxSize {
		return 0, ErrTooLarge
	}
	if _, err := w.Write(append(head, index...)); err != nil {
		return 0, err
	}
	_, err = io.Copy(w, io.NewSectionReader(frames, 0, x.written))
	return size, err
}

// A writer makes a delta.
type writer struct {
	ctx      context.Context
	o        WriteOptions
	base     string
	replacer *reuse.Replacer
	copier   *reuse.Replacer // of nothing, whose memory all files share
	compared [nar.PieceSize]byte
	codec    codec

	paths map[string]bool   // of the regular files of the base
	alike map[string]string // the first of those paths that are alike
	index []byte

	frames  *os.File
	written int64 // to it

	piece, dictionary []byte
}

// findBases lists the files of the base.
func (w *writer) findBases(name string) error {
	w.paths, w.alike = map[string]bool{}, map[string]string{}
	return walk(name, func(_ nar.Node, path string, file *os.File) error {
		if file != nil {
			w.paths[path] = true
			if alike := unversioned(path); path != "" && w.alike[alike] == "" {
				w.alike[alike] = path
			}
		}
		return w.ctx.Err()
	})
}

// walk calls f for each node of a tree. Of a file that is not empty it gives the path below the
// root, and the open file.
func walk(root string, f func(n nar.Node, path string, file *os.File) error) error {
	tree := nar.NewTree(root)
	defer tree.Close()
	return nar.Walk(tree, func(n nar.Node) error {
		path, file := "", tree.File()
		if file != nil {
			path = strings.TrimPrefix(strings.TrimPrefix(file.Name(), root), "/")
		}
		return f(n, path, file)
	})
}

// unversioned is a path without digits and hashes of store items, which is often the same in the
// next version.
func unversioned(path string) string {
	b := make([]byte, 0, len(path))
	for i := 0; i < len(path); i++ {
		if i+reuse.HashLength < len(path) && path[i+reuse.HashLength] == '-' && isHash(path[i:i+reuse.HashLength]) {
			i += reuse.HashLength - 1
		} else if path[i] < '0' || path[i] > '9' {
			b = append(b, path[i])
		}
	}
	return string(b)
}

// isHash reports whether s has the digits of nix-base32 only.
func isHash(s string) bool {
	return strings.Trim(s, "0123456789abcdfghijklmnpqrsvwxyz") == ""
}

// replacements begins the index.
func (w *writer) replacements() {
	list := slices.Clone(w.o.Replacements)
	slices.SortFunc(list, func(a, b reuse.Replacement) int { return cmp.Compare(a.Old, b.Old) })
	w.index = binary.AppendUvarint(w.index, uint64(len(list)))
	for _, r := range list {
		w.index = append(append(w.index, r.Old...), r.New...)
	}
}

// walk adds all nodes of the new tree.
func (w *writer) walk(tree string) error {
	if len(w.o.Replacements) > maxReplacements {
		return fmt.Errorf("%d hashes to replace", len(w.o.Replacements))
	}
	root := true
	return walk(tree, func(n nar.Node, path string, file *os.File) error {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		kind := slices.Index(kinds[:], n.Kind)
		if n.Executable {
			kind = kindExecutable
		}
		w.index = append(w.index, byte(kind))
		if !root && kind != kindEnd {
			w.index = appendString(w.index, n.Name)
		}
		root = false
		switch n.Kind {
		case nar.Symlink:
			w.index = appendString(w.index, n.Target)
		case nar.Regular:
			w.index = binary.AppendUvarint(w.index, n.Size)
			if file != nil {
				return w.file(path, file, n.Size)
			}
		}
		return nil
	})
}

// file adds the contents of a file.
func (w *writer) file(path string, f *os.File, size uint64) error {
	from := path
	if !w.paths[from] {
		from = w.alike[unversioned(path)]
		if from == "" {
			w.index = binary.AppendUvarint(w.index, uint64(methodNew))
			return w.pieces(f, size, nil, 0)
		}
	}
	old, oldSize, err := openFile(w.base, from)
	if err != nil {
		return err
	}
	defer old.Close()
	m := methodPatch
	if size == oldSize {
		if m, err = w.compare(f, old, int64(size)); err != nil {
			return err
		}
	}
	w.index = binary.AppendUvarint(w.index, uint64(m))
	if from == path {
		from = ""
	}
	w.index = appendString(w.index, from)
	if m != methodPatch {
		return nil
	}
	return w.pieces(f, size, old, oldSize)
}

// compare returns the method for a file of the same size as its base.
func (w *writer) compare(f, old *os.File, size int64) (method, error) {
	for m, r := range []*reuse.Replacer{methodCopy: w.copier, methodReplaced: w.replacer} {
		if method(m) == methodReplaced && r.None() {
			break
		}
		if same, err := w.same(f, size, r.Contents(old, size)); same || err != nil {
			return method(m), err
		}
	}
	return methodPatch, nil
}

// same reports whether a file has the contents that feeder brings.
func (w *writer) same(f *os.File, size int64, feeder nar.Feeder) (bool, error) {
	for offset := int64(0); offset < size; {
		c, err := feeder.Next()
		if err != nil {
			return false, reuse.Unexpected(err)
		}
		n := len(c.Bytes)
		b := w.compared[:n]
		_, err = f.ReadAt(b, offset)
		equal := err == nil && bytes.Equal(b, c.Bytes)
		c.Release()
		if !equal {
			return false, err
		}
		offset += int64(n)
		if err := w.ctx.Err(); err != nil {
			return false, err
		}
	}
	return true, nil
}

// pieces adds the frames of a file; old is nil if there is no base.
func (w *writer) pieces(f io.ReaderAt, size uint64, old io.ReaderAt, oldSize uint64) error {
	var before piece
	for offset := uint64(0); offset < size; offset += pieceSize {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		n := int(min(pieceSize, size-offset))
		var err error
		if w.piece, err = readFull(io.NewSectionReader(f, int64(offset), int64(n)), n, w.piece); err != nil {
			return err
		}
		p, same := piece{}, false
		if old != nil {
			p = choose(offset, size, n, oldSize)
			if same = p == before; !same {
				if w.dictionary, err = readFull(io.NewSectionReader(old, int64(p.offset), int64(p.length)), int(p.length), w.dictionary); err != nil {
					return err
				}
				w.replacer.Replace(w.dictionary)
			}
			before = p
		}
		frame := w.codec.encode(w.piece, w.dictionary[:p.length], same)
		w.written += int64(len(frame))
		if w.o.MaxSize > 0 && w.written > w.o.MaxSize {
			return ErrTooLarge
		}
		if _, err := w.frames.Write(frame); err != nil {
			return err
		}
		if old != nil {
			w.index = binary.AppendUvarint(w.index, p.offset)
			w.index = binary.AppendUvarint(w.index, p.length)
		}
		w.index = binary.AppendUvarint(w.index, uint64(len(frame)))
	}
	return nil
}

// choose returns the part of the base that is the dictionary of a piece of n bytes: what is around
// the same place, if all has grown or shrunk alike.
func choose(offset, size uint64, n int, oldSize uint64) piece {
	length := min(uint64(dictionaryFor(n)), oldSize)
	middle := uint64(float64(offset+uint64(n)/2) / float64(size) * float64(oldSize))
	start := middle - min(middle, length/2)
	return piece{offset: min(start, oldSize-length), length: length}
}
