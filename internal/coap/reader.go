// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"errors"
	"io"
	"net"
	"sync/atomic"
	"syscall"
)

const (
	// readBuffer is the size in bytes of the buffer of a reader. It holds a whole message of the
	// greatest size.
	readBuffer = 1 << 17
	// readAhead is how many bytes a reader takes beyond the message it is in, when messages are
	// large: enough for the next head, but little, because it has to be copied.
	readAhead = 1 << 10
	// largeMessage is the length in bytes from which on the payload of a message is read straight
	// to where it belongs.
	largeMessage = 8 << 10
	// optionsPeek is how many bytes of a large message are looked at first, in the hope that they
	// hold all of its options.
	optionsPeek = 128
)

// reader reads messages from a stream. A message is either taken as a whole from the buffer
// (buffered), or, if it is large, in parts (wait, peek, readFull): the payload then goes straight
// from the socket to where it belongs. It must not be used by several goroutines at a time.
type reader struct {
	conn   io.Reader
	raw    syscall.RawConn // nil if the connection has no vectored reads
	dry    func()
	limit  int
	buffer []byte
	start  int // of what is not consumed
	end    int
	rest   int // of the body of the present message, from start on
	large  bool
	moved  atomic.Int64

	vector [2][]byte
	n      int
	err    error
	readv  func(fd uintptr) bool
}

// newReader returns a reader for messages of at most limit bytes, which must not be above
// MessageSize. Dry, unless nil, is called when there is nothing to be read and the reader is about
// to wait, or might be; it must not wait itself.
func newReader(conn net.Conn, limit int, dry func()) *reader {
	if limit > MessageSize {
		panic("coap: limit above the buffer")
	}
	if dry == nil {
		dry = func() {}
	}
	r := &reader{conn: conn, limit: limit, dry: dry, buffer: make([]byte, readBuffer)}
	r.raw = rawConn(conn)
	r.readv = func(fd uintptr) bool {
		var again bool
		r.n, again, r.err = readVector(fd, r.vector[:])
		if again {
			r.dry()
		}
		return !again
	}
	return r
}

// buffered returns the next message if all of it is in the buffer; it never waits. The body is
// valid until the next call of wait, fill, peek or readFull. Its errors are those of ParseHead, but
// for ErrShortHead.
func (r *reader) buffered() (head Head, body []byte, ok bool, err error) {
	r.skip()
	if r.rest > 0 {
		return Head{}, nil, false, nil
	}
	head, err = ParseHead(r.buffer[r.start:r.end], r.limit)
	if err != nil {
		if err == ErrShortHead {
			err = nil
		}
		return Head{}, nil, false, err
	}
	if head.Size+head.Length > r.end-r.start {
		return Head{}, nil, false, nil
	}
	at := r.start + head.Size
	r.start = at + head.Length
	r.large = head.Length >= largeMessage
	return head, r.buffer[at:r.start:r.start], true, nil
}

// wait waits for the next message: until buffered will return it, when whole is true; or, if the
// message is large, until its head is there, whose body is then to be read by peek and readFull. It
// returns io.EOF if the stream ends between messages, io.ErrUnexpectedEOF if it ends within one,
// the errors of ParseHead, and those of the connection; after one of its deadline it can be called
// again.
func (r *reader) wait() (head Head, whole bool, err error) {
	for {
		if err := r.skipAll(); err != nil {
			return Head{}, false, err
		}
		head, err = ParseHead(r.buffer[r.start:r.end], r.limit)
		switch {
		case err == ErrShortHead:
		case err != nil:
			return Head{}, false, err
		case head.Size+head.Length <= r.end-r.start:
			return head, true, nil
		case head.Length >= largeMessage:
			r.start += head.Size
			r.rest = head.Length
			r.large = true
			return head, false, nil
		}
		most := readBuffer
		if r.large {
			most = readAhead
		}
		if err := r.fill(most); err != nil {
			if err == io.EOF && r.start < r.end {
				err = io.ErrUnexpectedEOF
			}
			return Head{}, false, err
		}
	}
}

// within reports whether a part of a message has been read, so that the rest is due.
func (r *reader) within() bool { return r.rest > 0 || r.start < r.end }

// peek returns the next n bytes of the body without consuming them, fewer if the body is shorter.
// They are valid until the next call.
func (r *reader) peek(n int) ([]byte, error) {
	n = min(n, r.rest)
	for r.end-r.start < n {
		if err := r.fill(max(readAhead, n-(r.end-r.start))); err != nil {
			return nil, unexpected(err)
		}
	}
	return r.buffer[r.start : r.start+n], nil
}

// options returns as much of the body, from its beginning, as holds all options, whatever of the
// payload has come, and where that begins. More is waited for as needed. Nothing is consumed.
func (r *reader) options() (body []byte, payload int, err error) {
	for n := optionsPeek; ; n = r.rest {
		if body, err = r.peek(n); err != nil {
			return nil, 0, err
		}
		walk := walkOptions(body)
		err := walk.skip()
		if len(body) == r.rest || err == nil && walk.marker || err != nil && err != errTruncated && err != errEmptyPayload {
			return body, len(body) - len(walk.payload()), nil
		}
	}
}

// response reads the options of a response, and consumes them, but not the payload.
func (r *reader) response(response *Response) error {
	body, payload, err := r.options()
	if err != nil {
		return err
	}
	walk := walkOptions(body)
	if err := parseResponse(&walk, response); err != nil {
		return err
	}
	r.consume(payload)
	return nil
}

// request is to requests what response is to responses.
func (r *reader) request(paths *Paths, request *Request) error {
	body, payload, err := r.options()
	if err != nil {
		return err
	}
	paths.parse(body, request)
	r.consume(payload)
	request.Payload = nil
	return nil
}

// consume consumes n bytes of what peek returned.
func (r *reader) consume(n int) {
	r.start += n
	r.rest -= n
}

// readFull fills dst with the next bytes of the body, which must have as many. If there is an
// error, it returns how many bytes were read before; after one of the deadline, the rest can be
// read by a further call.
func (r *reader) readFull(dst []byte) (int, error) {
	n := copy(dst, r.buffer[r.start:r.end])
	r.consume(n)
	for n < len(dst) {
		m, err := r.readBoth(dst[n:])
		m = min(m, len(dst)-n)
		n += m
		r.rest -= m
		r.moved.Add(int64(m))
		if err != nil {
			return n, unexpected(err)
		}
	}
	return n, nil
}

// skip drops what is left of the present message as far as it is in the buffer; the rest is dropped
// as it comes.
func (r *reader) skip() {
	r.consume(min(r.rest, r.end-r.start))
}

// skipAll waits for the rest of the present message and drops it.
func (r *reader) skipAll() error {
	for r.skip(); r.rest > 0; r.skip() {
		if err := r.fill(r.rest + readAhead); err != nil {
			return unexpected(err)
		}
	}
	return nil
}

// fill reads more bytes into the buffer, at least one and at most as many as given.
func (r *reader) fill(most int) error {
	if r.start == r.end {
		r.start, r.end = 0, 0
	}
	if space := len(r.buffer) - r.end; space < most && space < len(r.buffer)/2 {
		copy(r.buffer, r.buffer[r.start:r.end])
		r.start, r.end = 0, r.end-r.start
	}
	n, err := r.read(r.buffer[r.end:min(len(r.buffer), r.end+most)], nil)
	r.end += n
	if n > 0 {
		return nil
	}
	return err
}

// readBoth reads into dst, and, if there is more, into the empty buffer. It returns how many bytes
// were read in all.
func (r *reader) readBoth(dst []byte) (int, error) {
	r.start, r.end = 0, 0
	n, err := r.read(dst, r.buffer[:readAhead])
	r.end = max(0, n-len(dst))
	return n, err
}

// read reads at least one byte into first, and, when that is full and the connection can do it,
// into second.
func (r *reader) read(first, second []byte) (int, error) {
	if r.raw == nil {
		r.dry()
		n, err := r.conn.Read(first)
		if n > 0 {
			return n, nil
		}
		if err == nil {
			err = io.ErrNoProgress
		}
		return 0, err
	}
	r.vector[0], r.vector[1] = first, second
	err := r.raw.Read(r.readv)
	r.vector[0], r.vector[1] = nil, nil
	if err == nil {
		err = r.err
	}
	if err != nil {
		return 0, err
	}
	if r.n == 0 {
		return 0, io.EOF
	}
	return r.n, nil
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// rawConn returns the descriptor behind a connection if bytes may be read from it directly.
func rawConn(conn net.Conn) syscall.RawConn {
	if !haveVectors {
		return nil
	}
	switch c := conn.(type) {
	case *net.UnixConn:
		if raw, err := c.SyscallConn(); err == nil {
			return raw
		}
	case *net.TCPConn:
		if raw, err := c.SyscallConn(); err == nil {
			return raw
		}
	}
	return nil
}
