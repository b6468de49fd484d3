// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"errors"
	"fmt"
)

// ErrNotFound is what a source of blocks or a store returns, wrapped or not, for a block that it
// does not have. Readers pass it on, wrapped with the reference.
var ErrNotFound = errors.New("block not found")

// ErrBlockSize is the error of stores that are given what has not the size of a block.
var ErrBlockSize = errors.New("block size is neither 1 KiB nor 32 KiB")

// BlockError says that bytes were offered as a block which they are not: their hash is not the
// reference, or their number is not the block size. The fault lies with who offered them, except in
// one case: a capability with the wrong block size makes a good block look wrong.
type BlockError struct {
	Reference Reference // the block that was requested
	Length    int       // how many bytes were offered
	Want      BlockSize // the block size that was requested; 0 if either would have done
}

// Error returns a text with the reference.
func (e *BlockError) Error() string {
	switch {
	case e.Want != 0 && e.Length != int(e.Want):
		return fmt.Sprintf("block %v: has %d bytes instead of %d", e.Reference, e.Length, int(e.Want))
	case e.Want == 0 && !BlockSize(e.Length).Valid():
		return fmt.Sprintf("block %v: %d bytes is not a block size", e.Reference, e.Length)
	}
	return fmt.Sprintf("block %v: its bytes do not have this hash", e.Reference)
}

// IsOtherSize reports whether what was offered has a valid block size, but another one than was
// requested. Then it may be the reader who is wrong: anyone can make a read capability with the
// wrong block size, and that must not turn a reader against those who have the block.
func (e *BlockError) IsOtherSize(requested BlockSize) bool {
	return e.Length != int(requested) && BlockSize(e.Length).Valid()
}
