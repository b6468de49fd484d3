// SPDX-License-Identifier: GPL-3.0-or-later

package items

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"os"
	"path/filepath"
	"testing"
)

// FuzzTable opens tables of any contents, whose checksum is right where that can be: they must not
// give wrong blocks, also when they are mended.
func FuzzTable(f *testing.F) {
	root, directory := f.TempDir(), f.TempDir()
	write(f, filepath.Join(root, "a", "large"), random(1, 70000))
	write(f, filepath.Join(root, "a", "small"), random(2, 700))
	write(f, filepath.Join(root, "b"), random(3, 33000))
	update(f, open(f, directory, root), "a", "b")
	path := runFiles(f, directory)[0]
	whole, err := os.ReadFile(path)
	must(f, err)
	all := encodeAll(f, root, "a", "b")
	f.Add(whole)
	f.Add(whole[1:])
	f.Fuzz(func(t *testing.T, table []byte) {
		directory := t.TempDir()
		must(t, os.WriteFile(filepath.Join(directory, filepath.Base(path)), withSum(table), 0o600))
		opened := open(t, directory, root)
		missing(t, opened, all)
		update(t, opened, "a", "b")
		missing(t, opened, all)
	})
}

// withSum returns a table with the checksum that it should have.
func withSum(table []byte) []byte {
	table = bytes.Clone(table)
	if len(table) < footerSize {
		return table
	}
	footer := table[len(table)-footerSize:]
	copy(footer, magic)
	blocks := min(binary.BigEndian.Uint64(footer[8:]), uint64(len(table)-footerSize))
	sum := crc32.Update(0, castagnoli, table[blocks:len(table)-footerSize])
	binary.BigEndian.PutUint32(footer[40:], crc32.Update(sum, castagnoli, footer[:40]))
	return table
}
