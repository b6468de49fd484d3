// SPDX-License-Identifier: GPL-3.0-or-later

package nar

import "encoding/binary"

// A Framer makes the bytes of an archive that stand around the contents of its files. For each node
// of a walk, call AppendNode; after the contents of a Regular, AppendContentsEnd. All these bytes
// and the contents, in that order, are the archive. The zero Framer is ready to use, for one
// archive. It checks nothing: its nodes come from a [Nodes].
type Framer struct {
	depth   int // directories open
	started bool
	size    uint64 // of the file under way
}

// Precomputed runs of tokens: framing costs a few copies per node.
var (
	tokensMagic    = tokens(magic)
	tokensEntry    = tokens("entry", "(", "name")
	tokensNode     = tokens("node")
	tokensDir      = tokens("(", "type", "directory")
	tokensFile     = tokens("(", "type", "regular", "contents")
	tokensProgram  = tokens("(", "type", "regular", "executable", "", "contents")
	tokensSymlink  = tokens("(", "type", "symlink", "target")
	tokensClose    = tokens(")")
	tokensCloseTwo = tokens(")", ")")
	zeros          [8]byte
)

func tokens(ts ...string) string {
	var b []byte
	for _, t := range ts {
		b = appendString(b, t)
	}
	return string(b)
}

func appendString(dst []byte, s string) []byte {
	dst = binary.LittleEndian.AppendUint64(dst, uint64(len(s)))
	dst = append(dst, s...)
	return append(dst, zeros[:padding(uint64(len(s)))]...)
}

// padding returns how many zero bytes follow a string of n bytes.
func padding(n uint64) int { return int(-n & 7) }

// AppendNode appends the bytes that stand before the contents of a Regular, or all bytes of another
// node, and returns the extended slice.
func (f *Framer) AppendNode(dst []byte, n Node) []byte {
	if !f.started {
		f.started = true
		dst = append(dst, tokensMagic...)
	}
	if n.Kind == End {
		f.depth--
		return f.appendClose(dst)
	}
	if f.depth > 0 {
		dst = append(dst, tokensEntry...)
		dst = appendString(dst, n.Name)
		dst = append(dst, tokensNode...)
	}
	switch n.Kind {
	case Directory:
		f.depth++
		return append(dst, tokensDir...)
	case Symlink:
		dst = append(dst, tokensSymlink...)
		dst = appendString(dst, n.Target)
		return f.appendClose(dst)
	}
	f.size = n.Size
	if n.Executable {
		dst = append(dst, tokensProgram...)
	} else {
		dst = append(dst, tokensFile...)
	}
	return binary.LittleEndian.AppendUint64(dst, n.Size)
}

// AppendContentsEnd appends the bytes that stand after the contents of the Regular that AppendNode
// was called with last.
func (f *Framer) AppendContentsEnd(dst []byte) []byte {
	dst = append(dst, zeros[:padding(f.size)]...)
	return f.appendClose(dst)
}

// appendClose ends a node and, below the root, the entry around it.
func (f *Framer) appendClose(dst []byte) []byte {
	if f.depth == 0 {
		return append(dst, tokensClose...)
	}
	return append(dst, tokensCloseTwo...)
}
