// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"errors"
	"io"
	"net"
	"sync/atomic"
	"syscall"

	"github.com/plgd-dev/go-coap/v3/message/codes"
)

const (
	// readBuffer is the size in bytes of the buffer of a Reader. It holds a whole message of the greatest size.
	readBuffer = 1 << 17
	// readAhead is how many bytes a Reader takes beyond the message it is in, when messages are large: enough for the next
	// head, but little, because it has to be copied.
	readAhead = 1 << 10
	// largeMessage is the length in bytes from which on the payload of a message is read straight to where it belongs.
	largeMessage = 8 << 10
	// optionsPeek is how many bytes of a large message are looked at first, in the hope that they hold all of its options.
	optionsPeek = 128
)

// Reader reads messages from a stream. A message is either taken as a whole from the buffer (Buffered), or, if it is large,
// in parts (Wait, Peek, ReadFull): the payload then goes straight from the socket to where it belongs. It must not be used by
// several goroutines at a time.
type Reader struct {
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

// NewReader returns a Reader for messages of at most limit bytes, which must not be above MessageSize. Dry, unless nil, is
// called when there is nothing to be read and the reader is about to wait, or might be; it must not wait itself.
func NewReader(conn net.Conn, limit int, dry func()) *Reader {
	if limit > MessageSize {
		panic("coap: limit above the buffer")
	}
	if dry == nil {
		dry = func() {}
	}
	r := &Reader{conn: conn, limit: limit, dry: dry, buffer: make([]byte, readBuffer)}
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

// Buffered returns the next message if all of it is in the buffer; it never waits. The body is valid until the next call of
// Wait, Fill, Peek or ReadFull. Its errors are those of ParseHead, but for ErrShortHead.
func (r *Reader) Buffered() (head Head, body []byte, ok bool, err error) {
	r.Skip()
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

// Wait waits for the next message: until Buffered will return it, when whole is true; or, if the message is large, until
// its head is there, whose body is then to be read by Peek and ReadFull. It returns io.EOF if the stream ends between
// messages, io.ErrUnexpectedEOF if it ends within one, the errors of ParseHead, and those of the connection; after one of
// its deadline it can be called again.
func (r *Reader) Wait() (head Head, whole bool, err error) {
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

// Within reports whether a part of a message has been read, so that the rest is due.
func (r *Reader) Within() bool { return r.rest > 0 || r.start < r.end }

// Rest returns how many bytes of the body of the message that Wait returned are still to be read.
func (r *Reader) Rest() int { return r.rest }

// Peek returns the next n bytes of the body without consuming them, fewer if the body is shorter. They are valid until the
// next call.
func (r *Reader) Peek(n int) ([]byte, error) {
	n = min(n, r.rest)
	for r.end-r.start < n {
		if err := r.fill(max(readAhead, n-(r.end-r.start))); err != nil {
			return nil, unexpected(err)
		}
	}
	return r.buffer[r.start : r.start+n], nil
}

// Response walks through the options of the body of a response, which begins where the body begins, to the payload marker or
// the end. The bytes of options are consumed, those of the payload are not. More of the body is waited for as needed.
func (r *Reader) Response(response *Response) error {
	for n := optionsPeek; ; n = r.rest {
		body, err := r.Peek(n)
		if err != nil {
			return err
		}
		options := ParseOptions(body)
		err = ParseResponse(&options, response)
		whole := len(body) == r.rest
		if !whole && (err == ErrTruncated || err == errEmptyPayload || err == nil && !options.Marker()) {
			continue
		}
		if err != nil {
			return err
		}
		r.Consume(len(body) - len(options.Payload()))
		return nil
	}
}

// Request is to requests what Response is to responses: see [Paths.ParseRequest] for what it returns. The payload is not set,
// but can be read from here on.
func (r *Reader) Request(paths *Paths, request *Request) (refuse codes.Code, err error) {
	for n := optionsPeek; ; n = r.rest {
		body, err := r.Peek(n)
		if err != nil {
			return 0, err
		}
		options := ParseOptions(body)
		for {
			if _, ok := options.Next(); !ok {
				break
			}
		}
		if len(body) < r.rest && (options.Err() == ErrTruncated || options.Err() == errEmptyPayload || options.Err() == nil && !options.Marker()) {
			continue
		}
		code := paths.ParseRequest(body, request)
		r.Consume(len(body) - len(options.Payload()))
		request.Payload = nil
		return code, nil
	}
}

// Consume consumes n bytes of what Peek returned.
func (r *Reader) Consume(n int) {
	r.start += n
	r.rest -= n
}

// ReadFull fills dst with the next bytes of the body, which must have as many. If there is an error, it returns how many
// bytes were read before; after one of the deadline, the rest can be read by a further call.
func (r *Reader) ReadFull(dst []byte) (int, error) {
	n := copy(dst, r.buffer[r.start:r.end])
	r.Consume(n)
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

// Moved returns how many bytes ReadFull has read straight from the connection since the beginning. Unlike the other methods
// it may be called by any goroutine.
func (r *Reader) Moved() int64 { return r.moved.Load() }

// Skip drops what is left of the present message as far as it is in the buffer; the rest is dropped as it comes.
func (r *Reader) Skip() {
	r.Consume(min(r.rest, r.end-r.start))
}

// skipAll waits for the rest of the present message and drops it.
func (r *Reader) skipAll() error {
	for r.Skip(); r.rest > 0; r.Skip() {
		if err := r.fill(r.rest + readAhead); err != nil {
			return unexpected(err)
		}
	}
	return nil
}

// fill reads more bytes into the buffer, at least one and at most as many as given.
func (r *Reader) fill(most int) error {
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

// readBoth reads into dst, and, if there is more, into the empty buffer. It returns how many bytes were read in all.
func (r *Reader) readBoth(dst []byte) (int, error) {
	r.start, r.end = 0, 0
	n, err := r.read(dst, r.buffer[:readAhead])
	r.end = max(0, n-len(dst))
	return n, err
}

// read reads at least one byte into first, and, when that is full and the connection can do it, into second.
func (r *Reader) read(first, second []byte) (int, error) {
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
