// SPDX-License-Identifier: GPL-3.0-or-later

package reuse

import (
	"bytes"
	"cmp"
	"debug/elf"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"math/bits"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// Some files hold more than hashes that follows from hashes: checksums of what has been rewritten.
// Each repair knows one such format. It is sure of what it does, as the checksum in the old file
// must be the one that it would have computed; if not, it does nothing.

// errGo is why an item is not rewritten: what identifies a program of Go is computed from all that
// it was built with.
var errGo = errors.New("a Go program cannot be made for other references")

// A workshop is what repairs work with.
type workshop struct {
	store    string
	old, new string // names of the items
	foreign  bool   // other references change than that to itself
	table    *Replacer
	debug    func() []string // names of the items that may be the output "debug" of both items
	unread   int64           // bytes that may still be read, see mayRead
}

// What repairs may read for checksums: so many bytes, and so many times as many as the item has.
// Each checksum counts for leastRead at least. Whoever has built an item may have put in any number
// of checksums of the same bytes.
const (
	leastSummed  = 64 << 20
	summedFactor = 16
	leastRead    = 4 << 10
)

var errSummed = errors.New("too many checksums of the same bytes")

// mayRead returns an error if repairs have read too much to read so many bytes more.
func (w *workshop) mayRead(size int64) error {
	if w.unread -= max(size, leastRead); w.unread < 0 {
		return errSummed
	}
	return nil
}

// repairs returns the patches of a file of the old item, by offset. path is below the item.
func (w *workshop) repairs(f io.ReaderAt, path string, size int64) ([]patch, error) {
	var head [16]byte
	if n, err := f.ReadAt(head[:], 0); err != nil && (err != io.EOF || n == 0) {
		return nil, Unexpected(err)
	}
	switch {
	case string(head[:4]) == elf.ELFMAG:
		return w.elf(f, path)
	case strings.HasSuffix(path, ".pyc") && head[2] == '\r' && head[3] == '\n':
		return w.python(head, path)
	case string(head[:4]) == zipLocal:
		return w.zip(f, size)
	}
	return nil, nil
}

// crc returns the CRC-32 of a part of a file, before and after rewriting.
func (w *workshop) crc(f io.ReaderAt, start, size int64) (old, new uint32, err error) {
	if err := w.mayRead(size); err != nil {
		return 0, 0, err
	}
	part := io.NewSectionReader(f, start, size)
	s := w.table.stream(part, size)
	for b, err := range s.pieces() {
		if err != nil {
			return 0, 0, err
		}
		new = crc32.Update(new, crc32.IEEETable, b)
	}
	if !s.changed {
		return new, new, nil
	}
	h := crc32.NewIEEE()
	_, err = io.Copy(h, io.LimitReader(part, size)) // which takes no more memory than that
	return h.Sum32(), new, err
}

// elf makes the CRC of a debug link anew: that of the file with what has been stripped (GDB manual,
// "Debugging Information in Separate Files").
func (w *workshop) elf(f io.ReaderAt, path string) ([]patch, error) {
	order, sections := elfSections(f)
	if _, ok := sections[".note.go.buildid"]; ok && w.foreign {
		return nil, errGo
	}
	link, ok := sections[".gnu_debuglink"]
	if !ok || link.Type == uint32(elf.SHT_NOBITS) || link.Size < 8 || link.Size > 4<<10 {
		return nil, nil
	}
	data := part(f, int64(link.Off), int(link.Size))
	name, _, ok := bytes.Cut(data, []byte{0})
	at := (len(name) + 4) &^ 3 // behind the NUL, aligned
	if !ok || at+4 > len(data) || nar.CheckName(string(name)) != nil {
		return nil, nil
	}
	old := order.Uint32(data[at:])
	sum, ok := w.debugCRC(path, string(name), old)
	if !ok || sum == old {
		return nil, nil
	}
	order.PutUint32(data[at:], sum)
	return []patch{{int64(link.Off) + int64(at), data[at : at+4]}}, nil
}

// maxELF bounds the table of the sections of a program and that of their names, in bytes.
const maxELF = 1 << 20

// elfSections returns the byte order of an ELF file, and the sections that repairs look for, by
// name (System V ABI, "Object Files"). Package debug/elf would decompress the table of names, into
// memory, however long it becomes.
func elfSections(f io.ReaderAt) (order binary.ByteOrder, found map[string]elf.Section64) {
	head := part(f, 0, binary.Size(elf.Header64{}))
	if head == nil {
		return nil, nil // it only begins like one
	}
	if order = binary.LittleEndian; head[elf.EI_DATA] == byte(elf.ELFDATA2MSB) {
		order = binary.BigEndian
	}
	// Files of 32 bits have the same members in the same order, but addresses and lengths of four
	// bytes.
	word, long := 8, order.Uint64
	if head[elf.EI_CLASS] == byte(elf.ELFCLASS32) {
		word, long = 4, func(b []byte) uint64 { return uint64(order.Uint32(b)) }
	}
	short := func(i int) int { return int(order.Uint16(head[34+3*word+2*i:])) }
	size := max(short(0), 8+4*word)
	count := min(short(1), maxELF/size)
	table := part(f, int64(long(head[24+2*word:])), size*count)
	section := func(i int) (s elf.Section64) {
		if i < count && table != nil {
			b := table[i*size:]
			s = elf.Section64{Name: order.Uint32(b), Type: order.Uint32(b[4:]), Off: long(b[8+2*word:]), Size: long(b[8+3*word:])}
		}
		return s
	}
	names := section(short(2))
	text := part(f, int64(names.Off), int(min(names.Size, maxELF)))
	found = map[string]elf.Section64{}
	for i := range count {
		s := section(i)
		for _, name := range []string{".note.go.buildid", ".gnu_debuglink"} {
			if int64(s.Name) < int64(len(text)) && bytes.HasPrefix(text[s.Name:], []byte(name+"\x00")) {
				found[name] = s
			}
		}
	}
	return order, found
}

// part reads a part of a file; it is nil if there are not so many bytes.
func part(f io.ReaderAt, offset int64, length int) []byte {
	b := make([]byte, length)
	if n, _ := f.ReadAt(b, offset); n < length {
		return nil
	}
	return b
}

// debugCRC returns the CRC of the new debug file of the given name of the file at file: of the very
// file if there is one already, else of the old one, whose CRC is old, after rewriting. They are
// where Guix puts them (guix/build/gnu-build-system.scm: strip).
func (w *workshop) debugCRC(file, name string, old uint32) (uint32, bool) {
	directory := path.Dir(file)
	debugItems := w.debug()
	for _, item := range debugItems {
		if f, size, err := OpenRegular(path.Join(w.store, item, "lib/debug", w.store, w.new, directory, name)); err == nil {
			defer f.Close()
			sum, _, err := w.crc(f, 0, size)
			return sum, err == nil
		}
	}
	for _, item := range append(slices.Clip(debugItems), w.old) {
		f, size, err := OpenRegular(path.Join(w.store, item, "lib/debug", w.store, w.old, directory, name))
		if err != nil {
			continue
		}
		was, is, err := w.crc(f, 0, size)
		f.Close()
		if err == nil && was == old {
			return is, true
		}
	}
	return 0, false
}

// maxSource bounds the source of a compiled file, in bytes.
const maxSource = 4 << 20

// python makes the hash of the source anew that is in a compiled file (PEP 552). The key is the
// magic number of the file; later versions of Python compute SipHash-1-3, earlier ones SipHash-2-4.
func (w *workshop) python(head [16]byte, file string) ([]patch, error) {
	if binary.LittleEndian.Uint32(head[4:])&1 == 0 {
		return nil, nil // it has the time and the length of the source
	}
	directory, name := path.Split(file)
	name, _, _ = strings.Cut(name, ".")
	f, size, err := OpenRegular(path.Join(w.store, w.old, strings.TrimSuffix(directory, "__pycache__/"), name+".py"))
	if err != nil {
		return nil, nil
	}
	defer f.Close()
	if size > maxSource || w.mayRead(size) != nil {
		return nil, nil
	}
	source := part(f, 0, int(size))
	key := uint64(binary.LittleEndian.Uint32(head[:]))
	old := binary.LittleEndian.Uint64(head[8:])
	for _, rounds := range [][2]int{{1, 3}, {2, 4}} {
		if sipHash(rounds, key, source) != old {
			continue
		}
		if _, changed := w.table.rewrite(source, len(source)); changed {
			return []patch{{8, binary.LittleEndian.AppendUint64(nil, sipHash(rounds, key, source))}}, nil
		}
	}
	return nil, nil
}

// sipHash computes SipHash with the given rounds for each word and at the end, and a key of 8 bytes
// and zeros (Aumasson and Bernstein, "SipHash: a fast short-input PRF").
func sipHash(rounds [2]int, key uint64, b []byte) uint64 {
	v := [4]uint64{key ^ 0x736f6d6570736575, 0x646f72616e646f6d, key ^ 0x6c7967656e657261, 0x7465646279746573}
	mix := func(n int) {
		for range n {
			v[0] += v[1]
			v[2] += v[3]
			v[1] = bits.RotateLeft64(v[1], 13) ^ v[0]
			v[3] = bits.RotateLeft64(v[3], 16) ^ v[2]
			v[0] = bits.RotateLeft64(v[0], 32) + v[3]
			v[2] += v[1]
			v[1] = bits.RotateLeft64(v[1], 17) ^ v[2]
			v[3] = bits.RotateLeft64(v[3], 21) ^ v[0]
			v[2] = bits.RotateLeft64(v[2], 32)
		}
	}
	last := uint64(len(b)) << 56
	for ; len(b) >= 8; b = b[8:] {
		word := binary.LittleEndian.Uint64(b)
		v[3] ^= word
		mix(rounds[0])
		v[0] ^= word
	}
	for i, c := range b {
		last |= uint64(c) << (8 * i)
	}
	v[3] ^= last
	mix(rounds[0])
	v[0] ^= last
	v[2] ^= 0xff
	mix(rounds[1])
	return v[0] ^ v[1] ^ v[2] ^ v[3]
}

// Signatures of the records of a zip file (APPNOTE.TXT of PKWARE, 4.3).
const (
	zipLocal      = "PK\x03\x04"
	zipDescriptor = "PK\x07\x08"
	zipCentral    = "PK\x01\x02"
	zipEnd        = "PK\x05\x06"
	zipEndLen     = 22
	// maxZip and maxCentral bound a file that is repaired and its directory, in bytes.
	maxZip     = 256 << 20
	maxCentral = 8 << 20
)

// zip makes the CRCs of members anew that are stored as they are.
func (w *workshop) zip(f io.ReaderAt, size int64) ([]patch, error) {
	if size < zipEndLen || size > maxZip {
		return nil, nil
	}
	start, directory := zipDirectory(f, size)
	var patches []patch
	for rest := directory; len(rest) >= 46 && string(rest[:4]) == zipCentral; {
		le := binary.LittleEndian
		length := 46 + int(le.Uint16(rest[28:])) + int(le.Uint16(rest[30:])) + int(le.Uint16(rest[32:]))
		at := start + int64(len(directory)-len(rest))
		if le.Uint16(rest[10:]) == 0 { // stored
			patches = append(patches, w.member(f, size, rest[:46], at)...)
		}
		rest = rest[min(length, len(rest)):]
	}
	slices.SortFunc(patches, func(a, b patch) int { return cmp.Compare(a.offset, b.offset) })
	return patches, nil
}

// zipDirectory returns the central directory and where it is; none of a file that has no such
// thing.
func zipDirectory(f io.ReaderAt, size int64) (start int64, directory []byte) {
	length := min(size, zipEndLen+1<<16-1) // there may be a comment
	tail := part(f, size-length, int(length))
	i := bytes.LastIndex(tail, []byte(zipEnd))
	if i < 0 || i+zipEndLen > len(tail) {
		return 0, nil
	}
	length, start = int64(binary.LittleEndian.Uint32(tail[i+12:])), int64(binary.LittleEndian.Uint32(tail[i+16:]))
	if length > maxCentral || start > size-length {
		return 0, nil
	}
	return start, part(f, start, int(length))
}

// member returns the patches of one member, of which header is the entry of the directory at the
// offset at.
func (w *workshop) member(f io.ReaderAt, size int64, header []byte, at int64) []patch {
	le := binary.LittleEndian
	crc, length, offset := le.Uint32(header[16:]), int64(le.Uint32(header[20:])), int64(le.Uint32(header[42:]))
	local := part(f, offset, 30)
	if local == nil || string(local[:4]) != zipLocal {
		return nil
	}
	data := offset + int64(len(local)) + int64(le.Uint16(local[26:])) + int64(le.Uint16(local[28:]))
	if length == 0 || data > size-length {
		return nil
	}
	old, new, err := w.crc(f, data, length)
	if err != nil || old != crc || new == old {
		return nil
	}
	sum := le.AppendUint32(nil, new)
	patches := []patch{{at + 16, sum}}
	if le.Uint32(local[14:]) == crc {
		patches = append(patches, patch{offset + 14, sum})
	}
	// What follows a member whose CRC was not known before it.
	if descriptor := part(f, data+length, 8); descriptor != nil && le.Uint16(local[6:])&8 != 0 {
		i := int64(0)
		if string(descriptor[:4]) == zipDescriptor {
			i = 4
		}
		if le.Uint32(descriptor[i:]) == crc {
			patches = append(patches, patch{data + length + i, sum})
		}
	}
	return patches
}

// OpenRegular opens a regular file and returns its length. Whoever has built an item may have put
// links into it, or a pipe; so no link in the path, which must be clean, is followed, and nothing
// is waited for.
func OpenRegular(path string) (*os.File, int64, error) {
	// Without O_LARGEFILE, which only OpenAt adds itself, a kernel of 32 bits opens none above 2 GiB.
	const flags = unix.O_RDONLY | unix.O_LARGEFILE | unix.O_NOFOLLOW | unix.O_NONBLOCK
	fd, err := files.OpenResolved(unix.AT_FDCWD, path, flags, unix.RESOLVE_NO_SYMLINKS)
	if err == unix.ENOSYS {
		var real string
		if real, err = filepath.EvalSymlinks(path); err == nil && real != path {
			err = unix.ELOOP
		}
		if err == nil {
			fd, err = files.OpenAt(unix.AT_FDCWD, path, flags, 0)
		}
	}
	if err != nil {
		return nil, 0, err
	}
	f := os.NewFile(uintptr(fd), path)
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("no regular file")
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, info.Size(), nil
}
