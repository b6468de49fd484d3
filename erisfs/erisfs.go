// SPDX-License-Identifier: GPL-3.0-or-later

// Package erisfs reads and writes ERIS-FS images: file trees as a small index that names a read
// capability for each file (https://eris.codeberg.page/eer/eris-fs.xml, version 1).
//
// [Encode] turns a tree into blocks and the read capability of its index; [ReadIndex] and
// [Index.Nodes] turn that and a source of blocks into nodes in NAR order, which is what a store
// item is restored from. [Decode] and [EncodeIndex] are the format alone.
//
// An index may come from anybody: it is checked in full, and against bounds that are known
// beforehand, before a block of any file is fetched.
//
// Some points of the format could not be confirmed by its specification, which is a draft: that the
// target of a symbolic link is a text string; that read capabilities carry CBOR tag 276; that an
// item that is no directory is an entry with an empty path. Each of these is in one place, named so
// in a comment beginning with "Unconfirmed:".
package erisfs

import (
	"bytes"
	"errors"
	"fmt"
	"iter"
	"slices"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// An Entry is a file or a symbolic link of a tree. Directories are implied by the paths of what is
// in them.
type Entry struct {
	// Path has the names from the root downwards, separated by slashes. It is empty for an item
	// that is itself a file or a link.
	Path string
	// Kind is nar.Regular or nar.Symlink.
	Kind nar.Kind
	// Executable reports whether a Regular may be executed.
	Executable bool
	// Capability denotes the contents of a Regular.
	Capability eris.ReadCapability
	// Target is what a Symlink points to.
	Target string
}

// An Index is the entries of a tree, in NAR order: ascending, directory by directory, by the bytes
// of the names. It keeps them in the encoded form, and so takes little more memory than that. It is
// never changed.
type Index struct {
	text  []byte
	begin []uint32 // where in text each entry begins, in NAR order

	origin any // where it has come from, as in [content.Want]
}

// Len returns the number of entries.
func (x *Index) Len() int { return len(x.begin) }

// Entry returns the i-th entry, from 0 on.
func (x *Index) Entry(i int) (e Entry) {
	d := decoder{b: x.text, pos: int(x.begin[i])}
	d.key(&e)
	d.value(&e)
	if d.err != nil {
		panic("erisfs: " + d.err.Error()) // Decode has read it before
	}
	return e
}

// Contents returns the capabilities of all files, in NAR order.
func (x *Index) Contents() iter.Seq[eris.ReadCapability] {
	return func(yield func(eris.ReadCapability) bool) {
		for i := range x.begin {
			if e := x.Entry(i); e.Kind == nar.Regular && !yield(e.Capability) {
				return
			}
		}
	}
}

// ErrNotRepresentable is wrapped by the errors for trees that have no ERIS-FS form: those with
// empty directories and with names or link targets that are not UTF-8; and for those with an index
// that readers would refuse, see [Limits].
var ErrNotRepresentable = errors.New("not representable in ERIS-FS")

// order puts the entries, which begin at the given places of text, in NAR order, in which a path
// that is a prefix of others stands directly before them, so that conflicts are between neighbours.
// No path is there twice. It returns the number of directories below the root that the paths imply.
func order(text []byte, begin []uint32) (directories uint64, err error) {
	slices.SortFunc(begin, func(a, b uint32) int {
		c, _, _ := compareKeys(text, int(a), int(b))
		return c
	})
	for i, b := range begin {
		names, _ := knownHead(text, int(b))
		shared := 0
		if i > 0 {
			_, common, within := compareKeys(text, int(begin[i-1]), int(b))
			if within {
				x := Index{text: text, begin: begin}
				return 0, fmt.Errorf("path %.300q is in %.300q, which is no directory", x.Entry(i).Path, x.Entry(i-1).Path)
			}
			shared = common
		}
		directories += uint64(max(names-1-shared, 0))
	}
	return directories, nil
}

// compareKeys compares the paths at two places of an index name by name. Common is how many names
// they begin with alike, and within reports whether the first is a directory that the second would
// be in.
func compareKeys(text []byte, a, b int) (c, common int, within bool) {
	n, a := knownHead(text, a)
	m, b := knownHead(text, b)
	for i := range min(n, m) {
		k, x := knownHead(text, a)
		l, y := knownHead(text, b)
		a, b = x+k, y+l
		if c := bytes.Compare(text[x:a], text[y:b]); c != 0 {
			return c, i, false
		}
	}
	return n - m, min(n, m), n < m
}
