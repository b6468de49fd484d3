// SPDX-License-Identifier: GPL-3.0-or-later

package restore

import (
	"bytes"

	"golang.org/x/sys/unix"
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
		n := w.data(b)
		if err := pwriteAll(w.fd, b[:n], w.offset); err != nil {
			return err
		}
		if w.offset += int64(n); n > 0 {
			w.written = w.offset
		}
		b = b[n:]
		for isHole(b) {
			b = b[hole:]
			w.offset += hole
		}
	}
	return nil
}

// data returns how many of the next bytes come before a hole.
func (w *sparseWriter) data(b []byte) int {
	for n := int(-w.offset & (hole - 1)); n+hole <= len(b); n += hole {
		if isHole(b[n:]) {
			return n
		}
	}
	return len(b)
}

// isHole reports whether b begins with as many zeros as make a hole.
func isHole(b []byte) bool {
	return len(b) >= hole && b[0] == 0 && b[hole-1] == 0 && bytes.Equal(b[:hole], zeros[:])
}

// finish gives the file its length, if it ends in a hole.
func (w *sparseWriter) finish() error {
	if w.offset == w.written {
		return nil
	}
	return unix.Ftruncate(w.fd, w.offset)
}

func pwriteAll(fd int, b []byte, offset int64) error {
	for len(b) > 0 {
		n, err := unix.Pwrite(fd, b, offset)
		if err == unix.EINTR {
			continue
		} else if err != nil {
			return err
		}
		b, offset = b[n:], offset+int64(n)
	}
	return nil
}
