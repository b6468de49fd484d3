// SPDX-License-Identifier: GPL-3.0-or-later

package delta

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/klauspost/compress/zstd"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/reuse"
)

// ReadOptions say how a [Reader] works.
type ReadOptions struct {
	// MaxSize bounds the sum of the sizes of all files, in bytes.
	MaxSize uint64
	// Link names the files of the base that are the same in the new item, see [nar.Node.Same].
	Link bool
}

// A Reader is the new item as [nar.Nodes]. It needs about 40 MiB of memory at most, whatever the
// delta says. Whatever is wrong with the delta or the base is an error of Next or Contents, or
// shows in the hash of what it yields. It is not safe for concurrent use.
type Reader struct {
	ctx      context.Context
	o        ReadOptions
	body     *bufio.Reader
	base     string // links lead to the directory that it is in, but not to it
	replacer *reuse.Replacer
	copier   *reuse.Replacer // of nothing
	zstd     *zstd.Decoder   // of the index
	index    *bufio.Reader
	frames   *zstd.Decoder
	pool     nar.Pool // of parts of pieces
	failed   error

	last    []string // the name of the last entry of each open directory
	started bool
	sum     uint64 // of the sizes of files

	file contents

	frame, dictionary, piece []byte
}

// contents is the file under way.
type contents struct {
	path    string
	left    uint64     // bytes that have not been read or decoded
	old     *os.File   // nil without a base
	oldSize uint64     // in bytes
	feeder  nar.Feeder // of what is not in frames
	rest    []byte     // of the piece
}

// NewReader begins to read a delta, which body has and nothing else. The base is the file or
// directory of that name; it is not followed if it is a link. The caller must call Close, and stop
// a body that may wait for long. Reading stops when ctx is done.
func NewReader(ctx context.Context, body io.Reader, base string, o ReadOptions) (*Reader, error) {
	r := &Reader{ctx: ctx, o: o, body: bufio.NewReaderSize(body, 32<<10), copier: reuse.NewReplacer(nil)}
	if err := r.open(base); err != nil {
		r.Close()
		return nil, fmt.Errorf("delta: %w", err)
	}
	return r, nil
}

// Close lets go of what is open.
func (r *Reader) Close() {
	r.drop()
	for _, z := range []*zstd.Decoder{r.zstd, r.frames} {
		if z != nil {
			z.Close()
		}
	}
	r.failed = errors.Join(r.failed, os.ErrClosed)
}

// open reads what stands before the first node.
func (r *Reader) open(base string) error {
	var head [headerSize]byte
	if _, err := io.ReadFull(r.body, head[:]); err != nil {
		return reuse.Unexpected(err)
	}
	rest, ok := strings.CutPrefix(string(head[:]), magic)
	switch {
	case !ok:
		return errors.New("it does not begin like one")
	case rest[0] != version || rest[1] != encoder:
		return fmt.Errorf("version %d with encoder %d is not understood", rest[0], rest[1])
	}
	length := binary.LittleEndian.Uint32(head[headerSize-4:])
	if length > maxIndex {
		return fmt.Errorf("index of %d bytes", length)
	}
	index := new(bytes.Buffer)
	if _, err := io.CopyN(index, r.body, int64(length)); err != nil {
		return reuse.Unexpected(err)
	}
	var err error
	// It would decompress a short buffer as a whole, whatever comes of that.
	r.zstd, err = zstd.NewReader(struct{ io.Reader }{index}, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(indexWindow))
	if err != nil {
		return err
	}
	r.index = bufio.NewReader(r.zstd)
	r.frames, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderMaxWindow(1<<30))
	if err != nil {
		return err
	}
	if err := r.replacements(); err != nil {
		return fmt.Errorf("index: %w", err)
	}
	r.base, err = openBase(base)
	return err
}

// replacements reads the beginning of the index.
func (r *Reader) replacements() error {
	n, err := readUvarint(r.index)
	if err != nil {
		return err
	}
	if n > maxReplacements {
		return fmt.Errorf("%d hashes to replace", n)
	}
	var list []reuse.Replacement
	before := ""
	for range n {
		var b [2 * reuse.HashLength]byte
		if _, err := io.ReadFull(r.index, b[:]); err != nil {
			return reuse.Unexpected(err)
		}
		x := reuse.Replacement{Old: string(b[:reuse.HashLength]), New: string(b[reuse.HashLength:])}
		if !isHash(x.Old) || !isHash(x.New) || x.Old <= before {
			return fmt.Errorf("bad replacement of %q by %q", x.Old, x.New)
		}
		before = x.Old
		list = append(list, x)
	}
	r.replacer = reuse.NewReplacer(list)
	return nil
}

// Next implements [nar.Nodes].
func (r *Reader) Next() (nar.Node, error) {
	if r.failed == nil {
		r.failed = r.skip()
	}
	if r.failed != nil {
		return nar.Node{}, r.failed
	}
	r.drop()
	n, err := r.next()
	if err != nil {
		if err != io.EOF {
			err = fmt.Errorf("delta: %w", err)
		}
		r.failed = err
	}
	return n, err
}

// drop lets go of the file under way.
func (r *Reader) drop() {
	if r.file.old != nil {
		r.file.old.Close()
	}
	r.file = contents{}
}

// skip passes over what is left of the frames of the file under way.
func (r *Reader) skip() error {
	for r.file.left > 0 && r.file.feeder == nil {
		c, err := r.Contents()
		if err != nil {
			return err
		}
		c.Release()
	}
	return nil
}

func (r *Reader) next() (nar.Node, error) {
	if err := r.ctx.Err(); err != nil {
		return nar.Node{}, err
	}
	if r.started && len(r.last) == 0 {
		return nar.Node{}, r.end()
	}
	n, kind, err := r.node()
	if err != nil {
		return n, fmt.Errorf("index: %w", err)
	}
	switch kind {
	case kindEnd:
		r.last = r.last[:len(r.last)-1]
	case kindDirectory:
		r.last = append(r.last, "")
	case kindRegular, kindExecutable:
		err = r.begin(&n)
	}
	r.started = true
	return n, err
}

// end checks that there is nothing behind the root.
func (r *Reader) end() error {
	if _, err := r.index.ReadByte(); err == nil {
		return errors.New("index: more than one root")
	} else if err != io.EOF {
		return fmt.Errorf("index: %w", err)
	}
	_, err := r.body.ReadByte()
	if err == nil {
		err = errors.New("bytes behind the last frame")
	}
	return err
}

// node reads a node but for the contents of a file.
func (r *Reader) node() (n nar.Node, kind byte, err error) {
	if kind, err = r.index.ReadByte(); err != nil {
		return n, kind, reuse.Unexpected(err)
	}
	if int(kind) >= len(kinds) || kind == kindEnd && len(r.last) == 0 {
		return n, kind, fmt.Errorf("node of kind %d", kind)
	}
	n.Kind, n.Executable = kinds[kind], kind == kindExecutable
	if kind != kindEnd && len(r.last) > 0 {
		if n.Name, err = r.name(); err != nil {
			return n, kind, err
		}
	}
	switch n.Kind {
	case nar.Symlink:
		if n.Target, err = readString(r.index, nar.MaxTarget); err == nil {
			err = nar.CheckTarget(n.Target)
		}
	case nar.Regular:
		n.Size, err = readUvarint(r.index)
		if err == nil && n.Size > r.o.MaxSize-r.sum {
			err = fmt.Errorf("files of more than %d bytes", r.o.MaxSize)
		}
		r.sum += n.Size
	}
	return n, kind, err
}

// name reads the name of an entry.
func (r *Reader) name() (string, error) {
	name, err := readString(r.index, nar.MaxName)
	if err == nil {
		err = nar.CheckName(name)
	}
	last := &r.last[len(r.last)-1]
	if err == nil && name <= *last {
		err = fmt.Errorf("entry %q after %q", name, *last)
	}
	*last = name
	if err == nil && len(r.path()) > nar.MaxPath { // bounds the depth too
		err = fmt.Errorf("path of entry %q is longer than %d bytes", name, nar.MaxPath)
	}
	return name, err
}

// path returns where the last entry is, below the root.
func (r *Reader) path() string { return strings.Join(r.last, "/") }

// begin begins with a file.
func (r *Reader) begin(n *nar.Node) error {
	r.file.path = r.path()
	if n.Size == 0 {
		return nil
	}
	var from string
	m, err := readUvarint(r.index)
	switch {
	case err == nil && m > uint64(methodNew):
		err = fmt.Errorf("method %d", m)
	case err == nil && method(m) != methodNew:
		from, err = readString(r.index, nar.MaxPath)
	}
	if err != nil {
		return fmt.Errorf("index: file %q: %w", r.file.path, err)
	}
	r.file.left = n.Size
	if method(m) == methodNew {
		return nil
	}
	from = cmp.Or(from, r.file.path)
	if r.file.old, r.file.oldSize, err = openFile(r.base, from); err != nil {
		return err
	}
	if method(m) == methodPatch {
		return nil
	}
	if r.file.oldSize != n.Size {
		return fmt.Errorf("file %q of %s has %d bytes instead of %d", from, r.base, r.file.oldSize, n.Size)
	}
	replacer := r.replacer
	if method(m) == methodCopy {
		replacer = r.copier
		if r.o.Link {
			n.Same = r.file.old
		}
	}
	r.file.feeder = replacer.Contents(r.file.old, int64(n.Size))
	return nil
}

// Contents implements [nar.Nodes].
func (r *Reader) Contents() (nar.Chunk, error) {
	f := &r.file
	if r.failed != nil {
		return nar.Chunk{}, r.failed
	}
	if f.left == 0 && len(f.rest) == 0 {
		return nar.Chunk{}, io.EOF
	}
	err := r.ctx.Err()
	var c nar.Chunk
	if err == nil {
		if f.feeder == nil {
			c, err = r.decoded()
		} else if c, err = f.feeder.Next(); err == nil {
			f.left -= uint64(len(c.Bytes))
		}
	}
	if err != nil {
		r.failed = fmt.Errorf("delta: file %q: %w", f.path, reuse.Unexpected(err))
	}
	return c, r.failed
}

// decoded returns a part of a piece.
func (r *Reader) decoded() (nar.Chunk, error) {
	f := &r.file
	if len(f.rest) == 0 {
		n := int(min(pieceSize, f.left))
		if err := r.decode(n); err != nil {
			return nar.Chunk{}, err
		}
		f.left -= uint64(n)
		f.rest = r.piece
	}
	c := r.pool.Get()
	c.Bytes = c.Bytes[:copy(c.Bytes, f.rest)]
	f.rest = f.rest[len(c.Bytes):]
	return c, nil
}

// decode makes the next piece, of n bytes.
func (r *Reader) decode(n int) error {
	p, err := r.pieceEntry(n)
	if err != nil {
		return err
	}
	if r.file.old != nil {
		if r.dictionary, err = readFull(io.NewSectionReader(r.file.old, int64(p.offset), int64(p.length)), int(p.length), r.dictionary); err != nil {
			return err
		}
		r.replacer.Replace(r.dictionary)
	}
	if r.frame, err = readFull(r.body, int(p.frame), r.frame); err != nil {
		return err
	}
	if cap(r.piece) < n { // it is bounded by the capacity
		r.piece = make([]byte, 0, n)
	}
	option := zstd.WithDecoderDictDelete()
	if p.length > 0 {
		option = zstd.WithDecoderDictRaw(0, r.dictionary[:p.length])
	}
	if err := r.frames.ResetWithOptions(nil, option); err != nil {
		return err
	}
	r.piece, err = r.frames.DecodeAll(r.frame, r.piece[:0:n])
	if err == nil && len(r.piece) != n {
		err = fmt.Errorf("frame of %d bytes instead of %d", len(r.piece), n)
	}
	return err
}

// readFull reads n bytes into b, which it makes longer as needed.
func readFull(r io.Reader, n int, b []byte) ([]byte, error) {
	if cap(b) < n {
		b = make([]byte, n)
	}
	_, err := io.ReadFull(r, b[:n])
	return b[:n], reuse.Unexpected(err)
}

// pieceEntry reads and checks what the index says of a piece of n bytes.
func (r *Reader) pieceEntry(n int) (p piece, err error) {
	fields := []*uint64{&p.offset, &p.length, &p.frame}
	if r.file.old == nil {
		fields = fields[2:]
	}
	for _, f := range fields {
		if *f, err = readUvarint(r.index); err != nil {
			return p, err
		}
	}
	switch {
	case p.length > uint64(dictionaryFor(n)) || p.offset > r.file.oldSize || p.length > r.file.oldSize-p.offset:
		err = fmt.Errorf("dictionary of %d bytes at %d of %d", p.length, p.offset, r.file.oldSize)
	case p.frame > uint64(frameFor(n)):
		err = fmt.Errorf("frame of %d bytes for %d", p.frame, n)
	}
	return p, err
}
