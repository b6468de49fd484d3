// SPDX-License-Identifier: GPL-3.0-or-later

package restore

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

// CheckNew returns an error, which wraps [fs.ErrExist], if there is something of the name that a
// user wants to be made, and another one if nothing can have the name, or there is no directory to
// make it in, or none that may be written to.
func CheckNew(path string) error {
	if _, err := os.Lstat(path); err == nil {
		return &fs.PathError{Op: "create", Path: path, Err: unix.EEXIST}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	directory := filepath.Dir(path)
	err := unix.Access(directory, unix.W_OK|unix.X_OK)
	switch err {
	case nil:
		return nil
	case unix.ENOENT:
		return fmt.Errorf("the directory %s does not exist; make it, or name another destination", directory)
	}
	return &fs.PathError{Op: "open", Path: directory, Err: err}
}

// Whole has a file or a tree made beside the name that it gets when it is complete and on disk:
// whatever ends the program, what has the name is whole. Nothing is left behind after an error.
func Whole(path string, restoreTo func(temporary string) error) (err error) {
	directory := filepath.Dir(path)
	temporary := files.TemporaryName(directory)
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
	return files.SyncDirectory(directory)
}
