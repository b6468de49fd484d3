// SPDX-License-Identifier: GPL-3.0-or-later

package dump

import (
	"encoding/binary"
	"errors"
	"hash/maphash"
	"io"
	"os"
	"slices"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/local"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

const (
	// maxBatch bounds the blocks that wait to be written, in bytes.
	maxBatch = 8 << 20
	// opening is how a dump begins: the tag, an array and a map of indefinite length.
	opening = "\xda\x65\x72\x69\x73\x9f\xbf"
	ended   = 0xff
)

var (
	errLocked       = errors.New("another process puts blocks into the dump")
	errForeign      = errors.New("the dump cannot be continued, because it has something in it that is neither a block nor a read capability")
	errDamaged      = errors.New("the dump is damaged and cannot be continued; what of it is good can be put into another")
	errChanged      = errors.New("the dump was changed meanwhile by somebody else")
	errCapabilities = errors.New("the dump has too many read capabilities")
	errBusy         = errors.New("the dump is replaced again and again")
)

// writer is a dump that is being continued. It is protected by the lock writing.
type writer struct {
	file         *os.File // which is locked
	state        os.FileInfo
	tail         int64 // where the next block goes
	end          int   // how many bytes the end of the dump has, which is at the tail
	capabilities []eris.ReadCapability
	changed      bool // there is something to be written although there may be no block
	synced       bool
	pairs        []byte                      // that are written next
	blocks       map[eris.Reference]Position // where in pairs the blocks are
	err          error                       // why nothing more is written
}

func appendPair(b []byte, ref eris.Reference, block []byte) []byte {
	b = append(b, majorBytes<<5|24, byte(len(ref)))
	b = append(b, ref[:]...)
	b = append(b, majorBytes<<5|25)
	b = binary.BigEndian.AppendUint16(b, uint16(len(block)))
	return append(b, block...)
}

func appendEnd(b []byte, capabilities []eris.ReadCapability) []byte {
	b = append(b, ended)
	for _, c := range capabilities {
		b = append(b, majorTag<<5|25)
		b = binary.BigEndian.AppendUint16(b, eris.CBORTagReadCapability)
		b = append(b, majorBytes<<5|24, eris.ReadCapabilitySize)
		b = c.AppendBinary(b)
	}
	return append(b, ended)
}

// add adds a block to the next batch, unless it is there already. It returns the writer that has
// it.
func (s *Store) add(ref eris.Reference, block []byte) (*writer, error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	for {
		w, err := s.openWriter()
		if err != nil {
			return nil, err
		}
		if _, ok := w.blocks[ref]; ok {
			return w, nil
		}
		if len(w.pairs)+len(block) <= maxBatch {
			break
		}
		s.room.Wait()
	}
	w := s.writer
	there := make([]byte, len(block))
	if s.find(ref, there) == nil && eris.Verify(ref, there) == nil {
		w.changed = w.changed || !w.synced
		return w, nil
	}
	if w.blocks == nil {
		w.blocks = make(map[eris.Reference]Position)
	}
	w.pairs = appendPair(w.pairs, ref, block)
	w.blocks[ref] = PositionOf(int64(len(w.pairs)-len(block)), len(block))
	return w, nil
}

func (s *Store) durable(w *writer) error {
	if err := s.commits.Do(); err != nil {
		return err
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	return w.err
}

func (s *Store) commit() error {
	s.writing.Lock()
	w := s.writer
	if w == nil || len(w.blocks) == 0 && !w.changed {
		s.writing.Unlock()
		return nil
	}
	pairs, blocks := w.pairs, w.blocks
	w.pairs, w.blocks, w.changed = nil, nil, false
	capabilities := slices.Clone(w.capabilities)
	s.room.Broadcast()
	s.reading.Lock()
	s.changing = true
	s.reading.Unlock()
	s.writing.Unlock()

	state, end, err := s.write(w, pairs, capabilities)

	s.writing.Lock()
	defer s.writing.Unlock()
	s.reading.Lock()
	defer s.reading.Unlock()
	s.changing = false
	if err != nil {
		// The next Put opens the dump again, and finds out what it has.
		w.err = err
		w.file.Close()
		if s.writer == w {
			s.writer = nil
		}
		s.room.Broadcast()
		return err
	}
	for ref, at := range blocks {
		s.contents.add(maphash.Bytes(s.seed, ref[:]), at+Position(w.tail<<1))
	}
	w.tail += int64(len(pairs))
	w.end, w.state, w.synced = end, state, true
	s.state = state
	return nil
}

// write writes pairs and the end of the dump behind them. See the package comment for the order. It
// changes nothing of the writer.
func (s *Store) write(w *writer, pairs []byte, capabilities []eris.ReadCapability) (state os.FileInfo, end int, err error) {
	info, err := os.Stat(s.URL.Path)
	if err != nil {
		return nil, 0, err
	}
	if !unchanged(w.state, info) {
		return nil, 0, errChanged
	}
	data := appendEnd(pairs, capabilities)
	end = len(data) - len(pairs)
	old := min(w.end, len(data))
	steps := []func() error{
		func() error { _, err := w.file.WriteAt(data[old:], w.tail+int64(old)); return err },
		func() error { return w.file.Truncate(w.tail + int64(len(data))) },
		func() error { return s.sync(w.file) },
		func() error { _, err := w.file.WriteAt(data[:old], w.tail); return err },
		func() error { return s.sync(w.file) },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return nil, 0, err
		}
	}
	state, err = w.file.Stat()
	return state, end, err
}

// openWriter opens the dump for writing, and makes it if there is none. The lock writing must be
// held.
func (s *Store) openWriter() (*writer, error) {
	if s.writer != nil {
		return s.writer, nil
	}
	const tries = 10 // others may rename it at the same time
	for range tries {
		file, _, err := files.OpenRegular(s.URL.Path, os.O_RDWR)
		if errors.Is(err, os.ErrNotExist) {
			err = files.Replace(s.URL.Path, 0o666, files.Options{New: true, Sync: true}, func(w io.Writer) error {
				_, err := w.Write(appendEnd([]byte(opening), nil))
				return err
			})
			if err == nil || errors.Is(err, os.ErrExist) {
				continue
			} else if errors.Is(err, os.ErrNotExist) {
				err = local.NoDirectory(s.URL.Path)
			}
		}
		if err != nil {
			return nil, err
		}
		w, err := s.startWriter(file)
		if err != nil {
			file.Close()
			return nil, err
		}
		if w != nil {
			s.writer = w
			return w, nil
		}
		file.Close()
	}
	return nil, errBusy
}

// startWriter returns a writer of an open file, or nil if the file has been replaced.
func (s *Store) startWriter(file *os.File) (*writer, error) {
	// Some file systems cannot lock.
	if err := files.LockFile(file, 0); errors.Is(err, files.ErrLocked) {
		return nil, errLocked
	}
	there, err := os.Stat(s.URL.Path)
	if err != nil {
		return nil, err
	}
	here, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !os.SameFile(here, there) {
		return nil, nil
	}
	if here.Size() == 0 {
		if _, err := file.WriteAt(appendEnd([]byte(opening), nil), 0); err != nil {
			return nil, err
		}
	}
	// A descriptor of its own, which outlives the writer.
	again, _, err := files.OpenRegular(s.URL.Path, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	s.reading.Lock()
	defer s.reading.Unlock()
	if err := s.setFile(again); err != nil {
		again.Close()
		return nil, err
	}
	c := s.contents
	switch {
	case c.damaged:
		return nil, errDamaged
	case !c.end.appendable && c.foreign:
		return nil, errForeign
	case !c.end.appendable:
		return nil, s.renew(again, s.state)
	}
	w := &writer{file: file, state: s.state, tail: c.end.tail, capabilities: slices.Clone(c.capabilities)}
	if c.end.end > 0 {
		w.end = int(c.end.end - c.end.tail)
	}
	return w, nil
}

// renew writes a dump of definite length, which is locked, anew, so that it can be continued.
func (s *Store) renew(file *os.File, info os.FileInfo) error {
	return files.Replace(s.URL.Path, info.Mode().Perm(), files.Options{Sync: true, Locked: true}, func(out io.Writer) error {
		if _, err := io.WriteString(out, opening); err != nil {
			return err
		}
		capabilities, err := Read(io.NewSectionReader(file, 0, info.Size()), func(ref eris.Reference, block []byte) error {
			if eris.Verify(ref, block) != nil {
				return nil
			}
			_, err := out.Write(appendPair(nil, ref, block))
			return err
		})
		if _, cut := errors.AsType[*FormatError](err); err != nil && !cut {
			return err
		}
		_, err = out.Write(appendEnd(nil, capabilities))
		return err
	})
}
