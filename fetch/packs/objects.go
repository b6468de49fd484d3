// SPDX-License-Identifier: GPL-3.0-or-later

package packs

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

// directoryOf keeps packs as files.
type directoryOf struct{ storeurl.URL }

// String implements objects.
func (d directoryOf) String() string { return d.URL.String() + "?packed" }

// Close implements objects.
func (d directoryOf) Close() error { return nil }

// Range implements objects.
func (d directoryOf) Range(_ context.Context, name string, from, n int64, use func(body io.Reader, from, total int64) error) error {
	if !d.Get {
		return eris.ErrNotFound
	}
	file, info, err := files.OpenRegular(filepath.Join(d.Path, name), os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return eris.ErrNotFound
	} else if err != nil {
		return err
	}
	defer file.Close()
	if from < 0 {
		from = max(0, info.Size()+from)
	}
	return use(io.NewSectionReader(file, from, n), from, info.Size())
}

// PutObject implements objects: it gives the file, which is in the same directory, its name.
func (d directoryOf) PutObject(_ context.Context, name string, content *os.File, _ int64, _ [sha256.Size]byte) error {
	if !d.Put {
		return fetch.ErrReadOnly
	}
	if err := content.Chmod(0o644); err != nil {
		return err
	}
	if err := content.Sync(); err != nil {
		return err
	}
	if err := os.Rename(content.Name(), filepath.Join(d.Path, name)); err != nil {
		return err
	}
	return files.SyncDirectory(d.Path)
}
