// SPDX-License-Identifier: GPL-3.0-or-later

// Package delta makes a store item from another one that is there already and from what differs. A
// delta is a list of the files of the new item: each is the same as one of the old item, called the
// base, or compressed with a part of one as the dictionary. [Write] makes a delta, and [NewReader]
// the nodes of the new item of it and of the base. The format is in docs/formats.md, "Deltas".
//
// A delta may come from anybody, and the base may be anything: whoever restores the nodes compares
// the hash with the NarHash of an authorised narinfo.
package delta

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/reuse"
)

// The header: magic, version, encoder, and the length of the compressed index in four bytes.
const (
	magic      = "\xd5sdelta\n"
	version    = 1
	encoder    = 1 // zstd with the dictionary as content before the frame
	headerSize = len(magic) + 2 + 4
)

// Bounds, which readers check and writers keep.
const (
	// maxIndex is the length of the longest compressed index, in bytes.
	maxIndex = 4 << 20
	// indexWindow is the greatest window of its compression.
	indexWindow = 8 << 20
	// maxReplacements is how many hashes are replaced at most: as many as a narinfo may have
	// references, and the item's own.
	maxReplacements = 16384 + 1
	// pieceSize is the length in bytes of the contents in a frame, if they are not the last ones of
	// a file. It bounds the memory of readers, together with maxDictionary.
	pieceSize     = 4 << 20
	maxDictionary = 16 << 20
)

// dictionaryFor is how long the dictionary of a piece of n bytes may be, so that many small pieces
// cannot make a reader read the base over and over.
func dictionaryFor(n int) int { return min(maxDictionary, 16<<10+8*n) }

// frameFor is how long the frame of a piece of n bytes may be: what does not compress becomes a
// little longer.
func frameFor(n int) int { return n + n>>12 + 64 }

// kinds of nodes in the index.
const (
	kindEnd = iota
	kindDirectory
	kindSymlink
	kindRegular
	kindExecutable
)

// kinds has what they are.
var kinds = [...]nar.Kind{nar.End, nar.Directory, nar.Symlink, nar.Regular, nar.Regular}

// A method is how the contents of a file are there.
type method uint64

const (
	methodCopy     method = iota // a file of the base as it is
	methodReplaced               // a file of the base with its hashes replaced
	methodPatch                  // frames with parts of a file of the base, replaced, as dictionaries
	methodNew                    // frames
)

// A piece is a frame in the index.
type piece struct {
	offset, length uint64 // of the dictionary in the base
	frame          uint64 // length in bytes
}

// appendString appends a string behind its length.
func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func readUvarint(r *bufio.Reader) (uint64, error) {
	n, err := binary.ReadUvarint(r)
	return n, reuse.Unexpected(err)
}

// readString reads a string of at most limit bytes.
func readString(r *bufio.Reader, limit int) (string, error) {
	n, err := readUvarint(r)
	if err != nil {
		return "", err
	}
	if n > uint64(limit) {
		return "", fmt.Errorf("string of %d bytes, longer than %d", n, limit)
	}
	b := make([]byte, n)
	_, err = io.ReadFull(r, b)
	return string(b), reuse.Unexpected(err)
}

// openBase finds a directory or a file. Links lead to the directory that it is in, but not to it.
func openBase(name string) (string, error) {
	parent, err := filepath.EvalSymlinks(filepath.Dir(name))
	if err != nil {
		return "", err
	}
	name = filepath.Join(parent, filepath.Base(name))
	info, err := os.Lstat(name)
	if err == nil && !info.IsDir() && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is neither a directory nor a regular file", name)
	}
	return name, err
}

// openFile opens the regular file at a path below a base, which is empty if the base is a file, and
// returns its length in bytes. It follows no link: no path leads out of the base, whatever changes
// meanwhile.
func openFile(base, path string) (*os.File, uint64, error) {
	if path != "" && (!filepath.IsLocal(path) || filepath.Clean(path) != path) {
		return nil, 0, fmt.Errorf("file %q of %s: not below it", path, base)
	}
	f, length, err := reuse.OpenRegular(filepath.Join(base, path))
	if err != nil {
		return nil, 0, fmt.Errorf("file %q of %s: %w", path, base, err)
	}
	return f, uint64(length), nil
}
