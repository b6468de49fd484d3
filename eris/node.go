// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Node is the plaintext of an internal node: from 1 to arity pairs, and zero bytes behind them. It
// is a view of the memory it was parsed from.
type Node struct {
	pairs []byte
}

var (
	errNodeEmpty = errors.New("internal node has no reference")
	errNodeTail  = errors.New("internal node has bytes behind its null reference")
)

// ParseNode reads the plaintext of an internal node, which must have the length of a block. It
// returns an error if the node has no pair, or if anything but zero bytes follows the first null
// reference, the key beside it included (ERIS 1.0.0, section "Decoding"). Whether the key of the
// node is the hash of the plaintext, and whether a node is full that should be, is for the reader
// to check.
func ParseNode(plaintext []byte) (Node, error) {
	if !BlockSize(len(plaintext)).Valid() {
		return Node{}, fmt.Errorf("internal node has %d bytes", len(plaintext))
	}
	// Nearly every node is full, so look for the null reference from the end: the last pair that
	// has any byte decides.
	n := len(plaintext)
	for n > 0 && [pairSize]byte(plaintext[n-pairSize:n]) == [pairSize]byte{} {
		n -= pairSize
	}
	if n == 0 {
		return Node{}, errNodeEmpty
	}
	for i := 0; i < n; i += pairSize {
		if Reference(plaintext[i:i+32]) == (Reference{}) {
			return Node{}, errNodeTail
		}
	}
	return Node{pairs: plaintext[:n]}, nil
}

// Len returns the number of pairs, from 1 to the arity.
func (n Node) Len() int { return len(n.pairs) / pairSize }

// Pair returns the i-th pair, from 0 on, of the child at the next lower level.
func (n Node) Pair(i int) Pair {
	return pairAt(n.pairs, i)
}

// pairAt reads the i-th pair of an internal node's plaintext.
func pairAt(plaintext []byte, i int) Pair {
	p := plaintext[i*pairSize : (i+1)*pairSize]
	return Pair{Reference(p[:32]), Key(p[32:])}
}

// appendPair writes a pair in the form it has in an internal node.
func appendPair(b []byte, p Pair) []byte {
	b = append(b, p.Reference[:]...)
	return append(b, p.Key[:]...)
}

// padMark is the byte that separates content from the zero bytes behind it.
const padMark = 0x80

// pad appends to the end of content one byte 0x80 and then the least number of zero bytes that
// makes the length a multiple of the block size, which must be valid: at least one byte, at most a
// whole block (ERIS 1.0.0, section "Encoding"; ISO/IEC 7816-4). Like append, it may or may not use
// the memory of content.
func pad(content []byte, size BlockSize) []byte {
	zeros := int(size) - 1 - len(content)%int(size)
	content = append(content, padMark)
	return append(content, zeroBlock[:zeros]...)
}

var errPadding = errors.New("the last leaf does not end in padding")

// zeroBlock is never written to.
var zeroBlock [BlockSize32KiB]byte

// Unpad returns the content of the last leaf, given its plaintext. It returns an error if there are
// other bytes than zero behind the last 0x80, or no 0x80 at all: then the key was wrong, or no
// encoder made this.
func Unpad(leaf []byte) ([]byte, error) {
	content := trimZeros(leaf)
	if len(content) == 0 || content[len(content)-1] != padMark {
		return nil, errPadding
	}
	return content[:len(content)-1], nil
}

// trimZeros returns b without the zeros at its end: of small files they are a third of all bytes,
// and bytes.TrimRight, which looks at one byte at a time, took 3 % of the time of restoring them.
func trimZeros(b []byte) []byte {
	for len(b) >= 8 && binary.NativeEndian.Uint64(b[len(b)-8:]) == 0 {
		b = b[:len(b)-8]
	}
	for len(b) > 0 && b[len(b)-1] == 0 {
		b = b[:len(b)-1]
	}
	return b
}
