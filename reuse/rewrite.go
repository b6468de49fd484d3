// SPDX-License-Identifier: GPL-3.0-or-later

package reuse

import (
	"encoding/binary"
	"io"
	"math/bits"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

const (
	hashLen = 32 // characters of a hash in the name of a store item
	// filterMultiplier spreads the first eight characters of a hash over a filter.
	filterMultiplier = 0x9e3779b97f4a7c15
)

// alphabet tells which bytes are digits of a hash: those of nix-base32.
var alphabet = func() (set [256]bool) {
	for _, c := range []byte("0123456789abcdfghijklmnpqrsvwxyz") {
		set[c] = true
	}
	return set
}()

// A pair is the full names of an old item and of the new one that takes its place.
type pair struct{ old, new string }

// renamed reports whether what follows the hashes differs too.
func (p pair) renamed() bool { return p.old[hashLen:] != p.new[hashLen:] }

// A table is what is replaced: hashes of old items, wherever they stand, by those of new ones, and,
// where names differ, the old name behind the hash by the new one. A hash may be written in bytes,
// or in the characters of UTF-16 or UTF-32 (as Guix, guix/build/graft.scm:
// replace-store-references). Of matches that overlap the first one counts. A table is safe for
// concurrent use.
type table struct {
	pairs  map[[hashLen]byte]pair
	filter []uint64 // bits, by the first eight characters
	shift  int
	span   int        // bytes of the longest match
	found  func(pair) // told about each match if not nil
}

func newTable(pairs []pair) *table {
	size := max(12, bits.Len(uint(16*len(pairs))))
	t := &table{
		pairs:  make(map[[hashLen]byte]pair, len(pairs)),
		filter: make([]uint64, 1<<size/64),
		shift:  64 - size,
		span:   4*(hashLen-1) + 1,
	}
	for _, p := range pairs {
		key := [hashLen]byte([]byte(p.old))
		t.pairs[key] = p
		i := t.bit(key[:])
		t.filter[i/64] |= 1 << (i % 64)
		if p.renamed() {
			t.span = max(t.span, 4*(len(p.old)-1)+1)
		}
	}
	return t
}

func (t *table) bit(b []byte) uint64 {
	return binary.LittleEndian.Uint64(b) * filterMultiplier >> t.shift
}

// A match is a hash that has been found: its first byte and how far apart its characters are.
type match struct {
	start, stride int
	pair          pair
}

// next returns the first match that starts at from or later, but before limit, and ends in b.
//
// It looks at a window of as many bytes as a hash has. A byte in it that is no digit excludes every
// hash that would have to hold it, so the window moves behind the last such byte: most bytes are
// not looked at. It never moves by more than its length; so there is a window inside of each hash
// in wider characters, whose last bytes give it away.
func (t *table) next(b []byte, from, limit int) (match, bool) {
	for p := from; p+hashLen <= len(b) && p < limit+hashLen; {
		last := b[p+hashLen-1]
		if last != 0 && !alphabet[last] {
			p += hashLen
			continue
		}
		if wideDigits(binary.LittleEndian.Uint64(b[p+hashLen-8:])) {
			for i := max(from, p-hashLen+1); i <= p && i < limit; i++ {
				if m, ok := t.wide(b, i); ok {
					return m, true
				}
			}
		}
		if last == 0 {
			p += hashLen
			continue
		}
		j := p + hashLen - 2
		for j >= p && alphabet[b[j]] {
			j--
		}
		if j >= p {
			p = j + 1
			continue
		}
		m, ok, end := t.run(b, p, limit)
		if ok {
			return m, true
		}
		p = end + 1
	}
	return match{}, false
}

// run looks for a hash in the run of digits at p, which is long enough for one. Without one it
// returns the end of the run or where it stopped for the limit.
func (t *table) run(b []byte, p, limit int) (m match, ok bool, end int) {
	for end = p + hashLen; p < limit; p, end = p+1, end+1 {
		if i := t.bit(b[p:]); t.filter[i/64]>>(i%64)&1 != 0 {
			if pair, ok := t.pairs[[hashLen]byte(b[p:end])]; ok {
				return match{p, 1, pair}, true, 0
			}
		}
		if end == len(b) || !alphabet[b[end]] {
			break
		}
	}
	return match{}, false, end
}

// wideDigits reports whether eight bytes may be inside of a hash in the characters of UTF-16 or
// UTF-32.
func wideDigits(w uint64) bool {
	const low = 0x00ff00ff00ff00ff
	if w&low == 0 {
		w >>= 8
	}
	if w == 0 || w&^low != 0 {
		return false
	}
	a, b, c, d := byte(w), byte(w>>16), byte(w>>32), byte(w>>48)
	return (a|c == 0 || alphabet[a] && alphabet[c]) && (b|d == 0 || alphabet[b] && alphabet[d])
}

// wide returns the match of wider characters that starts at i.
func (t *table) wide(b []byte, i int) (match, bool) {
	if !alphabet[b[i]] || i+2 >= len(b) || b[i+1] != 0 {
		return match{}, false
	}
	stride := 2
	if b[i+2] == 0 {
		stride = 4
	}
	var key [hashLen]byte
	for k := range key {
		c, ok := character(b, i+k*stride, stride, k == 0)
		if !ok {
			return match{}, false
		}
		key[k] = c
	}
	pair, ok := t.pairs[key]
	return match{i, stride, pair}, ok
}

// character returns the character at i, if nothing but zeros is between it and the one before.
func character(b []byte, i, stride int, first bool) (byte, bool) {
	if i >= len(b) {
		return 0, false
	}
	for k := i - stride + 1; k < i && !first; k++ {
		if b[k] != 0 {
			return 0, false
		}
	}
	return b[i], true
}

// replace puts the new hash in the place of the old one, and the new name if the old one follows.
// It returns the end.
func (m match) replace(b []byte) (end int) {
	n := hashLen
	if m.pair.renamed() && m.named(b) {
		n = len(m.pair.old)
	}
	for k := range n {
		b[m.start+k*m.stride] = m.pair.new[k]
	}
	return m.start + (n-1)*m.stride + 1
}

// named reports whether the old name follows the hash.
func (m match) named(b []byte) bool {
	for k := hashLen; k < len(m.pair.old); k++ {
		if c, ok := character(b, m.start+k*m.stride, m.stride, false); !ok || c != m.pair.old[k] {
			return false
		}
	}
	return true
}

// rewrite replaces all matches in b that start before limit. It returns the end of what is final
// then, and whether there were any.
func (t *table) rewrite(b []byte, limit int) (end int, changed bool) {
	for {
		m, ok := t.next(b, end, limit)
		if !ok {
			return max(end, limit), changed
		}
		end, changed = m.replace(b), true
		if t.found != nil {
			t.found(m.pair)
		}
	}
}

// text is s with all matches replaced.
func (t *table) text(s string) string {
	if len(s) < hashLen {
		return s
	}
	b := []byte(s)
	t.rewrite(b, len(b))
	return string(b)
}

// A patch is bytes that a file has at an offset when its hashes have been replaced.
type patch struct {
	offset int64
	bytes  []byte
}

// apply puts the part of the patch into b that belongs there: b is what the file has at an offset.
func (p patch) apply(b []byte, offset int64) {
	for i, c := range p.bytes {
		if k := p.offset + int64(i) - offset; k >= 0 && k < int64(len(b)) {
			b[k] = c
		}
	}
}

// A stream is the contents of a file, or of a part of one, rewritten piece by piece.
type stream struct {
	table   *table
	pool    *nar.Pool
	file    io.ReaderAt
	start   int64 // of the part in the file
	size    int64
	piece   int // bytes that are read at once, at most [nar.PieceSize]
	patches []patch

	offset  int64  // in the part, of the next piece
	carry   []byte // read, but not final
	changed bool   // a match has been replaced
}

// next returns the next piece, owned by the caller, and io.EOF after the last. What might be the
// beginning of a match that ends in the next piece is left to that.
func (s *stream) next() (nar.Chunk, error) {
	if s.offset == s.size {
		return nar.Chunk{}, io.EOF
	}
	c := s.pool.Get()
	n := int(min(int64(s.piece), s.size-s.offset))
	c.Bytes = c.Bytes[:n]
	known := copy(c.Bytes, s.carry)
	if _, err := s.file.ReadAt(c.Bytes[known:], s.start+s.offset+int64(known)); err != nil {
		c.Release()
		return nar.Chunk{}, unexpected(err)
	}
	limit := n
	if s.offset+int64(n) < s.size {
		limit = n - s.table.span + 1
	}
	end, changed := s.table.rewrite(c.Bytes, limit)
	s.changed = s.changed || changed
	s.carry = append(s.carry[:0], c.Bytes[end:]...)
	c.Bytes = c.Bytes[:end]
	for _, p := range s.patches {
		p.apply(c.Bytes, s.offset)
	}
	s.offset += int64(end)
	return c, nil
}

// each calls f with all pieces, until done tells that no more are wanted; a nil done is never.
func (s *stream) each(f func([]byte), done func() bool) error {
	for done == nil || !done() {
		c, err := s.next()
		if err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		f(c.Bytes)
		c.Release()
	}
	return nil
}

// unexpected is the error of a file that has become shorter.
func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
