// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import "io"

const (
	// readBuffer is the size in bytes of the buffer of a reader. It holds a whole message of the
	// greatest size. Copying a block out of it costs less than the system calls do that would put
	// the block where it belongs. It has firstBuffer until more comes at a time: servers of
	// thousands of clients get short requests.
	readBuffer, firstBuffer = 1 << 17, 1 << 13
	// halfPage is where memory for messages begins to be used. Where the source of a copy and its
	// destination are at the same place within a page of 4 KiB, as those of whole blocks mostly
	// are, processors take twice as long.
	halfPage = 2 << 10
)

// reader reads messages from a stream. It must not be used by several goroutines at a time.
type reader struct {
	conn   io.Reader
	buffer []byte
	start  int // of what is not consumed
	end    int
}

// newReader returns a reader for messages of at most MessageSize bytes.
func newReader(conn io.Reader) *reader { return &reader{conn: conn, buffer: make([]byte, firstBuffer)} }

// next returns the next message if all of it is in the buffer; it never waits. The head alone may
// be there before, and ok is then false. The body is valid until the next call of fill. Its errors
// are those of ParseHead, but for ErrShortHead.
func (r *reader) next() (head Head, body []byte, ok bool, err error) {
	head, err = ParseHead(r.buffer[r.start:r.end], MessageSize)
	switch {
	case err == ErrShortHead:
		return Head{}, nil, false, nil
	case err != nil:
		return Head{}, nil, false, err
	}
	if head.Size+head.Length > r.end-r.start {
		return head, nil, false, nil
	}
	at := r.start + head.Size
	r.start = at + head.Length
	return head, r.buffer[at:r.start:r.start], true, nil
}

// part returns how many bytes of a message have been read whose rest is due.
func (r *reader) part() int { return r.end - r.start }

// fill waits for more bytes. It returns io.EOF if the stream ends between messages,
// io.ErrUnexpectedEOF if it ends within one, and the errors of the connection.
func (r *reader) fill() error {
	switch {
	case r.start == r.end:
		r.start, r.end = halfPage, halfPage
	case len(r.buffer)-r.end < len(r.buffer)/2:
		to := r.buffer
		if len(to) < readBuffer {
			to = make([]byte, 4*len(to))
		}
		copy(to, r.buffer[r.start:r.end])
		r.buffer, r.start, r.end = to, 0, r.end-r.start
	}
	n, err := r.conn.Read(r.buffer[r.end:])
	r.end += n
	switch {
	case n > 0:
		return nil
	case err == nil:
		return io.ErrNoProgress
	case err == io.EOF && r.part() > 0:
		return io.ErrUnexpectedEOF
	}
	return err
}
