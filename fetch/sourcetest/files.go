// SPDX-License-Identifier: GPL-3.0-or-later

package sourcetest

import (
	"bytes"
	"context"
	"errors"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/local"
)

// Files are files of a store that are given what a backend has when it is asked for, and give the
// backend what is put. They hold and fail as it does.
type Files struct {
	local.Files
	Backend *Backend
}

// Read implements [local.Files].
func (f Files) Read(ref eris.Reference, block []byte) error {
	want, err := f.Backend.Get(context.Background(), ref, 0, nil)
	if there := make([]byte, len(want)); err == nil && (f.Files.Read(ref, there) != nil || !bytes.Equal(there, want)) {
		var commit func() error
		if commit, err = f.Files.Write(ref, want); err == nil {
			err = commit()
		}
	}
	if err != nil && !errors.Is(err, eris.ErrNotFound) {
		return err
	}
	return f.Files.Read(ref, block)
}

// Write implements [local.Files].
func (f Files) Write(ref eris.Reference, block []byte) (func() error, error) {
	if _, err := f.Backend.Get(context.Background(), ref, 0, nil); err != nil && !errors.Is(err, eris.ErrNotFound) {
		return nil, err
	}
	commit, err := f.Files.Write(ref, block)
	return func() error {
		err := commit()
		there := make([]byte, len(block))
		if err == nil {
			err = f.Files.Read(ref, there)
		}
		if err == nil {
			f.Backend.Set(ref, there)
		}
		return err
	}, err
}
