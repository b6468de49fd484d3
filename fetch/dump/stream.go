// SPDX-License-Identifier: GPL-3.0-or-later

package dump

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"sync"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// Read reads a dump, or several in a row, from a stream, and calls block for each of its blocks in
// the order in which they come. They are not verified, and their memory is used again. It returns
// the read capabilities, and the first error of block or of the stream: a [*FormatError] if it is
// no dump, or one that is cut off. What came before has been handed over then.
func Read(r io.Reader, block func(ref eris.Reference, block []byte) error) ([]eris.ReadCapability, error) {
	s := &forward{r: bufio.NewReaderSize(r, int(eris.BlockSize32KiB))}
	p := parser{file: s, size: math.MaxInt64}
	memory := make([]byte, eris.BlockSize32KiB)
	for {
		l, err := p.next()
		if err == io.EOF {
			return p.capabilities, nil
		}
		n := 0
		if err == nil {
			n, err = s.ReadAt(memory[:l.size], l.offset)
			err = p.cut(err)
		}
		if format, ok := errors.AsType[*FormatError](err); ok {
			format.Length = s.at + int64(s.r.Buffered())
		}
		if n < l.size || err != nil {
			return p.capabilities, err
		}
		if err := block(l.ref, memory[:l.size]); err != nil {
			return p.capabilities, err
		}
	}
}

// forward is a stream as an [io.ReaderAt], of which each offset is at least as large as the one
// before.
type forward struct {
	r  *bufio.Reader
	at int64
}

// ReadAt implements [io.ReaderAt], for at most as many bytes as the buffer has.
func (f *forward) ReadAt(p []byte, offset int64) (int, error) {
	for f.at < offset {
		n, err := f.r.Discard(int(min(offset-f.at, 1<<30)))
		if f.at += int64(n); err != nil {
			return 0, err
		}
	}
	b, err := f.r.Peek(len(p))
	return copy(p, b), err
}

// Stream is a dump that is written to a stream, a pipe to another machine for example, which has no
// blocks to give. It implements [fetch.Store] and is safe for concurrent use. Put returns once the
// block has been written; what the other end does with it is not known. The dump is whole when
// Finish has returned nil: without it, who reads the stream finds it cut off.
type Stream struct {
	// W is what it is written to, and KeepCapabilities whether Finish writes read capabilities. Both
	// are set before anything else is done.
	W                io.Writer
	KeepCapabilities bool

	mu     sync.Mutex
	begun  bool
	buffer []byte
	err    error // why nothing more is written
}

var _ fetch.Store = (*Stream)(nil)

// Start implements [fetch.Source].
func (s *Stream) Start(r *fetch.Request) {
	r.Fail(eris.ErrNotFound)
}

// Cancel implements [fetch.Source].
func (s *Stream) Cancel(*fetch.Request) {}

// String returns its URL.
func (s *Stream) String() string { return "dump:-" }

// Close implements [fetch.Source]. It does not close what is written to.
func (s *Stream) Close() error { return nil }

// Put implements [fetch.Store].
func (s *Stream) Put(ctx context.Context, ref eris.Reference, block []byte) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return s.write(func(b []byte) []byte { return appendPair(b, ref, block) }, nil)
}

// Finish ends the dump, with read capabilities if these are kept: they disclose the contents to
// whoever has the dump. Nothing can be put afterwards.
func (s *Stream) Finish(_ context.Context, capabilities []eris.ReadCapability) error {
	if !s.KeepCapabilities {
		capabilities = nil
	}
	return s.write(func(b []byte) []byte { return appendEnd(b, capabilities) }, errEnded)
}

// EndWith is Finish without read capabilities, but with a byte string as the last thing in the
// dump, which readers of dumps pass over.
func (s *Stream) EndWith(text []byte) error {
	return s.write(func(b []byte) []byte {
		b = append(b, ended, majorBytes<<5|26)
		b = binary.BigEndian.AppendUint32(b, uint32(len(text)))
		return append(append(b, text...), ended)
	}, errEnded)
}

var errEnded = errors.New("the dump has been ended")

// write writes what add adds, and then nothing more if there is a reason.
func (s *Stream) write(add func(b []byte) []byte, then error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	s.buffer = s.buffer[:0]
	if !s.begun {
		s.begun = true
		s.buffer = append(s.buffer, opening...)
	}
	s.buffer = add(s.buffer)
	_, err := s.W.Write(s.buffer)
	s.err = cmp.Or(err, then)
	return err
}
