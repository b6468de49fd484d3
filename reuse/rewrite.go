// SPDX-License-Identifier: GPL-3.0-or-later

package reuse

import (
	"encoding/binary"
	"io"
	"iter"
	"math/bits"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

const (
	// HashLength is the number of characters of the hash in the name of a store item.
	HashLength = 32
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

// A Replacement is an old item and the new one that takes its place: the hashes of their names, of
// [HashLength] characters each, and what follows them, if that is to be replaced too.
type Replacement struct{ Old, New string }

// renamed reports whether what follows the hashes differs too.
func (r Replacement) renamed() bool { return r.Old[HashLength:] != r.New[HashLength:] }

// A Replacer replaces hashes of old items, wherever they stand, by those of new ones, and, where
// names differ, the old name behind the hash by the new one. A hash may be written in bytes, or in
// the characters of UTF-16 or UTF-32 (as Guix, guix/build/graft.scm: replace-store-references). Of
// matches that overlap the first one counts. It is safe for concurrent use.
type Replacer struct {
	pairs  map[[HashLength]byte]Replacement
	filter []uint64 // bits, by the first eight characters
	shift  int
	span   int               // bytes of the longest match
	found  func(Replacement) // told about each match if not nil
	pool   *nar.Pool
}

// NewReplacer returns a replacer. The old hashes must differ from each other.
func NewReplacer(pairs []Replacement) *Replacer {
	size := max(12, bits.Len(uint(16*len(pairs))))
	t := &Replacer{
		pairs:  make(map[[HashLength]byte]Replacement, len(pairs)),
		filter: make([]uint64, 1<<size/64),
		shift:  64 - size,
		span:   1,
		pool:   new(nar.Pool),
	}
	for _, p := range pairs {
		key := [HashLength]byte([]byte(p.Old))
		t.pairs[key] = p
		i := t.bit(key[:])
		t.filter[i/64] |= 1 << (i % 64)
		longest := HashLength
		if p.renamed() {
			longest = len(p.Old)
		}
		t.span = max(t.span, 4*(longest-1)+1)
	}
	return t
}

func (t *Replacer) bit(b []byte) uint64 {
	return binary.LittleEndian.Uint64(b) * filterMultiplier >> t.shift
}

// A match is a hash that has been found: its first byte and how far apart its characters are.
type match struct {
	start, stride int
	pair          Replacement
}

// next returns the first match that starts at from or later, but before limit, and ends in b.
//
// It looks at a window of as many bytes as a hash has. A byte in it that is no digit excludes every
// hash that would have to hold it, so the window moves behind the last such byte: most bytes are
// not looked at. It never moves by more than its length; so there is a window inside of each hash
// in wider characters, whose last bytes give it away.
func (t *Replacer) next(b []byte, from, limit int) (match, bool) {
	for p := from; p+HashLength <= len(b) && p < limit+HashLength; {
		last := b[p+HashLength-1]
		if last != 0 && !alphabet[last] {
			p += HashLength
			continue
		}
		if wideDigits(binary.LittleEndian.Uint64(b[p+HashLength-8:])) {
			for i := max(from, p-HashLength+1); i <= p && i < limit; i++ {
				if m, ok := t.wide(b, i); ok {
					return m, true
				}
			}
		}
		if last == 0 {
			p += HashLength
			continue
		}
		j := p + HashLength - 2
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
func (t *Replacer) run(b []byte, p, limit int) (m match, ok bool, end int) {
	for end = p + HashLength; p < limit; p, end = p+1, end+1 {
		if i := t.bit(b[p:]); t.filter[i/64]>>(i%64)&1 != 0 {
			if pair, ok := t.pairs[[HashLength]byte(b[p:end])]; ok {
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
func (t *Replacer) wide(b []byte, i int) (match, bool) {
	if !alphabet[b[i]] || i+2 >= len(b) || b[i+1] != 0 {
		return match{}, false
	}
	stride := 2
	if b[i+2] == 0 {
		stride = 4
	}
	var key [HashLength]byte
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
	n := HashLength
	if m.pair.renamed() && m.named(b) {
		n = len(m.pair.Old)
	}
	for k := range n {
		b[m.start+k*m.stride] = m.pair.New[k]
	}
	return m.start + (n-1)*m.stride + 1
}

// named reports whether the old name follows the hash.
func (m match) named(b []byte) bool {
	for k := HashLength; k < len(m.pair.Old); k++ {
		if c, ok := character(b, m.start+k*m.stride, m.stride, false); !ok || c != m.pair.Old[k] {
			return false
		}
	}
	return true
}

// None reports whether there is nothing to replace.
func (t *Replacer) None() bool { return len(t.pairs) == 0 }

// Replace replaces what is whole in b.
func (t *Replacer) Replace(b []byte) { t.rewrite(b, len(b)) }

// Contents returns the first size bytes of a file, rewritten, piece by piece. A file that has
// become shorter is an error.
func (t *Replacer) Contents(f io.ReaderAt, size int64) nar.Feeder { return t.stream(f, size) }

// rewrite replaces all matches in b that start before limit. It returns the end of what is final
// then, and whether there were any.
func (t *Replacer) rewrite(b []byte, limit int) (end int, changed bool) {
	for !t.None() {
		m, ok := t.next(b, end, limit)
		if !ok {
			return max(end, limit), changed
		}
		end, changed = m.replace(b), true
		if t.found != nil {
			t.found(m.pair)
		}
	}
	return limit, false
}

// text is s with all matches replaced.
func (t *Replacer) text(s string) string {
	if len(s) < HashLength {
		return s
	}
	b := []byte(s)
	t.Replace(b)
	return string(b)
}

// A patch is bytes that a file has at an offset when its hashes have been replaced.
type patch struct {
	offset int64
	bytes  []byte
}

// apply puts the part of the patch into b that belongs there: b is what the file has at an offset,
// and the patch does not begin behind it. It reports whether nothing of the patch is behind b.
func (p patch) apply(b []byte, offset int64) bool {
	at, length := p.offset-offset, int64(len(p.bytes))
	copy(b[max(0, at):], p.bytes[min(max(0, -at), length):])
	return at+length <= int64(len(b))
}

// A stream is the contents of a file, rewritten piece by piece.
type stream struct {
	table   *Replacer
	file    io.ReaderAt
	size    int64
	piece   int     // bytes that are read at once, at most [nar.PieceSize]
	patches []patch // by offset

	offset  int64  // of the next piece
	carry   []byte // read, but not final
	changed bool   // a match has been replaced
}

// stream returns the first size bytes of a file, rewritten.
func (t *Replacer) stream(f io.ReaderAt, size int64) *stream {
	return &stream{table: t, file: f, size: size, piece: nar.PieceSize}
}

// Next implements [nar.Feeder]. What might be the beginning of a match that ends in the next piece
// is left to that.
func (s *stream) Next() (nar.Chunk, error) {
	if s.offset == s.size {
		return nar.Chunk{}, io.EOF
	}
	c := s.table.pool.Get()
	n := int(min(int64(s.piece), s.size-s.offset))
	c.Bytes = c.Bytes[:n]
	known := copy(c.Bytes, s.carry)
	if _, err := s.file.ReadAt(c.Bytes[known:], s.offset+int64(known)); err != nil {
		c.Release()
		return nar.Chunk{}, Unexpected(err)
	}
	limit := n
	if s.offset+int64(n) < s.size {
		limit = n - s.table.span + 1
	}
	end, changed := s.table.rewrite(c.Bytes, limit)
	s.changed = s.changed || changed
	s.carry = append(s.carry[:0], c.Bytes[end:]...)
	c.Bytes = c.Bytes[:end]
	done := 0
	for i, p := range s.patches { // those of a damaged archive may overlap
		if p.offset >= s.offset+int64(end) {
			break
		}
		if p.apply(c.Bytes, s.offset) && done == i {
			done++
		}
	}
	s.patches = s.patches[done:]
	s.offset += int64(end)
	return c, nil
}

// pieces yields all pieces, each until the next, or an error in place of the last.
func (s *stream) pieces() iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		for {
			c, err := s.Next()
			if err == io.EOF {
				return
			}
			more := yield(c.Bytes, err)
			c.Release()
			if !more || err != nil {
				return
			}
		}
	}
}

// Unexpected is the error of what ends too early, a file that has become shorter for example.
func Unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
