// SPDX-License-Identifier: GPL-3.0-or-later

// Package erisfs reads and writes ERIS-FS images: file trees as a small index
// that names a read capability for each file (https://eris.codeberg.page/eer/eris-fs.xml,
// version 1).
//
// [Encode] turns a tree into blocks and the read capability of its index; [Open]
// turns an index and a source of blocks into nodes in NAR order, which is what a
// store item is restored from. [Decode] and [Index.Encode] are the format alone.
//
// An index may come from anybody: it is checked in full, and against bounds that
// are known beforehand, before a block of any file is fetched.
//
// Some points of the format could not be confirmed by its specification, which is
// a draft: that the target of a symbolic link is a text string; that read
// capabilities carry CBOR tag 276; that an item that is no directory is an entry
// with an empty path. Each of these is in one place, named so in a comment
// beginning with "Unconfirmed:".
package erisfs

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// An Entry is a file or a symbolic link of a tree. Directories are implied by the
// paths of what is in them.
type Entry struct {
	// Path has the names from the root downwards, separated by slashes. It is
	// empty for an item that is itself a file or a link.
	Path string
	// Kind is nar.Regular or nar.Symlink.
	Kind nar.Kind
	// Executable tells whether a Regular may be executed.
	Executable bool
	// Capability denotes the contents of a Regular.
	Capability eris.ReadCapability
	// Target is what a Symlink points to.
	Target string
}

// An Index is the entries of a tree, in NAR order: ascending, directory by
// directory, by the bytes of the names.
type Index struct {
	entries []Entry
}

// Entries returns the entries. The caller must not change them.
func (x *Index) Entries() []Entry { return x.entries }

// ErrNotRepresentable is wrapped by the errors for trees that have no ERIS-FS
// form: those with empty directories and with names or link targets that are not
// UTF-8.
var ErrNotRepresentable = errors.New("not representable in ERIS-FS")

// NewIndex returns the index with the given entries, in any order. It fails, and
// says why, when an entry cannot be in an index: names and targets are those of
// package nar and must be UTF-8 (else the error wraps [ErrNotRepresentable]),
// paths must be different, and none may be in another one that is a file or a
// link. At least one entry is needed.
func NewIndex(entries []Entry) (*Index, error) {
	if len(entries) == 0 {
		return nil, fmt.Errorf("%w: empty directory", ErrNotRepresentable)
	}
	for i := range entries {
		if err := entries[i].check(); err != nil {
			return nil, err
		}
	}
	x := &Index{slices.Clone(entries)}
	if err := x.sort(); err != nil {
		return nil, err
	}
	return x, nil
}

func (e *Entry) check() error {
	if !utf8.ValidString(e.Path) || !utf8.ValidString(e.Target) {
		return fmt.Errorf("%w: %q is not UTF-8", ErrNotRepresentable, e.Path+e.Target)
	}
	if err := checkPath(e.Path); err != nil {
		return err
	}
	switch e.Kind {
	case nar.Regular:
		if err := e.Capability.Validate(); err != nil {
			return fmt.Errorf("file %.300q: %w", e.Path, err)
		}
	case nar.Symlink:
		if err := nar.CheckTarget(e.Target); err != nil {
			return fmt.Errorf("link %.300q: %w", e.Path, err)
		}
	default:
		return fmt.Errorf("%.300q is neither a file nor a link", e.Path)
	}
	return nil
}

// checkPath checks the names of a path.
func checkPath(path string) error {
	if path == "" {
		return nil
	}
	if len(path) > nar.MaxPath {
		return fmt.Errorf("path of %d bytes is longer than %d", len(path), nar.MaxPath)
	}
	for name := range strings.SplitSeq(path, "/") {
		if err := nar.CheckName(name); err != nil {
			return fmt.Errorf("path %.300q: %w", path, err)
		}
	}
	return nil
}

// sort puts the entries in NAR order, in which a path that is a prefix of others
// stands directly before them, so that conflicts are between neighbours.
func (x *Index) sort() error {
	slices.SortFunc(x.entries, func(a, b Entry) int { return comparePaths(a.Path, b.Path) })
	for i := 1; i < len(x.entries); i++ {
		a, b := x.entries[i-1].Path, x.entries[i].Path
		switch {
		case a == b:
			return fmt.Errorf("path %.300q twice", a)
		case a == "" || strings.HasPrefix(b, a) && b[len(a)] == '/':
			return fmt.Errorf("path %.300q is in %.300q, which is no directory", b, a)
		}
	}
	return nil
}

// comparePaths compares paths name by name. A slash ends a name, and so counts
// less than any byte of one.
func comparePaths(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		x, y := a[i], b[i]
		if x == y {
			continue
		}
		switch {
		case x == '/':
			return -1
		case y == '/':
			return 1
		case x < y:
			return -1
		}
		return 1
	}
	return len(a) - len(b)
}
