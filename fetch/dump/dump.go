// SPDX-License-Identifier: GPL-3.0-or-later

// Package dump keeps ERIS blocks in block dumps (https://eris.codeberg.page/eer/cbor.xml): single
// files of CBOR, to be mailed, carried or archived. [Open] is a store in such a file.
//
// A dump is read as others write it: with or without its tag and that of self-described CBOR, of
// definite or indefinite length, with blocks of both sizes in any order, with things in between
// that are no blocks, and also if it is cut off. What is written is of indefinite length
// (da65726973 9f bf … ff … ff), so that more can be put into it later.
//
// # What stored means
//
// Put returns once the block would survive a power cut, as far as the kernel knows. Blocks that are
// put at the same time share a sync. A dump that does not exist is made under another name and
// renamed when it is a dump. Blocks are written behind the end of the dump first, and only when
// they are durable is the old end overwritten by the first of them: whenever that is interrupted,
// the file is the old dump, perhaps with something behind it that readers here pass over, or the
// new one. What an interruption has left is overwritten by the next Put.
//
// One process at a time puts blocks into a dump.
//
// # What is not trusted
//
// Whoever asks for blocks verifies them. Where there are several for one reference, wrong ones do
// not hide a right one. The memory that a dump takes is about 40 bytes for each of its blocks; of
// those behind the first 2,097,152 nothing is known. Read capabilities disclose the contents to
// whoever has the dump; they are written only if the URL has the element "capability" in its query.
package dump

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/local"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

// Store is a dump in a file. It implements [fetch.Store], and is safe for concurrent use. Errors of
// requests wrap [eris.ErrNotFound] if the dump does not have the block, [*eris.BlockError] if it
// has one of another size, [*FormatError] if the file is not a dump; others are those of the file
// system, among them that there is no file.
//
// Put returns once the block is durable, see the package comment. Its errors wrap
// [fetch.ErrReadOnly] if the file system or the permissions of the file do not allow writing;
// others say why the dump that is there cannot be continued.
type Store struct {
	*local.Store
	commits    *local.Commits
	seed       maphash.Seed
	checkEvery time.Duration
	sync       func(*os.File) error

	reading  sync.RWMutex
	file     *os.File // nil if it is not open
	state    os.FileInfo
	changing bool // by a write of ours that is under way
	checked  time.Time
	contents *contents

	writing sync.Mutex // taken before reading
	room    *sync.Cond // of the batch
	writer  *writer    // nil if it is not open
}

var _ fetch.Store = (*Store)(nil)

// unchanged reports whether a file is the same and, by its size and time, has not been changed.
func unchanged(before, after os.FileInfo) bool {
	return os.SameFile(before, after) && before.Size() == after.Size() && before.ModTime().Equal(after.ModTime())
}

// Open returns the store in the file that a URL names: dump:///media/usb/blocks.cbor, or
// dump:out.cbor, relative to the working directory. The path is percent-encoded. A query "?get",
// "?put" or "?get&put" restricts what the store is used for, and "?capability" has
// [Store.Finish] write read capabilities.
//
// Open does not touch the file. The first Get or Put reads through it, and so does the first Get
// after it has been changed. If there is no file, the first Put makes one.
//
// The Store must be closed.
func Open(url string) (*Store, error) {
	u, err := storeurl.ParseScheme(url, "dump")
	if err != nil {
		return nil, err
	}
	s := &Store{seed: maphash.MakeSeed(), checkEvery: time.Second, sync: (*os.File).Sync}
	s.room = sync.NewCond(&s.writing)
	s.commits = local.NewCommits(s.commit)
	s.Store = local.New(u, adapter{s})
	return s, nil
}

var (
	errTooMany = errors.New("the dump has too many blocks for all of them to be known")
	errMoved   = errors.New("the dump was changed while it was read")
)

// adapter is the store as package local sees it.
type adapter struct{ *Store }

// Release implements [local.Files].
func (s adapter) Release() {
	s.writing.Lock()
	defer s.writing.Unlock()
	if s.writer != nil {
		s.writer.file.Close()
		s.writer = nil
	}
	s.reading.Lock()
	defer s.reading.Unlock()
	if s.file != nil {
		s.file.Close()
		s.file = nil
	}
	s.contents = nil
}

// Read implements [local.Files].
func (s adapter) Read(ref eris.Reference, block []byte) error {
	if err := s.refresh(false); err != nil {
		return err
	}
	err := s.find(ref, block)
	if err == errMoved {
		if err = s.refresh(true); err == nil {
			err = s.find(ref, block)
		}
	}
	return err
}

func (s *Store) find(ref eris.Reference, block []byte) error {
	s.reading.RLock()
	defer s.reading.RUnlock()
	if s.contents == nil {
		return os.ErrClosed
	}
	at, ok := s.contents.blocks[maphash.Bytes(s.seed, ref[:])]
	switch {
	case !ok && s.contents.more:
		return errTooMany
	case !ok:
		return eris.ErrNotFound
	case at.Size() != len(block):
		return &eris.BlockError{Reference: ref, Length: at.Size(), Want: eris.BlockSize(len(block))}
	}
	n, err := s.file.ReadAt(block, at.Offset())
	if info, statErr := s.file.Stat(); statErr == nil && !s.changing && !unchanged(s.state, info) {
		return errMoved
	}
	if n < len(block) {
		return fmt.Errorf("reading at byte %d: %w", at.Offset(), err)
	}
	return nil
}

// refresh reads through the file if that has not been done, or if it has been changed.
func (s *Store) refresh(now bool) error {
	isFresh := func() bool { return s.file != nil && !now && time.Since(s.checked) < s.checkEvery }
	s.reading.RLock()
	fresh := isFresh()
	s.reading.RUnlock()
	if fresh {
		return nil
	}
	s.reading.Lock()
	defer s.reading.Unlock()
	if isFresh() {
		return nil // another call has done it
	}
	info, err := os.Stat(s.URL.Path)
	if err != nil {
		return err
	}
	s.checked = time.Now()
	if s.file != nil && (s.changing || unchanged(s.state, info)) {
		return nil
	}
	file, _, err := files.OpenRegular(s.URL.Path, os.O_RDONLY)
	if err != nil {
		return err
	}
	if err := s.setFile(file); err != nil {
		file.Close()
		return err
	}
	return nil
}

// setFile reads through a file and takes it for the present one. The lock reading must be held.
func (s *Store) setFile(file *os.File) error {
	info, err := file.Stat()
	if err != nil {
		return err
	}
	c, err := s.scan(file, info.Size())
	if err != nil {
		return err
	}
	if s.file != nil {
		s.file.Close()
	}
	s.file, s.state, s.contents = file, info, c
	return nil
}

// Finish writes read capabilities to the end of the dump, but for those that are there already, if
// the URL asks for that: they disclose the contents to everybody who gets the dump. When it returns
// nil, they are durable. Errors are those of Put.
func (s *Store) Finish(ctx context.Context, capabilities []eris.ReadCapability) error {
	for _, c := range capabilities {
		if !s.URL.Has("capability") {
			break
		}
		if err := s.addCapability(ctx, c); err != nil {
			return fmt.Errorf("%v: read capability: %w", s, err)
		}
	}
	return nil
}

func (s *Store) addCapability(ctx context.Context, c eris.ReadCapability) error {
	if !s.URL.Put {
		return fetch.ErrReadOnly
	}
	if err := c.Validate(); err != nil {
		return err
	}
	var w *writer
	return s.Do(ctx, func() (err error) {
		s.writing.Lock()
		defer s.writing.Unlock()
		if w, err = s.openWriter(); err != nil || slices.Contains(w.capabilities, c) {
			return err
		}
		if len(w.capabilities) == maxCapabilities {
			return errCapabilities
		}
		w.capabilities = append(w.capabilities, c)
		w.changed = true
		return nil
	}, func() error { return s.durable(w) })
}

// Write implements [local.Files].
func (s adapter) Write(ref eris.Reference, block []byte) (commit func() error, err error) {
	w, err := s.add(ref, block)
	return func() error { return s.durable(w) }, err
}

// maxBlocks is of how many blocks of a dump it is known where they are.
const maxBlocks = 1 << 21

// Position is where a block is in a file, and its size.
type Position int64

// PositionOf returns that of a block of a size that is valid.
func PositionOf(offset int64, size int) Position {
	p := Position(offset << 1)
	if size == int(eris.BlockSize32KiB) {
		p |= 1
	}
	return p
}

// Offset returns where the block begins, in bytes.
func (p Position) Offset() int64 { return int64(p >> 1) }

// Size returns how many bytes the block has.
func (p Position) Size() int {
	if p&1 != 0 {
		return int(eris.BlockSize32KiB)
	}
	return int(eris.BlockSize1KiB)
}

// End returns where the block ends.
func (p Position) End() int64 { return p.Offset() + int64(p.Size()) }

// contents is what is known of a dump.
type contents struct {
	blocks map[uint64]Position // by the hash of the reference, which nobody can foresee
	more   bool                // there are more

	end          ending // of the dump that can be continued
	capabilities []eris.ReadCapability
	foreign      bool // there is something in them that would get lost if they were written anew
	damaged      bool // the dump to be continued is followed by something that has blocks but is not whole
}

// add takes note of where a block is, unless too many are known.
func (c *contents) add(key uint64, at Position) {
	if _, ok := c.blocks[key]; !ok && len(c.blocks) == maxBlocks {
		c.more = true
		return
	}
	c.blocks[key] = at
}

// scan reads through a dump. It looks at the blocks themselves only where there are several for one
// reference, to keep one that is right. A dump that is cut off is no error.
func (s *Store) scan(file io.ReaderAt, size int64) (*contents, error) {
	c := &contents{blocks: make(map[uint64]Position)}
	p := parser{file: file, size: size}
	memory := make([]byte, eris.BlockSize32KiB)
	right := func(ref eris.Reference, at Position) bool {
		block := memory[:at.Size()]
		n, _ := file.ReadAt(block, at.Offset())
		return n == len(block) && eris.Verify(ref, block) == nil
	}
	behind := false // there are right blocks behind the first dump
	for n := 0; ; n++ {
		if n%1024 == 0 && s.Closing() {
			return nil, fetch.ErrClosed
		}
		l, err := p.next()
		if err != nil {
			return c, c.finish(&p, err, behind)
		}
		if l.offset+int64(l.size) > size {
			continue // the dump is cut off in this block
		}
		at := PositionOf(l.offset, l.size)
		behind = behind || p.dumps > 1 && right(l.ref, at)
		key := maphash.Bytes(s.seed, l.ref[:])
		if known, ok := c.blocks[key]; !ok || !right(l.ref, known) {
			c.add(key, at)
		}
	}
}

func (c *contents) finish(p *parser, err error, behind bool) error {
	if err != io.EOF && (!errors.As(err, new(*FormatError)) || p.dumps == 0) {
		return err
	}
	c.end = p.end
	if p.dumps > 1 && p.end.end == 0 {
		// What an interruption leaves behind a dump may look like the beginning of another one.
		c.end = p.before
		c.damaged = behind
	}
	c.capabilities = p.capabilities[c.end.first:c.end.last]
	c.foreign = p.skipped > 0 || p.more
	return nil
}
