// SPDX-License-Identifier: GPL-3.0-or-later

package erisfs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
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

// EncodeIndex returns the index with the given entries, in any order, in its only encoding. Their
// capabilities must be valid; what else is wrong with them, [Decode] finds.
func EncodeIndex(entries []Entry) []byte {
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
	return e.Capability.AppendBinary(b)
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

// IndexLength is the length of the longest index that is accepted, in bytes. An index is read into
// memory, so this bounds the memory that somebody can make us use who publishes one. A path may
// take more in an index than in an archive, where directories are written once.
func (l Limits) IndexLength() int64 {
	return int64(min(1<<20+4*min(l.NarSize, maxIndex), plainIndex+l.NarSize/narPerIndex, maxIndex))
}

// Decode reads an index. It accepts only what Encode writes: the deterministic encoding, keys
// strictly ascending, nothing behind it; and only trees that can be restored: names and targets are
// those of package nar and UTF-8, paths differ, and none is in another one that is a file or a
// link. Errors name the offset or the path of the fault.
//
// The caller has bounded the length of b by [Limits.IndexLength], and must not change b any more:
// the index keeps it.
func Decode(b []byte, limits Limits) (*Index, error) {
	d := &decoder{b: b}
	begin := d.index(min(limits.NarSize/leastNarEntry+1, maxEntries))
	if d.err != nil {
		return nil, fmt.Errorf("malformed ERIS-FS index: at byte %d: %w", d.pos, d.err)
	}
	directories, err := order(b, begin)
	// A few long paths can be the tree of millions of directories.
	if most := limits.NarSize/leastNarDirectory + 1; err == nil && directories > most {
		err = fmt.Errorf("%d directories, where an archive of %d bytes has at most %d", directories, limits.NarSize, most)
	}
	if err != nil {
		return nil, fmt.Errorf("malformed ERIS-FS index: %w", err)
	}
	return &Index{text: b, begin: begin}, nil
}

// A decoder reads CBOR items from b.
type decoder struct {
	b   []byte
	pos int
	err error // the first one
}

// fail notes the first error, after which nothing is left to read.
func (d *decoder) fail(format string, a ...any) {
	if d.err == nil {
		d.err = fmt.Errorf(format, a...)
	}
	d.b = d.b[:d.pos]
}

// index reads everything and returns where the entries begin.
func (d *decoder) index(most uint64) []uint32 {
	d.expect(majorTag, indexTag, "the tag of an index")
	d.expect(majorArray, 2, "an array of two items")
	d.expect(majorUint, version, "version 1")
	count := d.head(majorMap)
	if count > most {
		d.fail("%d entries, where an archive of this length has at most %d", count, most)
		return nil
	}
	// Not by count alone: each entry takes some bytes that must be there.
	begins := make([]uint32, 0, min(count, uint64(len(d.b)-d.pos)/leastEntry+1))
	var last []byte
	for range count {
		begin := d.pos
		var e Entry
		d.key(&e)
		key := d.b[begin:d.pos]
		if last != nil && bytes.Compare(last, key) >= 0 {
			d.fail("path %.300q is not after the one before", e.Path)
		}
		last = key
		d.value(&e)
		if d.err != nil {
			return nil
		}
		begins = append(begins, uint32(begin))
	}
	if d.pos != len(d.b) {
		d.fail("%d bytes behind the index", len(d.b)-d.pos)
	}
	return begins
}

// leastEntry is the length of the shortest entry, that of a link with a path and a target of one
// letter.
const leastEntry = 7

// key reads a path.
func (d *decoder) key(e *Entry) {
	// Unconfirmed: that keys are arrays of names in all implementations.
	if d.pos < len(d.b) && d.b[d.pos]>>5 == majorText {
		d.fail("a path is a text string, where an array of names is expected")
	}
	count := d.head(majorArray)
	if count > nar.MaxDepth+1 {
		d.fail("path of %d names", count)
		return
	}
	// Unconfirmed: an empty path for an item that is no directory.
	var path strings.Builder
	for i := range count {
		if i > 0 {
			path.WriteByte('/')
		}
		name := d.text(nar.MaxName)
		path.WriteString(name)
		if err := nar.CheckName(name); err != nil {
			d.fail("path %.300q: %w", path.String(), err)
			return
		}
	}
	if e.Path = path.String(); len(e.Path) > nar.MaxPath {
		d.fail("path of %d bytes is longer than %d", len(e.Path), nar.MaxPath)
	}
}

// knownHead returns the number in a head that has been read before and is that of a key or of a
// name, and where it ends.
func knownHead(text []byte, pos int) (n, end int) {
	switch info := int(text[pos] & 0x1f); info {
	case 24:
		return int(text[pos+1]), pos + 2
	case 25:
		return int(binary.BigEndian.Uint16(text[pos+1:])), pos + 3
	default:
		return info, pos + 1
	}
}

// value reads what is at a path.
func (d *decoder) value(e *Entry) {
	if d.err != nil {
		return
	}
	d.expect(majorArray, 2, "an array of two items")
	switch kind := d.head(majorUint); kind {
	case kindFile, kindExecutable:
		e.Kind, e.Executable = nar.Regular, kind == kindExecutable
		d.expect(majorTag, eris.CBORTagReadCapability, "the tag of a read capability")
		d.expect(majorBytes, eris.ReadCapabilitySize, "a read capability of 66 bytes")
		if b := d.take(eris.ReadCapabilitySize); d.err == nil {
			d.err = e.Capability.UnmarshalBinary(b)
		}
	case kindSymlink:
		e.Kind, e.Target = nar.Symlink, d.text(nar.MaxTarget)
		if d.err == nil {
			d.err = nar.CheckTarget(e.Target)
		}
	default:
		d.fail("entries of kind %d are not understood", kind)
	}
	if d.err != nil {
		d.err = fmt.Errorf("entry %.300q: %w", e.Path, d.err)
	}
}

// head reads the head of an item of the given major type, in its shortest form.
func (d *decoder) head(major byte) uint64 {
	first := d.take(1)
	if first == nil {
		return 0
	}
	info := first[0] & 0x1f
	switch {
	case first[0]>>5 != major:
		d.pos--
		d.fail("an item of major type %d, where %d is expected", first[0]>>5, major)
		return 0
	case info < 24:
		return uint64(info)
	case info > 27:
		d.fail("an item of additional information %d", info)
		return 0
	}
	size := uint64(1) << (info - 24)
	var n uint64
	for _, c := range d.take(size) {
		n = n<<8 | uint64(c)
	}
	if least := [4]uint64{24, 1 << 8, 1 << 16, 1 << 32}[info-24]; n < least {
		d.fail("the number %d in %d bytes is not in its shortest form", n, size)
	}
	return n
}

// expect reads a head that must be this one.
func (d *decoder) expect(major byte, n uint64, what string) {
	failed := d.err != nil
	got := d.head(major)
	switch {
	case failed:
	case d.err != nil:
		d.err = fmt.Errorf("%s is expected: %w", what, d.err)
	case got != n:
		d.fail("%d, where %s is expected", got, what)
	}
}

func (d *decoder) text(limit uint64) string {
	n := d.head(majorText)
	if n > limit {
		d.fail("text of %d bytes, longer than %d", n, limit)
		return ""
	}
	b := d.take(n)
	if !utf8.Valid(b) {
		d.fail("text %.300q is not UTF-8", b)
	}
	return string(b)
}

// take returns the next n bytes.
func (d *decoder) take(n uint64) []byte {
	if uint64(len(d.b)-d.pos) < n {
		d.fail("%w", io.ErrUnexpectedEOF)
		return nil
	}
	b := d.b[d.pos:][:n]
	d.pos += int(n)
	return b
}
