// SPDX-License-Identifier: GPL-3.0-or-later

package restore

import (
	"bytes"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

// hole is the length in bytes of what may be left out of a file if it is all zeros: a block of most
// file systems.
const hole = 4096

var zeros [hole]byte // never written to

// sparseWriter writes a new file from its start to its end, and leaves holes where there are only
// zeros, as Guix does (Guix, guix/store/deduplication.scm: tee). The zero sparseWriter with a file
// is ready for use.
type sparseWriter struct {
	fd      int
	offset  int64 // of what is written next
	written int64 // end of what is not a hole
}

// write writes the next bytes of the file.
func (w *sparseWriter) write(b []byte) error {
	for len(b) > 0 {
		n := 0
		for n < len(b) && w.zeros(b, n) == 0 {
			n += w.part(b, n)
		}
		if err := pwriteAll(w.fd, b[:n], w.offset); err != nil {
			return err
		}
		if w.offset += int64(n); n > 0 {
			w.written = w.offset
		}
		b = b[n:]
		for n = w.zeros(b, 0); n > 0; n = w.zeros(b, 0) {
			b = b[n:]
			w.offset += int64(n)
		}
	}
	return nil
}

// part returns how many bytes of b, which comes next, from i on are in one block of the file.
func (w *sparseWriter) part(b []byte, i int) int {
	return min(len(b)-i, hole-int((w.offset+int64(i))&(hole-1)))
}

// zeros returns the same if all of them are zeros, else 0. What of a block is in other pieces does
// not matter: where nothing is written there are zeros.
func (w *sparseWriter) zeros(b []byte, i int) int {
	n := w.part(b, i)
	if n == 0 || b[i] != 0 || b[i+n-1] != 0 || !bytes.Equal(b[i:i+n], zeros[:n]) {
		return 0
	}
	return n
}

// finish gives the file its length, if it ends in a hole.
func (w *sparseWriter) finish() error {
	if w.offset == w.written {
		return nil
	}
	return files.Retry(func() error { return unix.Ftruncate(w.fd, w.offset) })
}

func pwriteAll(fd int, b []byte, offset int64) error {
	for len(b) > 0 {
		n := 0
		err := files.Retry(func() (err error) {
			n, err = unix.Pwrite(fd, b, offset)
			return err
		})
		if err != nil {
			return err
		}
		b, offset = b[n:], offset+int64(n)
	}
	return nil
}
