// SPDX-License-Identifier: GPL-3.0-or-later

package erisfs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"unicode/utf8"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// The index is one CBOR item in the deterministic encoding of RFC 8949, section 4.2.1:
//
//	#6.1701996916([version: 1, {* path => entry}])
//	path  = [* tstr]
//	entry = [0, capability] / [1, capability] / [2, tstr]   ; file, executable, link
const (
	indexTag = 1701996916 // "erit"
	version  = 1

	kindFile       = 0
	kindExecutable = 1
	kindSymlink    = 2
)

// The major types of CBOR.
const (
	majorUint  = 0
	majorBytes = 2
	majorText  = 3
	majorArray = 4
	majorMap   = 5
	majorTag   = 6
)

// magic is what an index begins with.
var magic = []byte{0xda, 0x65, 0x72, 0x69, 0x74, 0x82}

// IsIndex reports whether content that begins with head, of at least 6 bytes, is an index.
func IsIndex(head []byte) bool { return bytes.HasPrefix(head, magic) }

// Encode returns the index in its only encoding. The caller must not change it.
func (x *Index) Encode() []byte { return x.text }

// encodeEntries returns the index of entries that have been checked.
func encodeEntries(entries []Entry) []byte {
	type item struct{ key, value []byte }
	items := make([]item, len(entries))
	for i := range entries {
		items[i] = item{entries[i].appendKey(nil), entries[i].appendValue(nil)}
	}
	slices.SortFunc(items, func(a, b item) int { return bytes.Compare(a.key, b.key) })
	b := appendHead(nil, majorTag, indexTag)
	b = appendHead(b, majorArray, 2)
	b = appendHead(b, majorUint, version)
	b = appendHead(b, majorMap, uint64(len(items)))
	for _, it := range items {
		b = append(append(b, it.key...), it.value...)
	}
	return b
}

func (e *Entry) appendKey(b []byte) []byte {
	if e.Path == "" {
		return appendHead(b, majorArray, 0)
	}
	b = appendHead(b, majorArray, uint64(strings.Count(e.Path, "/")+1))
	for name := range strings.SplitSeq(e.Path, "/") {
		b = appendText(b, name)
	}
	return b
}

func (e *Entry) appendValue(b []byte) []byte {
	b = appendHead(b, majorArray, 2)
	if e.Kind == nar.Symlink {
		// Unconfirmed: the target as a text string.
		b = appendHead(b, majorUint, kindSymlink)
		return appendText(b, e.Target)
	}
	kind := uint64(kindFile)
	if e.Executable {
		kind = kindExecutable
	}
	b = appendHead(b, majorUint, kind)
	// Unconfirmed: the tag of capabilities.
	b = appendHead(b, majorTag, eris.CBORTagReadCapability)
	b = appendHead(b, majorBytes, eris.ReadCapabilitySize)
	b, err := e.Capability.AppendBinary(b)
	if err != nil {
		panic(err) // NewIndex has checked it
	}
	return b
}

// appendHead appends the head of an item in its shortest form.
func appendHead(b []byte, major byte, n uint64) []byte {
	major <<= 5
	switch {
	case n < 24:
		return append(b, major|byte(n))
	case n < 1<<8:
		return append(b, major|24, byte(n))
	case n < 1<<16:
		return binary.BigEndian.AppendUint16(append(b, major|25), uint16(n))
	case n < 1<<32:
		return binary.BigEndian.AppendUint32(append(b, major|26), uint32(n))
	}
	return binary.BigEndian.AppendUint64(append(b, major|27), n)
}

func appendText(b []byte, s string) []byte {
	return append(appendHead(b, majorText, uint64(len(s))), s...)
}

// Limits bound what an index may describe.
type Limits struct {
	// NarSize is the greatest length of the archive of the tree, in bytes. Each entry takes some
	// hundred bytes of an archive beside its contents, so this bounds the number of entries, and
	// the length of the index, too.
	NarSize uint64
}

const (
	// leastNarEntry is how many bytes the shortest entry takes in an archive: that of an empty file
	// with a name of one letter. A directory takes less.
	leastNarEntry     = 184
	leastNarDirectory = 168
	// maxEntries bounds the number of entries of any index.
	maxEntries = 2 << 20
	// maxIndex bounds the length of any index, in bytes.
	maxIndex = 256 << 20
	// plainIndex is the length in bytes up to which an index may be four times as long as the
	// archive. Beyond it, an index is the more suspicious the longer it is: the archive must have
	// narPerIndex times as many bytes more. The longest that occur in Guix, those of two hundred
	// thousand files in some gigabytes, have 30 MB.
	plainIndex  = 24 << 20
	narPerIndex = 256
)

// maxEntries is the greatest number of entries.
func (l Limits) maxEntries() uint64 { return min(l.NarSize/leastNarEntry+1, maxEntries) }

// IndexLength is the length of the longest index that is accepted, in bytes. An index is read into
// memory, so this bounds the memory that somebody can make us use who publishes one. A path may
// take more in an index than in an archive, where directories are written once.
func (l Limits) IndexLength() int64 {
	return int64(min(1<<20+4*min(l.NarSize, maxIndex), plainIndex+l.NarSize/narPerIndex, maxIndex))
}

// Decode reads an index. It accepts only what Encode writes: the deterministic encoding, keys
// strictly ascending, nothing behind it; and only trees that can be restored, as [NewIndex] has it.
// Errors name the offset or the path of the fault.
//
// The caller has bounded the length of b by [Limits.IndexLength], and must not change b any more:
// the index keeps it.
func Decode(b []byte, limits Limits) (*Index, error) {
	x, err := newIndex(b, limits.NarSize)
	if err != nil {
		return nil, fmt.Errorf("malformed ERIS-FS index: %w", err)
	}
	return x, nil
}

// newIndex reads an index whose archive may have a length of narSize.
func newIndex(b []byte, narSize uint64) (*Index, error) {
	if uint64(len(b)) > math.MaxUint32 {
		return nil, fmt.Errorf("%d bytes are too many", len(b))
	}
	d := &decoder{b: b}
	begin, err := d.index(Limits{narSize}.maxEntries())
	if err != nil {
		return nil, fmt.Errorf("at byte %d: %w", d.pos, err)
	}
	directories, err := order(b, begin)
	if err != nil {
		return nil, err
	}
	// A few long paths can be the tree of millions of directories.
	if most := narSize/leastNarDirectory + 1; directories > most {
		return nil, fmt.Errorf("%d directories, where an archive of %d bytes has at most %d", directories, narSize, most)
	}
	return &Index{text: b, begin: begin}, nil
}

// A decoder reads CBOR items from b.
type decoder struct {
	b   []byte
	pos int
}

// index reads everything and returns where the entries begin.
func (d *decoder) index(most uint64) ([]uint32, error) {
	if err := d.expect(majorTag, indexTag, "the tag of an index"); err != nil {
		return nil, err
	}
	if err := d.expect(majorArray, 2, "an array of two items"); err != nil {
		return nil, err
	}
	if err := d.expect(majorUint, version, "version 1"); err != nil {
		return nil, err
	}
	count, err := d.head(majorMap)
	if err != nil {
		return nil, err
	}
	if count > most {
		return nil, fmt.Errorf("%d entries, where an archive of this length has at most %d", count, most)
	}
	// Not by count alone: each entry takes some bytes that must be there.
	begins := make([]uint32, 0, min(count, uint64(len(d.b)-d.pos)/leastEntry+1))
	var last []byte
	for range count {
		begin := d.pos
		var e Entry
		if err := d.key(&e); err != nil {
			return nil, err
		}
		key := d.b[begin:d.pos]
		if last != nil && bytes.Compare(last, key) >= 0 {
			return nil, fmt.Errorf("path %.300q is not after the one before", e.Path)
		}
		last = key
		if err := d.value(&e); err != nil {
			return nil, fmt.Errorf("entry %.300q: %w", e.Path, err)
		}
		begins = append(begins, uint32(begin))
	}
	if d.pos != len(d.b) {
		return nil, fmt.Errorf("%d bytes behind the index", len(d.b)-d.pos)
	}
	return begins, nil
}

// leastEntry is the length of the shortest entry, that of a link with a path and a target of one
// letter.
const leastEntry = 7

// key reads a path.
func (d *decoder) key(e *Entry) error {
	// Unconfirmed: that keys are arrays of names in all implementations.
	if d.pos < len(d.b) && d.b[d.pos]>>5 == majorText {
		return fmt.Errorf("a path is a text string, where an array of names is expected")
	}
	count, err := d.head(majorArray)
	if err != nil {
		return fmt.Errorf("path: %w", err)
	}
	if count > nar.MaxPath/2+1 {
		return fmt.Errorf("path of %d names", count)
	}
	// Unconfirmed: an empty path for an item that is no directory.
	var path strings.Builder
	for i := range count {
		name, err := d.text(nar.MaxName)
		if err != nil {
			return fmt.Errorf("name in a path: %w", err)
		}
		if i > 0 {
			path.WriteByte('/')
		}
		path.WriteString(name)
		if name == "" || strings.IndexByte(name, '/') >= 0 {
			return nar.CheckName(name)
		}
	}
	e.Path = path.String()
	return checkPath(e.Path)
}

// keyLength reads the head of a key that has been read before, and returns the number of its names.
func (d *decoder) keyLength() int {
	n, _ := d.head(majorArray)
	return int(n)
}

// keyName reads the next name of such a key.
func (d *decoder) keyName() []byte {
	n, _ := d.head(majorText)
	b, _ := d.take(int(n))
	return b
}

func (d *decoder) skipKey() {
	for range d.keyLength() {
		d.keyName()
	}
}

// value reads what is at a path.
func (d *decoder) value(e *Entry) error {
	if err := d.expect(majorArray, 2, "an array of two items"); err != nil {
		return err
	}
	kind, err := d.head(majorUint)
	if err != nil {
		return err
	}
	switch kind {
	case kindFile, kindExecutable:
		e.Kind, e.Executable = nar.Regular, kind == kindExecutable
		if err := d.expect(majorTag, eris.CBORTagReadCapability, "the tag of a read capability"); err != nil {
			return err
		}
		if err := d.expect(majorBytes, eris.ReadCapabilitySize, "a read capability of 66 bytes"); err != nil {
			return err
		}
		b, err := d.take(eris.ReadCapabilitySize)
		if err != nil {
			return err
		}
		return e.Capability.UnmarshalBinary(b)
	case kindSymlink:
		e.Kind = nar.Symlink
		if e.Target, err = d.text(nar.MaxTarget); err != nil {
			return err
		}
		return nar.CheckTarget(e.Target)
	}
	return fmt.Errorf("entries of kind %d are not understood", kind)
}

// head reads the head of an item of the given major type, in its shortest form.
func (d *decoder) head(major byte) (uint64, error) {
	b, err := d.take(1)
	if err != nil {
		return 0, err
	}
	if b[0]>>5 != major {
		d.pos--
		return 0, fmt.Errorf("an item of major type %d, where %d is expected", b[0]>>5, major)
	}
	info := b[0] & 0x1f
	if info < 24 {
		return uint64(info), nil
	}
	if info > 27 {
		return 0, fmt.Errorf("an item of additional information %d", info)
	}
	size := 1 << (info - 24)
	if b, err = d.take(size); err != nil {
		return 0, err
	}
	var n uint64
	for _, c := range b {
		n = n<<8 | uint64(c)
	}
	if least := [4]uint64{24, 1 << 8, 1 << 16, 1 << 32}[info-24]; n < least {
		return 0, fmt.Errorf("the number %d in %d bytes is not in its shortest form", n, size)
	}
	return n, nil
}

// expect reads a head that must be this one.
func (d *decoder) expect(major byte, n uint64, what string) error {
	got, err := d.head(major)
	if err != nil {
		return fmt.Errorf("%s is expected: %w", what, err)
	}
	if got != n {
		return fmt.Errorf("%d, where %s is expected", got, what)
	}
	return nil
}

func (d *decoder) text(limit int) (string, error) {
	n, err := d.head(majorText)
	if err != nil {
		return "", err
	}
	if n > uint64(limit) {
		return "", fmt.Errorf("text of %d bytes, longer than %d", n, limit)
	}
	b, err := d.take(int(n))
	if err != nil {
		return "", err
	}
	if !utf8.Valid(b) {
		return "", fmt.Errorf("text %.300q is not UTF-8", b)
	}
	return string(b), nil
}

// take returns the next n bytes.
func (d *decoder) take(n int) ([]byte, error) {
	if len(d.b)-d.pos < n {
		return nil, io.ErrUnexpectedEOF
	}
	b := d.b[d.pos : d.pos+n]
	d.pos += n
	return b, nil
}
