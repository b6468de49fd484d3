// SPDX-License-Identifier: GPL-3.0-or-later

package dir

import (
	"io/fs"
	"os"
	"path/filepath"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// Each calls f for each block of a directory, in either layout. Blocks are not verified, and their
// memory is used again; of a file that cannot be read or has not the size of a block there are no
// bytes. It returns the first error of f or of reading the directory.
func Each(directory string, f func(ref eris.Reference, block []byte) error) error {
	r, err := openRoot(directory, false)
	if err != nil {
		return err
	}
	defer r.Close()
	memory := make([]byte, eris.BlockSize32KiB)
	return fs.WalkDir(r.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && name != "." && len(name) != 2: // of a stick with other things
			return fs.SkipDir
		case !d.Type().IsRegular():
			return nil
		}
		ref, err := eris.ParseReference(filepath.Base(name))
		if err != nil || ref.String() != filepath.Base(name) {
			return nil
		}
		info, err := d.Info()
		if os.IsNotExist(err) {
			return nil // somebody removes blocks
		}
		var block []byte
		if err == nil && eris.BlockSize(info.Size()).Valid() {
			if err := r.read(name, memory[:info.Size()]); err == nil {
				block = memory[:info.Size()]
			}
		}
		return f(ref, block)
	})
}
