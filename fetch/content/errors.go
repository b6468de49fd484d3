// SPDX-License-Identifier: GPL-3.0-or-later

package content

import (
	"errors"
	"fmt"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// ErrTooLarge is wrapped by the [*Error] of content that is longer than the limit its reader set.
var ErrTooLarge = errors.New("content is longer than its limit")

// Error says that content cannot be decoded although every block is what its reference says: the
// read capability is wrong, the tree is not one that an encoder makes, or the content is longer
// than allowed ([ErrTooLarge]). No source of blocks can help.
type Error struct {
	Root eris.Reference // the root reference of the content's capability
	Err  error          // what is wrong
}

// Error returns a text with the root reference.
func (e *Error) Error() string {
	return fmt.Sprintf("content with root %v: %v", e.Root, e.Err)
}

// Unwrap returns Err.
func (e *Error) Unwrap() error { return e.Err }

var (
	errNodeSingle  = errors.New("root has a single reference")
	errNodePartial = errors.New("internal node is not full, but not the last of its level")
	errNodeKey     = errors.New("key of an internal node is not the hash of its content")
	errClosed      = errors.New("sequence of contents is closed")
)
