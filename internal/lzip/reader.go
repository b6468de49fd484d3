// SPDX-License-Identifier: GPL-3.0-or-later

package lzip

import (
	"io"
	"runtime"
)

// Options change how a [Reader] works. The zero value is right for most.
type Options struct {
	// MaxDictionary is the largest dictionary size accepted, in bytes;
	// [DefaultMaxDictionary] if 0. It bounds the window, which takes memory only
	// as data arrive.
	MaxDictionary int
	// Workers is how many members may be decoded at the same time; as many as Go
	// uses processors if 0. With 1 the Reader has no goroutines.
	Workers int
	// Lookahead bounds the memory, in bytes, for members that are decoded ahead,
	// compressed and decompressed; [DefaultLookahead] if 0. Members that do not
	// fit are decoded one after the other, in the window alone; so are all after
	// one that takes more than a third of it when compressed.
	Lookahead int
}

// A Reader decompresses a stream of lzip members. It takes data with Next, Read
// or WriteTo, which may be mixed, and must be closed. It is not safe for
// concurrent use.
//
// A Reader has no goroutines while it decodes the first member, or the only one,
// which is the usual case. If more members follow, these are decoded on several
// processors.
//
// A member's last piece comes after its trailer has been checked; what was handed
// out before is what the compressed data say, but not known to be whole.
//
// The errors are io.EOF after the last member, io.ErrUnexpectedEOF where the data
// end inside of a member or before the first, errors with [ErrFormat] or
// [ErrDictionary] in their chain, and those of the source as they are. An error
// is final.
type Reader struct {
	options Options
	feed    feed
	d       *decoder
	open    bool  // d is inside of a member
	members int   // how many were decoded
	skip    int64 // bytes of the member in d that were handed out before

	jobs     []*job // the members decoded ahead, in order
	leastJob int    // bytes; a constant but for tests

	piece []byte // what Read has not taken yet
	err   error
}

// NewReader returns a Reader of r. It reads from r only when data are asked for,
// in the goroutine that asks, and may read more of r than the members need.
func NewReader(r io.Reader, options Options) *Reader {
	if options.MaxDictionary == 0 {
		options.MaxDictionary = DefaultMaxDictionary
	}
	if options.Workers == 0 {
		options.Workers = runtime.GOMAXPROCS(0)
	}
	if options.Lookahead == 0 {
		options.Lookahead = DefaultLookahead
	}
	z := &Reader{options: options, feed: feed{src: r}, d: new(decoder), leastJob: leastJob}
	z.d.init(&z.feed)
	return z
}

// Next returns the next piece of the data. It is never empty, belongs to the
// Reader, must not be changed, and is there until the next call of any method.
func (z *Reader) Next() ([]byte, error) {
	if p := z.piece; len(p) > 0 {
		z.piece = nil
		return p, nil
	}
	if z.err != nil {
		return nil, z.err
	}
	p, err := z.next()
	if err != nil {
		z.err = err
		z.free()
	}
	return p, err
}

// Read implements io.Reader.
func (z *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if len(z.piece) == 0 {
		piece, err := z.Next()
		if err != nil {
			return 0, err
		}
		z.piece = piece
	}
	n := copy(p, z.piece)
	z.piece = z.piece[n:]
	return n, nil
}

// WriteTo implements io.WriterTo: it writes all the data, or up to an error, to w
// without copying them.
func (z *Reader) WriteTo(w io.Writer) (int64, error) {
	var written int64
	for {
		p, err := z.Next()
		if err == io.EOF {
			return written, nil
		}
		if err != nil {
			return written, err
		}
		n, err := w.Write(p)
		written += int64(n)
		if err != nil {
			return written, err
		}
	}
}

// Close ends all goroutines of the Reader, waits for them, and gives its memory
// back, the last piece of Next included. It does not close the source. It returns
// nil, and may be called again.
func (z *Reader) Close() error {
	z.err = errClosed
	z.free()
	return nil
}

func (z *Reader) free() {
	z.piece = nil
	z.stopJobs()
	z.d.close()
	z.feed.data = rope{}
}

func (z *Reader) next() ([]byte, error) {
	for {
		switch {
		case len(z.jobs) > 0:
			p, err := z.nextOfJobs()
			if err != nil || len(p) > 0 {
				return p, err
			}

		case z.open:
			p, err := z.d.next()
			if err == io.EOF {
				z.open = false
				z.members++
			} else if err != nil {
				return nil, err
			}
			if z.skip > 0 {
				n := min(z.skip, int64(len(p)))
				z.skip -= n
				p = p[n:]
			}
			if len(p) > 0 {
				return p, nil
			}

		default:
			if z.members > 0 && z.options.Workers > 1 && z.d.size >= uint64(z.leastJob) {
				if err := z.lookAhead(); err != nil {
					return nil, err
				}
				if len(z.jobs) > 0 {
					continue
				}
			}
			err := z.d.begin(z.options.MaxDictionary, 0)
			if err == io.EOF && z.members == 0 {
				return nil, io.ErrUnexpectedEOF
			}
			if err != nil {
				return nil, err
			}
			z.open = true
		}
	}
}
