// SPDX-License-Identifier: GPL-3.0-or-later

package lzip

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"sync"
	"sync/atomic"
)

// Where a member ends is known only when it has been decoded: its size stands at
// its end. To decode several members at a time, their ends are guessed: a member
// ends where another header follows and where the size that would be in its
// trailer is the distance from its beginning. That finds all true ends, and
// finds no false ones but in data made for it.
//
// What is guessed is never trusted. Each candidate is decoded by itself and has to
// turn out to be exactly one member. If one does not, the guesses behind it are
// thrown away, and the stream is decoded one member after the other from where
// that candidate begins; the source's bytes are kept until then.

// DefaultLookahead is the memory, in bytes, for members that are decoded ahead
// unless [Options] say otherwise. With that, and the window of lzip -9, the whole
// process takes less than 64 MiB. Members of plzip fit unless its level is above 6.
const DefaultLookahead = 24 << 20

const (
	// leastMember is the size in bytes of a header, the least LZMA stream and a
	// trailer.
	leastMember = headerSize + 5 + trailerSize
	blockSize   = 256 << 10 // bytes read ahead at a time

	// leastJob is how many bytes of data a member must have for a goroutine and a
	// decoder of its own to be worth their cost. What follows a smaller member is
	// taken to be small too, so that a stream of tiny ones costs no more than
	// decoding them.
	leastJob = 256 << 10
)

// errGuess says that a candidate is not one member.
var errGuess = errors.New("not a member by itself")

// A job decodes one candidate in a goroutine. Its pieces stay in the window, which
// is large enough for all of them, until they are handed out.
type job struct {
	compressed rope
	size       int // bytes of data, as the trailer has it
	taken      int64
	d          decoder
	pieces     chan outcome // has room for all
	cancelled  atomic.Bool
	done       sync.WaitGroup
}

type outcome struct {
	piece []byte
	err   error
}

func (j *job) cost() int { return j.compressed.size + j.size }

func (j *job) run(maxDictionary int) {
	defer func() {
		// In the goroutine of the Reader's user it can be contained.
		if fault := recover(); fault != nil {
			j.pieces <- outcome{err: errGuess}
		}
	}()
	j.d.init(&feed{data: j.compressed.clone(), err: io.EOF})
	err := j.d.begin(maxDictionary, j.size+pieceSize)
	for err == nil {
		var p []byte
		p, err = j.d.next()
		switch {
		case j.cancelled.Load(), j.d.size > uint64(j.size):
			p, err = nil, errGuess
		case err == io.EOF && j.d.inOff+int64(j.d.ip) != int64(j.compressed.size):
			err = errGuess
		}
		if len(p) > 0 {
			j.pieces <- outcome{piece: p}
		}
	}
	j.pieces <- outcome{err: err}
}

func (j *job) stop() {
	j.cancelled.Store(true)
	j.done.Wait()
	j.d.close()
}

// lookAhead starts jobs for the members that follow, if their ends can be found.
// Otherwise there are none afterwards. It returns io.EOF if no member follows.
func (z *Reader) lookAhead() error {
	err := z.d.need(headerSize)
	if err == io.ErrUnexpectedEOF && z.d.available() == 0 {
		return io.EOF
	}
	if err != nil {
		return err
	}
	z.feed.unread(z.d.in[z.d.ip:z.d.inEnd])
	z.d.init(&z.feed)
	// The first job alone; the others while there is nothing to hand out.
	for len(z.jobs) == 0 && z.start() {
	}
	if len(z.jobs) > 0 {
		z.d.close() // jobs have windows of their own
	}
	return nil
}

// mayStart says whether another job is wanted.
func (z *Reader) mayStart() bool { return len(z.jobs) < z.options.Workers }

// start reads ahead, for one block at most, and starts a job if the end of
// a member is found. It returns false if there is no use in calling it again
// before a job has ended.
func (z *Reader) start() bool {
	held := 0
	for _, j := range z.jobs {
		held += j.cost()
	}
	room := z.options.Lookahead - held
	end := z.feed.findEnd()
	if end < 0 {
		if z.feed.err != nil {
			return false
		}
		if most := z.options.Lookahead / 3; z.feed.data.size+blockSize > min(room, most) {
			if z.feed.data.size+blockSize > most {
				// The members that follow will be as large. What was read for
				// nothing would be memory beside the window.
				z.options.Workers = 1
			}
			return false
		}
		z.feed.readAhead()
		return true
	}
	size := z.feed.data.uint64(end - 16)
	if size < uint64(z.leastJob) || size > uint64(room) || end+int(size) > room {
		return false
	}
	j := &job{
		compressed: z.feed.data.cut(end),
		size:       int(size),
		pieces:     make(chan outcome, int(size)/leastPiece+3),
	}
	z.feed.scanned = 0
	z.jobs = append(z.jobs, j)
	j.done.Go(func() { j.run(z.options.MaxDictionary) })
	return true
}

// nextOfJobs returns the next piece of the first job, or none if that has
// ended.
func (z *Reader) nextOfJobs() ([]byte, error) {
	j := z.jobs[0]
	for {
		var o outcome
		select {
		case o = <-j.pieces:
		default:
			// There is nothing to hand out: the time to read ahead.
			if z.mayStart() && z.start() {
				continue
			}
			o = <-j.pieces
		}
		switch o.err {
		case nil:
			j.taken += int64(len(o.piece))
			return o.piece, nil
		case io.EOF:
			z.members++
			j.stop()
			z.jobs = z.jobs[1:]
			// A processor has nothing to do. The bytes for it have to be
			// read anyway.
			for z.mayStart() && z.start() {
			}
			return nil, nil
		default:
			return nil, z.decodeSerially()
		}
	}
}

// decodeSerially gives up guessing: it goes back to the beginning of the first
// job's candidate, which is the beginning of a member, and goes on with one
// member after the other.
func (z *Reader) decodeSerially() error {
	z.options.Workers = 1
	z.skip = z.jobs[0].taken
	var data rope
	for _, j := range z.jobs {
		data.append(j.compressed)
	}
	data.append(z.feed.data)
	z.stopJobs()
	z.feed.data = data
	z.d.init(&z.feed)
	if err := z.d.begin(z.options.MaxDictionary, 0); err != nil {
		return err
	}
	z.open = true
	return nil
}

func (z *Reader) stopJobs() {
	for _, j := range z.jobs {
		j.cancelled.Store(true)
	}
	for _, j := range z.jobs {
		j.stop()
	}
	z.jobs = nil
}

// A feed is a source with what was read ahead of it.
type feed struct {
	data    rope
	scanned int // no end of a member is before this position of data
	src     io.Reader
	err     error // what src has ended with
}

// Read implements io.Reader.
func (f *feed) Read(p []byte) (int, error) {
	if f.data.size > 0 {
		return f.data.read(p), nil
	}
	if f.err != nil {
		return 0, f.err
	}
	n, err := f.src.Read(p)
	f.err = err
	return n, err
}

// unread puts a copy of p before the data.
func (f *feed) unread(p []byte) {
	f.data.prepend(bytes.Clone(p))
	f.scanned = 0
}

// readAhead reads some bytes, a block at most.
func (f *feed) readAhead() {
	for idle := 0; f.err == nil; {
		b := f.data.room()
		n, err := f.src.Read(b)
		f.data.extend(n)
		f.err = err
		if n > 0 {
			return
		}
		if idle++; idle == 100 && err == nil {
			f.err = io.ErrNoProgress
		}
	}
}

// findEnd returns the size in bytes of the candidate that data begin with, or -1
// if its end is not found.
func (f *feed) findEnd() int {
	r := &f.data
	isSize := func(end int) bool {
		return end >= leastMember && r.uint64(end-8) == uint64(end)
	}
	for {
		at := r.index(max(f.scanned, leastMember))
		if at < 0 {
			f.scanned = max(f.scanned, r.size-len(magic)) // one may begin there
			break
		}
		f.scanned = at
		if at+headerSize > r.size {
			break
		}
		var code [1]byte
		r.at(code[:], at+headerSize-1)
		if _, ok := parseDictionary(code[0]); ok && isSize(at) {
			return at
		}
		f.scanned = at + 1
	}
	if f.err == io.EOF && isSize(r.size) {
		return r.size
	}
	return -1
}

// A rope is a string of bytes in several parts, which it never changes. A rope that
// is used twice must be cloned.
type rope struct {
	parts [][]byte
	size  int
}

func (r *rope) clone() rope { return rope{slices.Clone(r.parts), r.size} }

func (r *rope) append(s rope) {
	r.parts = append(r.parts, s.parts...)
	r.size += s.size
}

func (r *rope) prepend(p []byte) {
	if len(p) == 0 {
		return
	}
	p = p[:len(p):len(p)]
	r.parts = append([][]byte{p}, r.parts...)
	r.size += len(p)
}

// room returns memory after the last byte, for extend.
func (r *rope) room() []byte {
	if n := len(r.parts); n > 0 {
		if last := r.parts[n-1]; len(last) < cap(last) {
			return last[len(last):cap(last)]
		}
	}
	r.parts = append(r.parts, make([]byte, 0, blockSize))
	return r.parts[len(r.parts)-1][:blockSize]
}

// extend adds the first n bytes of what room has returned.
func (r *rope) extend(n int) {
	last := &r.parts[len(r.parts)-1]
	*last = (*last)[:len(*last)+n]
	r.size += n
}

// cut takes the first n bytes away and returns them.
func (r *rope) cut(n int) rope {
	head := rope{size: n}
	for n > 0 {
		p := r.parts[0]
		if len(p) > n {
			head.parts = append(head.parts, p[:n:n])
			r.parts[0] = p[n:]
			break
		}
		head.parts = append(head.parts, p[:len(p):len(p)])
		r.parts = r.parts[1:]
		n -= len(p)
	}
	r.size -= head.size
	return head
}

// read takes bytes away into p.
func (r *rope) read(p []byte) int {
	n := min(len(p), r.size)
	r.at(p[:n], 0)
	r.cut(n)
	return n
}

// at copies the bytes from position i on; all of p must be there.
func (r *rope) at(p []byte, i int) {
	for _, part := range r.parts {
		if i >= len(part) {
			i -= len(part)
			continue
		}
		n := copy(p, part[i:])
		p, i = p[n:], 0
		if len(p) == 0 {
			return
		}
	}
}

func (r *rope) uint64(i int) uint64 {
	var b [8]byte
	r.at(b[:], i)
	return binary.LittleEndian.Uint64(b[:])
}

// index returns where the magic is found first at from or after, or -1.
func (r *rope) index(from int) int {
	base := 0
	for _, part := range r.parts {
		end := base + len(part)
		if from < end {
			if i := bytes.Index(part[max(from-base, 0):], []byte(magic)); i >= 0 {
				return max(from, base) + i
			}
			// It may begin in this part and end in another one.
			for i := max(from, base, end-len(magic)+1); i < end && i+len(magic) <= r.size; i++ {
				var b [len(magic)]byte
				if r.at(b[:], i); string(b[:]) == magic {
					return i
				}
			}
		}
		base = end
	}
	return -1
}
