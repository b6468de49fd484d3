// SPDX-License-Identifier: GPL-3.0-or-later

package reuse

import (
	"crypto/sha256"
	"fmt"
	"os"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// misses remembers, for all processes, what was tried in vain. It is a table of fixed length in a
// file: where a record belongs follows from what it says, and the latest counts. So there is
// nothing to lock, nothing to clear away, and nothing that a process that is killed could leave
// behind but a record that fits nothing.
type misses struct{ path string }

// A record is what it was that did not work.
type record [16]byte

const (
	missSlots = 4096
	// repairsVersion changes when the repairs do, so that what failed is tried again.
	repairsVersion = 1
	// noOrder is that of a record that says that all orders of references have failed, or that
	// there is none.
	noOrder = -1
	// byWay is that of a record of [Finder.NoteInVain].
	byWay = -2
)

func newRecord(old string, narHash [sha256.Size]byte, order int) record {
	sum := sha256.Sum256(fmt.Appendf(nil, "%d %s %x %d", repairsVersion, old, narHash, order))
	return record(sum[:16])
}

// offset is where the record belongs.
func (r record) offset() int64 {
	return int64(uint(r[0])<<8|uint(r[1])) % missSlots * int64(len(r))
}

// has reports whether the record is there. Without a file nothing is.
func (m misses) has(r record) bool {
	f, _, err := files.OpenState(m.path, os.O_RDONLY)
	if err != nil {
		return false
	}
	defer f.Close()
	var found record
	_, err = f.ReadAt(found[:], r.offset())
	return err == nil && found == r
}

// add keeps the record. What cannot be kept is tried again.
func (m misses) add(r record) {
	f, _, err := files.OpenState(m.path, os.O_WRONLY|os.O_CREATE)
	if err != nil {
		return
	}
	defer f.Close()
	f.WriteAt(r[:], r.offset())
}

// NoteInVain notes that an old item and something that servers offer, which the text tells from all
// else, have not made what the narinfo describes, or not cheaply. InVain reports that, for all
// processes.
func (f *Finder) NoteInVain(way string, want *narinfo.Narinfo) {
	f.misses.add(newRecord(way, want.NarDigest, byWay))
}

// InVain is explained at NoteInVain.
func (f *Finder) InVain(way string, want *narinfo.Narinfo) bool {
	return f.misses.has(newRecord(way, want.NarDigest, byWay))
}
