// SPDX-License-Identifier: GPL-3.0-or-later

// Package nar is the grammar of Nix archives (NARs), the canonical form of a store item that
// NarHash is computed over.
//
// Everything in it speaks one language, nodes in NAR order: a [Node] for each directory, file and
// symbolic link, in the order in which an archive has them, and an [End] after the last entry of
// each directory. [Nodes] is a stream of them. [NewReader] turns the bytes of an archive into
// nodes, checking everything that a hostile archive could get wrong; [Framer] turns nodes back into
// the bytes of an archive; [Tree] reads a file tree as nodes. Start with [Nodes].
//
// The format is the one of Guix, guix/serialization.scm: write-file-tree and fold-archive.
package nar

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

// Kind tells what a [Node] is.
type Kind uint8

// The kinds of nodes. An End closes the directory opened last; it has no other member than its
// kind.
const (
	Directory Kind = iota + 1
	Regular
	Symlink
	End
)

// A Node is one step of a walk through a tree in NAR order.
type Node struct {
	Kind Kind
	// Name is the entry's name in its directory: 1 to [MaxName] bytes of any encoding, without NUL
	// or slash, neither "." nor "..". The root has none.
	Name string
	// Executable reports whether a Regular may be executed by its owner.
	Executable bool
	// Size is the length of the contents of a Regular, in bytes.
	Size uint64
	// Target is what a Symlink points to: 1 to [MaxTarget] bytes without NUL. It is data and is
	// never followed.
	Target string
	// Same is nil, or an open file that should have the contents of a Regular, for a consumer that
	// would rather link to it than write a copy. Such a consumer reads it, by ReadAt and before the
	// next call of Next, in place of Contents.
	Same *os.File
	// Unique tells that no other file is likely to have the contents of a Regular, so that it does
	// not pay to look for one to share them with.
	Unique bool
}

// Limits of what an archive may hold. Linux has about the same ones (NAME_MAX, PATH_MAX), and a
// store item beyond them could not be deleted again by a daemon that works with file names.
const (
	// MaxName is the length of the longest entry name, in bytes.
	MaxName = 255
	// MaxTarget is the length of the longest symbolic link target, in bytes.
	MaxTarget = 4095
	// MaxPath is the length of the longest path of an entry below the root, in bytes, slashes
	// between its names included: what PATH_MAX leaves after the name of an item in the store or in
	// its trash.
	MaxPath = 3800
	// MaxDepth is how many directories an entry may be inside of, which follows from MaxPath.
	MaxDepth = MaxPath / 2
)

// Nodes is a tree as a stream. It is not safe for concurrent use.
//
// The nodes come in NAR order: a directory is followed by its entries, ascending by the bytes of
// their names and without equal names, then by an End. Whoever implements Nodes has checked names,
// targets, order and depth; whoever consumes it may rely on that.
type Nodes interface {
	// Next returns the next node, and io.EOF after the root is complete (after the End of a root
	// that is a directory). What is left of the contents of the Regular returned before is skipped.
	// Any other error is final: the tree is malformed or its source has failed.
	Next() (Node, error)
	// Contents returns the next piece of the contents of the Regular that Next returned last, never
	// an empty one, and io.EOF after Size bytes. The caller owns the piece and must release it.
	Contents() (Chunk, error)
}

// Walk calls f for each node, until there are no more, or an error of either.
func Walk(nodes Nodes, f func(n Node) error) error {
	for {
		n, err := nodes.Next()
		if err == io.EOF {
			return nil
		} else if err == nil {
			err = f(n)
		}
		if err != nil {
			return err
		}
	}
}

// magic is the string that each archive begins with.
const magic = "nix-archive-1"

// CheckName returns an error that says why name cannot be the name of a directory entry, or nil.
func CheckName(name string) error {
	switch {
	case name == "":
		return errors.New("empty entry name")
	case name == "." || name == "..":
		return fmt.Errorf("entry name %q", name)
	case len(name) > MaxName:
		return fmt.Errorf("entry name of %d bytes, longer than %d", len(name), MaxName)
	}
	if i := strings.IndexAny(name, "\x00/"); i >= 0 {
		return fmt.Errorf("entry name %q has the byte %#02x", name, name[i])
	}
	return nil
}

// CheckTarget returns an error that says why target cannot be the target of a symbolic link, or
// nil.
func CheckTarget(target string) error {
	switch {
	case target == "":
		return errors.New("empty symbolic link target")
	case len(target) > MaxTarget:
		return fmt.Errorf("symbolic link target of %d bytes, longer than %d", len(target), MaxTarget)
	case strings.IndexByte(target, 0) >= 0:
		return fmt.Errorf("symbolic link target %.100q has a NUL byte", target)
	}
	return nil
}
