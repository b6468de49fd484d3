// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import "github.com/plgd-dev/go-coap/v3/message"

// Block is the value of an option Block1 or Block2: which part of a body a message carries (RFC
// 7959, section 2.2).
type Block struct {
	Number   uint32 // of the part, in units of Size
	More     bool   // parts follow
	Exponent uint8  // SZX: 0 to 6 for 16 to 1024 bytes; 7 for BERT (RFC 8323, section 6)
	Present  bool   // the message has the option
}

const (
	// MaxExponent stands for parts of 1024 bytes.
	MaxExponent = 6
	// BERT stands for units of 1024 bytes, of which a message carries several. It is for streams
	// only.
	BERT = 7
	// maxBlockNumber is the greatest number that the option can hold.
	maxBlockNumber = 1<<20 - 1
)

// Parse reads the value of an option Block1 or Block2. It reports whether that was possible: it has
// at most 3 bytes.
func (b *Block) Parse(value []byte) bool {
	if len(value) > 3 {
		return false
	}
	n, _ := parseUint(value)
	*b = Block{Number: n >> 4, More: n&8 != 0, Exponent: uint8(n & 7), Present: true}
	return true
}

// uint returns the value of the option as a number. The block must have a number below 2²⁰.
func (b Block) uint() uint32 {
	if b.Number > maxBlockNumber {
		panic("coap: block number out of range")
	}
	n := b.Number<<4 | uint32(b.Exponent)
	if b.More {
		n |= 8
	}
	return n
}

// AppendOption appends the option to a message: see [AppendUintOption].
func (b Block) AppendOption(dst []byte, previous, number message.OptionID) []byte {
	return AppendUintOption(dst, previous, number, b.uint())
}

// Unit returns the size in bytes that Number counts in.
func (b Block) Unit() int {
	return 16 << min(b.Exponent, MaxExponent)
}

// Fit returns the exponent of the largest parts, without BERT, that fit into so many bytes; 0 if
// none do.
func Fit(room int) (exponent uint8) {
	for exponent < MaxExponent && 32<<exponent <= room {
		exponent++
	}
	return exponent
}

// Offset returns where in the body the part starts, in bytes; it is below 2³⁰.
func (b Block) Offset() int {
	return int(b.Number) * b.Unit()
}

// FitPart checks that a payload of the given length is what the option says of it: a whole unit if
// more parts follow (with BERT any number of units from one on), else no more than a unit, or with
// BERT anything that is not empty. Parts after the first must not be empty. (RFC 7959, section 2.2;
// RFC 8323, section 6.)
func (b Block) FitPart(length int) bool {
	switch {
	case b.Exponent == BERT && b.More:
		return length > 0 && length%b.Unit() == 0
	case b.More:
		return length == b.Unit()
	case length == 0:
		return b.Number == 0
	case b.Exponent == BERT:
		return true
	}
	return length <= b.Unit()
}
