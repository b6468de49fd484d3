// SPDX-License-Identifier: GPL-3.0-or-later

package sourcetest

import (
	"context"
	"errors"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/local"
)

// Files are files of a store with something that happens before each operation, and after a block
// has been made durable.
type Files struct {
	local.Files
	// Before is told whether the block is to be put. Its error is that of the operation.
	Before func(ref eris.Reference, put bool) error
	After  func(ref eris.Reference)
}

// Read implements [local.Files].
func (f Files) Read(ref eris.Reference, block []byte) error {
	if err := f.Before(ref, false); err != nil {
		return err
	}
	return f.Files.Read(ref, block)
}

// Write implements [local.Files].
func (f Files) Write(ref eris.Reference, block []byte) (func() error, error) {
	if err := f.Before(ref, true); err != nil {
		return nil, err
	}
	commit, err := f.Files.Write(ref, block)
	return func() error {
		err := commit()
		if err == nil {
			f.After(ref)
		}
		return err
	}, err
}

// Before returns what holds and fails as the backend does, for [Files]: place gives the store a
// block of the backend that is asked for.
func (b *Backend) Before(place func(ref eris.Reference, block []byte)) func(ref eris.Reference, put bool) error {
	return func(ref eris.Reference, put bool) error {
		block, err := b.Get(context.Background(), ref, 0, nil)
		if errors.Is(err, eris.ErrNotFound) || err == nil && put {
			return nil
		}
		if err == nil {
			place(ref, block)
		}
		return err
	}
}
