// SPDX-License-Identifier: GPL-3.0-or-later

package restore

import (
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

// CheckNew returns the absolute form of the name of a file or tree that a user wants to be made,
// and an error, which wraps [fs.ErrExist], if there is something of that name.
func CheckNew(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	if _, err := os.Lstat(path); err == nil {
		return "", &fs.PathError{Op: "create", Path: path, Err: unix.EEXIST}
	}
	return path, nil
}

// Whole has a file or a tree made beside the name that it gets when it is complete and on disk:
// whatever ends the program, what has the name is whole. Nothing is left behind after an error.
func Whole(path string, restoreTo func(temporary string) error) (err error) {
	directory := filepath.Dir(path)
	temporary := filepath.Join(directory, files.TemporaryPrefix+rand.Text())
	defer func() { err = errors.Join(err, Remove(temporary)) }()
	if err := restoreTo(temporary); err != nil {
		return err
	}
	d, err := os.Open(directory)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := files.SyncFileSystem(d); err != nil {
		return err
	}
	if err := files.MoveNew(temporary, path); err != nil {
		return err
	}
	return d.Sync()
}
