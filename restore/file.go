// SPDX-License-Identifier: GPL-3.0-or-later

package restore

import (
	"bytes"
	"crypto/sha256"
	"hash"
	"unsafe"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// A file is a regular file to create.
type file struct {
	directory  *directory
	name       string
	size       uint64
	executable bool
	unique     bool

	arrived uint64         // bytes in pieces
	pieces  []nar.Chunk    // all contents, or the first ones when there is a stream
	copied  []byte         // the last piece, if that is our own memory, with room to append
	stream  chan nar.Chunk // the rest of the contents, nil if there is none
}

// add takes over c, the next piece of contents.
func (f *file) add(c nar.Chunk) {
	f.arrived += uint64(len(c.Bytes))
	if len(c.Bytes) >= smallPiece || f.arrived == f.size && len(f.pieces) == 0 {
		f.pieces, f.copied = append(f.pieces, c), nil
		return
	}
	if len(f.copied)+len(c.Bytes) > cap(f.copied) {
		room := min(f.size-f.arrived+uint64(len(c.Bytes)), maxPieces*smallPiece)
		f.pieces, f.copied = append(f.pieces, nar.Chunk{}), make([]byte, 0, room)
	}
	f.copied = append(f.copied, c.Bytes...)
	f.pieces[len(f.pieces)-1].Bytes = f.copied
	c.Release()
}

// release lets go of the memory.
func (f *file) release() {
	for _, c := range f.pieces {
		c.Release()
	}
	f.pieces = nil
}

func (f *file) mode() uint32 {
	if f.executable {
		return 0o555
	}
	return 0o444
}

// work creates files until there are no more, or until the first failure.
func (r *restorer) work() error {
	for f := range r.files {
		err := r.create(f)
		f.release()
		if err2 := r.complete(f.directory); err == nil {
			err = err2
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// create makes one file in its final form.
func (r *restorer) create(f *file) error {
	var h *linkHash // nil if it is not to be shared
	if r.links != nil && f.size >= deduplicationMinimum && !f.unique {
		h = newLinkHash(f)
	}
	// With all contents at hand a link that exists saves the writing.
	if h != nil && f.stream == nil && r.links.use(h.name(), f) {
		return nil
	}
	mode := f.mode()
	if r.writable {
		mode |= 0o200
	}
	fd, err := files.OpenAt(f.directory.fd, f.name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW, mode)
	if err != nil {
		return r.pathError("create", f.name, err)
	}
	err = r.fill(fd, f, h)
	if err == nil && !r.writable {
		if f.directory.parent != nil { // else its access control list may have changed the mode
			mode = 0
		}
		err = canonicalise(fd, mode)
	}
	if err2 := unix.Close(fd); err == nil {
		err = err2
	}
	if err != nil {
		return r.pathError("write", f.name, err)
	}
	if h != nil {
		r.links.share(h.name(), f)
	}
	return nil
}

// fill writes the contents, and hashes those of a stream for the link, if there is to be one.
func (r *restorer) fill(fd int, f *file, h *linkHash) error {
	w := sparseWriter{fd: fd}
	for _, c := range f.pieces {
		if err := w.write(c.Bytes); err != nil {
			return err
		}
	}
	if f.stream == nil {
		return w.finish()
	}
	f.release() // what follows may need the memory
	for written := f.arrived; ; {
		select {
		case c, ok := <-f.stream:
			if !ok {
				if written < f.size {
					return errWalk
				}
				return w.finish()
			}
			written += uint64(len(c.Bytes))
			err := w.write(c.Bytes)
			if h != nil {
				h.hash.Write(c.Bytes)
			}
			c.Release()
			if err != nil {
				return err
			}
		case <-r.ctx.Done():
			return r.ctx.Err()
		}
	}
}

// A linkHash computes the name under which a file is shared, from the SHA-256 of the archive that
// has the file as its root.
type linkHash struct {
	hash   hash.Hash
	framer nar.Framer
	text   string
}

// newLinkHash returns the hash of a file as far as its contents are at hand.
func newLinkHash(f *file) *linkHash {
	h := &linkHash{hash: sha256.New()}
	h.hash.Write(h.framer.AppendNode(nil, nar.Node{Kind: nar.Regular, Size: f.size, Executable: f.executable}))
	for _, c := range f.pieces {
		h.hash.Write(c.Bytes)
	}
	return h
}

// name returns the name; nothing can be hashed after that.
func (h *linkHash) name() string {
	if h.text == "" {
		h.hash.Write(h.framer.AppendContentsEnd(nil))
		h.text = nixbase32.EncodeToString(h.hash.Sum(nil))
	}
	return h.text
}

// canonicalise gives an open file its final times, and mode unless that is 0. Of setting times,
// x/sys/unix has the system call only with a name.
func canonicalise(fd int, mode uint32) error {
	return files.Retry(func() error {
		if mode != 0 {
			if err := unix.Fchmod(fd, mode); err != nil {
				return err
			}
		}
		_, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(&canonicalTime)), 0, 0, 0)
		if errno != 0 {
			return errno
		}
		return nil
	})
}

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
