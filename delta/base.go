// SPDX-License-Identifier: GPL-3.0-or-later

package delta

import (
	"fmt"
	"os"
	"path/filepath"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/reuse"
)

// A base is the name of an item that deltas are about. What is below it is opened without following
// any link: no path leads out of it, whatever changes meanwhile.
type base string

// openBase finds a directory or a file. Links lead to the directory that it is in, but not to it.
func openBase(name string) (base, error) {
	parent, err := filepath.EvalSymlinks(filepath.Dir(name))
	if err != nil {
		return "", err
	}
	name = filepath.Join(parent, filepath.Base(name))
	info, err := os.Lstat(name)
	if err == nil && !info.IsDir() && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is neither a directory nor a regular file", name)
	}
	return base(name), err
}

// open opens the regular file at a path, which is empty if the base is a file, and returns its
// length in bytes.
func (b base) open(path string) (*os.File, uint64, error) {
	name := string(b)
	if path != "" {
		if !filepath.IsLocal(path) || filepath.Clean(path) != path {
			return nil, 0, fmt.Errorf("file %q of %s: not below it", path, b)
		}
		name += "/" + path
	}
	f, length, err := reuse.OpenRegular(name)
	if err != nil {
		return nil, 0, fmt.Errorf("file %q of %s: %w", path, b, err)
	}
	return f, uint64(length), nil
}
