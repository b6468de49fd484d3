// SPDX-License-Identifier: GPL-3.0-or-later

package dump

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// The tags of a dump (IANA registry of CBOR tags): self-described CBOR, and a block dump.
const (
	tagSelfDescribed = 55799
	tagDump          = 1701996915
)

// The major types of CBOR (RFC 8949, section 3.1).
const (
	majorUnsigned = iota
	majorNegative
	majorBytes
	majorText
	majorArray
	majorMap
	majorTag
	majorSimple
)

const (
	// maxDepth is how deep things that are no blocks may be nested.
	maxDepth = 16
	// maxCapabilities is how many read capabilities are kept.
	maxCapabilities = 1 << 16
)

// FormatError says where a dump is not a dump.
type FormatError struct {
	Offset int64 // in bytes
	Err    error // io.ErrUnexpectedEOF if the dump is cut off
	// Length is that of a stream that is cut off, in bytes; less than Offset if something in it
	// claims to be longer.
	Length int64
}

// Error returns a text with the offset.
func (e *FormatError) Error() string { return fmt.Sprintf("block dump, byte %d: %v", e.Offset, e.Err) }

// Unwrap returns Err.
func (e *FormatError) Unwrap() error { return e.Err }

var (
	errNotDump  = errors.New("this is not a block dump")
	errReserved = errors.New("reserved length")
	errBreak    = errors.New("end of something that has not begun")
	errChunk    = errors.New("wrong part of a string")
	errDepth    = errors.New("nested too deep")
)

// parser reads a sequence of dumps. It passes over the bytes of blocks without reading them, and
// allocates nothing according to lengths that are in the dump.
type parser struct {
	file   io.ReaderAt
	size   int64
	offset int64
	window [8 << 10]byte // what has been read of the file
	from   int64         // where in the file that is
	length int           // and how many bytes

	state  state
	array  counter // of the elements left of the present dump
	blocks counter // of the pairs left of its map
	left   int     // how many bytes of the block have not been passed over

	dumps        int
	skipped      int64 // pairs and elements that are none of a dump
	capabilities []eris.ReadCapability
	more         bool // there were more capabilities than are kept

	end    ending // of the present dump, or of the last one if there is no more
	before ending // of the dump before that
}

// ending is where and how a dump could be continued.
type ending struct {
	tail       int64 // where the map ends: the offset of its end, or of what is not whole
	end        int64 // where the dump ends; 0 if it is cut off
	appendable bool  // array and map are of indefinite length, and have nothing in them that is not kept
	first      int   // how many capabilities there were before this dump
	last       int   // and after it
}

type state uint8

const (
	stateStart  state = iota // before a dump, or at the end
	stateBlocks              // in the map
	stateAfter               // behind the map
)

// counter counts the elements that are to come.
type counter struct {
	left       uint64
	indefinite bool
}

// location is where a block is in a dump.
type location struct {
	ref    eris.Reference
	offset int64
	size   int
}

// next goes to the next block, of which it parses all but the bytes, which may be cut off. It
// returns io.EOF at the end, or a *FormatError, or an error of the input.
func (p *parser) next() (location, error) {
	if err := p.discard(uint64(p.left)); err != nil {
		return location{}, err
	}
	p.left = 0
	for {
		var err error
		switch p.state {
		case stateStart:
			err = p.start()
		case stateBlocks:
			p.end.tail = p.offset
			var l location
			if l, err = p.pair(); l.size > 0 && err == nil {
				p.left = l.size
				return l, nil
			}
		case stateAfter:
			err = p.element()
		}
		if err != nil {
			return location{}, err
		}
	}
}

// peek returns the next bytes, a few; [io.EOF] says that there are not as many.
func (p *parser) peek(n int) ([]byte, error) {
	if p.offset < p.from || p.offset+int64(n) > p.from+int64(p.length) {
		read, err := p.file.ReadAt(p.window[:max(0, min(int64(len(p.window)), p.size-p.offset))], p.offset)
		if err != nil && err != io.EOF && read < n {
			return nil, err
		}
		p.from, p.length = p.offset, read
	}
	at := int(p.offset - p.from)
	if at+n > p.length {
		return nil, io.EOF
	}
	return p.window[at : at+n], nil
}

func (p *parser) wrong(err error) error { return &FormatError{Offset: p.offset, Err: err} }

// cut returns the error for an input that ends too early, unless it failed otherwise.
func (p *parser) cut(err error) error {
	if err == io.EOF {
		return p.wrong(io.ErrUnexpectedEOF)
	}
	return err
}

// head is the beginning of a data item: its major type and argument.
type head struct {
	major      byte
	value      uint64
	indefinite bool // of the majors that can be; of majorSimple, the end of something
}

func (p *parser) head() (head, error) {
	b, err := p.peek(1)
	if err != nil {
		return head{}, p.cut(err)
	}
	h := head{major: b[0] >> 5}
	size := 1
	switch info := b[0] & 31; {
	case info < 24:
		h.value = uint64(info)
	case info < 28:
		n := 1 << (info - 24)
		size += n
		if b, err = p.peek(size); err != nil {
			return head{}, p.cut(err)
		}
		var value [8]byte
		copy(value[8-n:], b[1:size])
		h.value = binary.BigEndian.Uint64(value[:])
	case info < 31:
		return head{}, p.wrong(errReserved)
	default:
		if h.major == majorUnsigned || h.major == majorNegative || h.major == majorTag {
			return head{}, p.wrong(errReserved)
		}
		h.indefinite = true
	}
	p.offset += int64(size)
	return h, nil
}

func (p *parser) discard(n uint64) error {
	if n > uint64(p.size-p.offset) {
		p.offset = p.size
		return p.wrong(io.ErrUnexpectedEOF)
	}
	p.offset += int64(n)
	return nil
}

func (p *parser) start() error {
	if p.dumps > 0 {
		if _, err := p.peek(1); err != nil {
			return err
		}
	}
	err := p.opening()
	if format, ok := errors.AsType[*FormatError](err); ok && format.Err != io.ErrUnexpectedEOF {
		return p.wrong(errNotDump)
	}
	return err
}

func (p *parser) opening() error {
	h, err := p.head()
	for _, tag := range []uint64{tagSelfDescribed, tagDump} {
		if err == nil && h.major == majorTag && h.value == tag {
			h, err = p.head()
		}
	}
	if err != nil {
		return err
	}
	if h.major != majorArray || h.value == 0 && !h.indefinite {
		return p.wrong(errNotDump)
	}
	p.array = counter{h.value - 1, h.indefinite}
	if h, err = p.head(); err != nil {
		return err
	}
	if h.major != majorMap {
		return p.wrong(errNotDump)
	}
	p.blocks = counter{h.value, h.indefinite}
	p.state = stateBlocks
	p.dumps++
	p.before = p.end
	n := len(p.capabilities)
	p.end = ending{tail: p.offset, appendable: p.array.indefinite && p.blocks.indefinite, first: n, last: n}
	return nil
}

// ends reads what comes before an element of something, and reports whether it has no more;
// otherwise it returns the head of the element.
func (p *parser) ends(c *counter) (h head, ended bool, err error) {
	if !c.indefinite {
		if c.left == 0 {
			return head{}, true, nil
		}
		c.left--
	}
	h, err = p.head()
	if err != nil || h.major != majorSimple || !h.indefinite {
		return h, false, err
	}
	if !c.indefinite {
		return h, false, p.wrong(errBreak)
	}
	return h, true, nil
}

// pair reads a pair of the map up to the bytes of its block. If it is none of a dump, the location
// is zero.
func (p *parser) pair() (location, error) {
	h, ended, err := p.ends(&p.blocks)
	if err != nil {
		return location{}, err
	}
	if ended {
		p.state = stateAfter
		return location{}, nil
	}
	var l location
	isBlock := h.major == majorBytes && !h.indefinite && h.value == uint64(len(l.ref))
	if isBlock {
		b, err := p.peek(len(l.ref))
		if err != nil {
			return location{}, p.cut(err)
		}
		copy(l.ref[:], b)
	}
	if err := p.skip(h, 0); err != nil {
		return location{}, err
	}
	if h, err = p.head(); err != nil {
		return location{}, err
	}
	isSize := h.value == uint64(eris.BlockSize1KiB) || h.value == uint64(eris.BlockSize32KiB)
	if isBlock && isSize && h.major == majorBytes && !h.indefinite {
		l.offset, l.size = p.offset, int(h.value)
		return l, nil
	}
	p.skipped++
	return location{}, p.skip(h, 0)
}

// element reads an element of the array behind the map, which should be a read capability.
func (p *parser) element() error {
	h, ended, err := p.ends(&p.array)
	if err != nil {
		return err
	}
	if ended {
		p.end.end = p.offset
		p.state = stateStart
		return nil
	}
	if h.major == majorTag && h.value == eris.CBORTagReadCapability {
		if h, err = p.head(); err != nil {
			return err
		}
		if h.major == majorBytes && !h.indefinite && h.value == eris.ReadCapabilitySize {
			return p.capability()
		}
	}
	p.skipped++
	p.end.appendable = false
	return p.skip(h, 0)
}

func (p *parser) capability() error {
	b, err := p.peek(eris.ReadCapabilitySize)
	if err != nil {
		return p.cut(err)
	}
	p.offset += eris.ReadCapabilitySize
	var c eris.ReadCapability
	switch err := c.UnmarshalBinary(b); {
	case err != nil:
		p.skipped++
		p.end.appendable = false
	case len(p.capabilities) == maxCapabilities:
		p.more = true
		p.end.appendable = false
	default:
		p.capabilities = append(p.capabilities, c)
		p.end.last = len(p.capabilities)
	}
	return nil
}

func (p *parser) skip(h head, depth int) error {
	if depth > maxDepth {
		return p.wrong(errDepth)
	}
	switch h.major {
	case majorBytes, majorText:
		if !h.indefinite {
			return p.discard(h.value)
		}
		for c := (counter{indefinite: true}); ; {
			part, ended, err := p.ends(&c)
			if err != nil || ended {
				return err
			}
			if part.major != h.major || part.indefinite {
				return p.wrong(errChunk)
			}
			if err := p.discard(part.value); err != nil {
				return err
			}
		}
	case majorArray, majorMap:
		for c := (counter{h.value, h.indefinite}); ; {
			element, ended, err := p.ends(&c)
			if err != nil || ended {
				return err
			}
			if err := p.skip(element, depth+1); err != nil {
				return err
			}
			if h.major == majorMap {
				if err := p.item(depth + 1); err != nil {
					return err
				}
			}
		}
	case majorTag:
		return p.item(depth + 1)
	case majorSimple:
		if h.indefinite {
			return p.wrong(errBreak)
		}
	}
	return nil
}

func (p *parser) item(depth int) error {
	h, err := p.head()
	if err != nil {
		return err
	}
	return p.skip(h, depth)
}
