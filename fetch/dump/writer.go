// SPDX-License-Identifier: GPL-3.0-or-later

package dump

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
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
	state        fileState
	tail         int64 // where the next block goes
	end          int   // how many bytes the end of the dump has, which is at the tail
	capabilities []eris.ReadCapability
	changed      bool // there is something to be written although there may be no block
	synced       bool
	batch        batch
	err          error // why nothing more is written
}

// batch is blocks that are written together.
type batch struct {
	pairs   []byte
	entries []entry
	refs    map[eris.Reference]struct{}
}

type entry struct {
	ref  eris.Reference
	at   int // in pairs
	size int
}

// appendPair appends a block as a pair of the map.
func appendPair(b []byte, ref eris.Reference, block []byte) []byte {
	b = append(b, majorBytes<<5|24, byte(len(ref)))
	b = append(b, ref[:]...)
	b = append(b, majorBytes<<5|25)
	b = binary.BigEndian.AppendUint16(b, uint16(len(block)))
	return append(b, block...)
}

// appendEnd appends what is behind the last block.
func appendEnd(b []byte, capabilities []eris.ReadCapability) []byte {
	b = append(b, ended)
	for _, c := range capabilities {
		b = append(b, majorTag<<5|25)
		b = binary.BigEndian.AppendUint16(b, eris.CBORTagReadCapability)
		b = append(b, majorBytes<<5|24, eris.ReadCapabilitySize)
		b, _ = c.AppendBinary(b)
	}
	return append(b, ended)
}

// add adds a block to the next batch, unless it is there already. It returns the writer that has it.
func (s *Store) add(ref eris.Reference, block []byte) (*writer, error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	for {
		w, err := s.openWriter()
		if err != nil {
			return nil, err
		}
		if _, ok := w.batch.refs[ref]; ok {
			return w, nil
		}
		if len(w.batch.pairs)+len(block) <= maxBatch {
			break
		}
		s.room.Wait()
	}
	w := s.writer
	memory := s.pool.Get().(*[eris.BlockSize32KiB]byte)
	err := s.find(ref, memory[:len(block)])
	s.pool.Put(memory)
	if err == nil {
		w.changed = w.changed || !w.synced
		return w, nil
	}
	if w.batch.refs == nil {
		w.batch.refs = make(map[eris.Reference]struct{})
	}
	w.batch.refs[ref] = struct{}{}
	w.batch.pairs = appendPair(w.batch.pairs, ref, block)
	w.batch.entries = append(w.batch.entries, entry{ref, len(w.batch.pairs) - len(block), len(block)})
	return w, nil
}

// settle waits until what has been added to a writer is durable.
func (s *Store) settle(w *writer) error {
	err := s.commits.Do()
	s.writing.Lock()
	defer s.writing.Unlock()
	if err == nil {
		err = w.err
	}
	return readOnly(err)
}

// commit writes what has been added.
func (s *Store) commit() error {
	s.writing.Lock()
	w := s.writer
	if w == nil || len(w.batch.entries) == 0 && !w.changed {
		s.writing.Unlock()
		return nil
	}
	b := w.batch
	w.batch, w.changed = batch{}, false
	capabilities := slices.Clone(w.capabilities)
	s.room.Broadcast()
	s.writing.Unlock()

	state, end, err := s.write(w, b.pairs, capabilities)

	s.writing.Lock()
	defer s.writing.Unlock()
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
	s.reading.Lock()
	defer s.reading.Unlock()
	for _, e := range b.entries {
		key := maphash.Bytes(s.seed, e.ref[:])
		if _, ok := s.contents.blocks[key]; !ok && len(s.contents.blocks) == maxBlocks {
			s.contents.more = true
			continue
		}
		s.contents.blocks[key] = placeOf(w.tail+int64(e.at), e.size)
	}
	w.tail += int64(len(b.pairs))
	w.end, w.state, w.synced = end, state, true
	s.state = state
	return nil
}

// write writes pairs and the end of the dump behind them. See the package comment for the order. It changes nothing of the
// writer.
func (s *Store) write(w *writer, pairs []byte, capabilities []eris.ReadCapability) (state fileState, end int, err error) {
	info, err := os.Stat(s.url.Path)
	if err != nil {
		return state, 0, err
	}
	if stateOf(info) != w.state {
		return state, 0, errChanged
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
			return state, 0, err
		}
	}
	if info, err = w.file.Stat(); err != nil {
		return state, 0, err
	}
	return stateOf(info), end, nil
}

// openWriter opens the dump for writing, and makes it if there is none. The lock writing must be held.
func (s *Store) openWriter() (*writer, error) {
	if s.writer != nil {
		return s.writer, nil
	}
	const tries = 10 // others may rename it at the same time
	for range tries {
		file, err := openRegular(s.url.Path, os.O_RDWR)
		if errors.Is(err, os.ErrNotExist) {
			if err = create(s.url.Path, true, func(w io.Writer) error {
				_, err := w.Write(appendEnd([]byte(opening), nil))
				return err
			}); err == nil || errors.Is(err, os.ErrExist) {
				continue
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
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == unix.EWOULDBLOCK {
		return nil, errLocked
	}
	there, err := os.Stat(s.url.Path)
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
	again, err := openRegular(s.url.Path, os.O_RDONLY)
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
		return nil, s.renew(again, s.state.size)
	}
	w := &writer{file: file, state: s.state, tail: c.end.tail, capabilities: slices.Clone(c.capabilities)}
	if c.end.end > 0 {
		w.end = int(c.end.end - c.end.tail)
	}
	return w, nil
}

// renew writes a dump of definite length anew, so that it can be continued.
func (s *Store) renew(file io.ReaderAt, size int64) error {
	return create(s.url.Path, false, func(out io.Writer) error {
		if _, err := io.WriteString(out, opening); err != nil {
			return err
		}
		in := NewReader(io.NewSectionReader(file, 0, size))
		var pair []byte
		for {
			ref, block, err := in.Next()
			if err != nil {
				var format *FormatError
				if err != io.EOF && !errors.As(err, &format) {
					return err
				}
				break
			}
			pair = appendPair(pair[:0], ref, block)
			if _, err := out.Write(pair); err != nil {
				return err
			}
		}
		_, err := out.Write(appendEnd(nil, in.parser.capabilities))
		return err
	})
}

// create makes a file under another name and renames it. If it is to be new and there is one already, the error is
// os.ErrExist.
func create(path string, isNew bool, write func(w io.Writer) error) error {
	directory, name := filepath.Split(path)
	if directory == "" {
		directory = "."
	}
	mode := os.FileMode(0o666)
	if info, err := os.Stat(path); err == nil {
		mode = info.Mode().Perm()
	}
	temporary, err := createTemporary(directory, name, mode)
	if err != nil {
		return err
	}
	defer os.Remove(temporary.Name()) // if it is still there
	buffered := bufio.NewWriterSize(temporary, 1<<20)
	err = write(buffered)
	if err == nil {
		err = buffered.Flush()
	}
	if err == nil {
		err = temporary.Sync()
	}
	if err2 := temporary.Close(); err == nil {
		err = err2
	}
	if err != nil {
		return err
	}
	if isNew {
		// A link does not replace what somebody else has made meanwhile; not all file systems have them.
		if err = os.Link(temporary.Name(), path); errors.Is(err, os.ErrExist) {
			return err
		}
	}
	if !isNew || err != nil {
		if err := os.Rename(temporary.Name(), path); err != nil {
			return err
		}
	}
	d, err := os.Open(directory)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// createTemporary makes a file like os.CreateTemp, with the mode that files have by default.
func createTemporary(directory, name string, mode os.FileMode) (*os.File, error) {
	for n := 0; ; n++ {
		path := filepath.Join(directory, fmt.Sprintf(".%s.%d.%d.tmp", name, os.Getpid(), n))
		file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
		if n == 1000 || !errors.Is(err, os.ErrExist) {
			return file, err
		}
	}
}
