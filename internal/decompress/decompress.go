// SPDX-License-Identifier: GPL-3.0-or-later

// Package decompress undoes the compression of archives: the methods that the field Compression of
// a narinfo may name (Guix, guix/narinfo.scm: %compression-methods). Start with [Open].
//
// What is decompressed comes from anywhere. Whatever it says, no method has a window of more than
// 128 MiB, none panics, and none reads for ever without giving anything. For what servers offer,
// the memory is about that of the window: 8 MiB with zstd -19, 32 MiB with lzip -9, less than 1 MiB
// with gzip. How much comes out is for the caller to bound.
package decompress

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/xi2/xz"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/lzip"
)

const (
	// maxWindow is the largest window or dictionary, in bytes, that is accepted: what zstd --ultra
	// -22 and --long make at most, and more than xz -9 (64 MiB) and lzip -9 (32 MiB) do.
	maxWindow = 128 << 20

	// inputSize is how much is read at once, and leastInput that of a short archive.
	inputSize, leastInput = 64 << 10, 4 << 10

	// freeInput is how many bytes are read in any case, and inputPerByte how many more for each
	// byte that comes out. No compressor makes data longer by more than a few hundredths, and the
	// largest block that must be whole is one of bzip2, of 900 kB. Members may be empty: each of
	// 36 bytes takes lzip some ten microseconds.
	freeInput    = 2 << 20
	inputPerByte = 2

	// mostShown is how many bytes a message shows.
	mostShown = 24
)

// PerhapsGzip is the method of what is compressed with gzip if it begins like that, and else is not
// compressed: a Content-Encoding is also said of files that have it themselves, or that have none.
const PerhapsGzip = "gzip or none"

// errNothing is in the chain of the error for data that are hardly any. A server could send them
// without end.
var errNothing = errors.New("hardly any data come out")

var errUnknownMethod = errors.New("unknown compression method")

var errClosed = errors.New("decompressor is closed")

// A Reader gives what was compressed. It is not safe for concurrent use.
type Reader struct {
	method  string
	open    func() (io.Reader, error) // of the method, called before the first read
	r       io.Reader
	close   func()
	err     error
	in, out int64  // bytes that have gone in and come out
	first   []byte // bytes that have gone in, as many as a message shows
}

// An input is a source that ends when hardly anything comes out of it.
type input struct {
	r io.Reader
	z *Reader
}

func (i *input) Read(p []byte) (int, error) {
	if i.z.in > freeInput+inputPerByte*i.z.out {
		return 0, fmt.Errorf("%w: %d bytes of %d", errNothing, i.z.out, i.z.in)
	}
	n, err := i.r.Read(p)
	i.z.in += int64(n)
	i.z.first = append(i.z.first, p[:min(n, mostShown-len(i.z.first))]...)
	return n, err
}

// Open returns a Reader of what r has, compressed with the given method: none, gzip, lzip, zstd, xz
// or bzip2, as it stands in a narinfo, or [PerhapsGzip]; another one is an error. Nothing is read
// from r before data are asked for; more may be read than is needed. Closing the Reader does not
// close r.
//
// Data may consist of several members, streams or frames, one after the other, whose contents are
// joined. After a member of gzip, anything that does not begin like one is ignored, as gzip(1)
// does; for the others it is an error. Checksums are verified.
func Open(method string, r io.Reader) (*Reader, error) { return OpenAtMost(method, r, maxWindow) }

// OpenAtMost is like [Open] for contents of which no more than the given number of bytes are
// wanted: what refers to something farther back, which they cannot have, is an error. A compressor
// that was not told how little would come has taken a large window; memory for all of it, zeroed
// for each small archive, took more time than all the rest.
func OpenAtMost(method string, r io.Reader, most int64) (*Reader, error) {
	z := &Reader{method: method, close: func() {}}
	if method == "none" {
		z.r = r
		return z, nil
	}
	in := bufio.NewReaderSize(&input{r, z}, int(min(inputSize, max(most, leastInput))))
	switch method {
	case "gzip", PerhapsGzip:
		z.open = func() (io.Reader, error) {
			if magic, _ := in.Peek(2); method == PerhapsGzip && string(magic) != gzipMagic {
				return in, nil
			}
			return openMembers(in)
		}
	case "lzip":
		l := lzip.NewReader(&input{r, z}, maxWindow)
		z.r, z.close = l, l.Close
	case "zstd":
		d, err := newZstdDecoder(in, most)
		if err != nil {
			return nil, fmt.Errorf("zstd: %w", err)
		}
		z.r, z.close = d, d.Close
	case "xz":
		// All blocks share one dictionary, which is made as large as the first header says, if that
		// is not refused, and takes memory as it is filled.
		z.open = func() (io.Reader, error) { return xz.NewReader(in, maxWindow) }
	case "bzip2":
		// The reader of the standard library joins streams.
		z.r = bzip2.NewReader(in)
	default:
		return nil, fmt.Errorf("%w %.40q", errUnknownMethod, method)
	}
	return z, nil
}

// members are those of gzip (RFC 1952), up to what is none.
type members struct {
	*gzip.Reader
	in *bufio.Reader
}

const gzipMagic, zstdMagic = "\x1f\x8b", "\x28\xb5\x2f\xfd"

// magics are what begins like each method.
var magics = map[string]string{"gzip": gzipMagic, "lzip": "LZIP", "zstd": zstdMagic, "xz": "\xfd7zXZ\x00", "bzip2": "BZh"}

func openMembers(in *bufio.Reader) (*members, error) {
	z, err := gzip.NewReader(in)
	if err != nil {
		return nil, err
	}
	z.Multistream(false)
	return &members{z, in}, nil
}

func (m *members) Read(p []byte) (int, error) {
	for {
		n, err := m.Reader.Read(p)
		if err != io.EOF {
			return n, err
		} else if n > 0 {
			return n, nil
		}
		magic, err := m.in.Peek(2)
		switch {
		case err == nil && string(magic) == gzipMagic:
			err = m.Reset(m.in)
			m.Multistream(false)
		case err == nil:
			err = io.EOF
		}
		if err != nil {
			return 0, err
		}
	}
}

// usualWindow is the largest window that compressors of zstd take unasked (zstd -19), in bytes.
const usualWindow = 8 << 20

// newZstdDecoder makes a decoder of contents of so many bytes at most that decodes one block after
// the other in the goroutine of its user; with goroutines of its own it would take more memory and
// processor time, and no less time until it is done. The buffer below it saves calls, and hides a
// bytes.Buffer, which the decoder would decode as a whole into memory.
func newZstdDecoder(r *bufio.Reader, most int64) (*zstd.Decoder, error) {
	const leastLog = 10
	log := max(leastLog, bits.Len64(uint64(max(most, 1)-1)))
	window := min(maxWindow, max(usualWindow, uint64(1)<<log))
	return zstd.NewReader(&narrowed{r, byte(log-leastLog) << 3, most >= maxWindow}, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(window))
}

// narrowed has the header of the first frame of zstd, mostly the only one, say that its window is
// no larger than need be (RFC 8878, section 3.1.1.1).
type narrowed struct {
	r     *bufio.Reader
	most  byte // as such a header has it
	begun bool
}

// Read implements io.Reader.
func (n *narrowed) Read(p []byte) (int, error) {
	if !n.begun {
		n.begun = true
		const descriptor, window, singleSegment = 4, 5, 1 << 5
		h, err := n.r.Peek(window + 1)
		if err == nil && string(h[:descriptor]) == zstdMagic && h[descriptor]&singleSegment == 0 {
			h[window] = min(h[window], n.most)
		}
	}
	return n.r.Read(p)
}

// Read implements io.Reader. An error but io.EOF names the method and has the cause in its chain:
// io.ErrUnexpectedEOF if the data end too early, which no data at all do too unless the method is
// none; the source's error if that fails. Errors are final.
func (z *Reader) Read(p []byte) (int, error) {
	if z.err != nil {
		return 0, z.err
	}
	n, err := z.read(p)
	z.out += int64(n)
	if err == io.EOF && z.in == 0 && z.method != "none" || err == xz.ErrBuf { // no data at all, or more is wanted than there is
		err = io.ErrUnexpectedEOF
	}
	if err != nil && err != io.EOF && z.method != "none" {
		if !strings.HasPrefix(err.Error(), strings.TrimSuffix(z.method, " or none")) { // as those of gzip, xz and bzip2 do
			err = fmt.Errorf("%s: %w", z.method, err)
		}
		if len(z.first) > 0 && !bytes.HasPrefix(z.first, []byte(magics[z.method])) { // often it is a page that says why
			err = fmt.Errorf("%w: it begins with %q", err, z.first)
		}
	}
	z.err = err
	return n, err
}

// read contains what goes wrong in a decoder: should it panic because of what it reads, that is an
// error of the data like another.
func (z *Reader) read(p []byte) (n int, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("decoder failed: %v", p)
		}
	}()
	if z.r == nil {
		if z.r, err = z.open(); err != nil {
			return 0, err
		}
	}
	return z.r.Read(p)
}

// Close ends what works for the Reader and gives its memory back. It does not close the source. It
// may be called again.
func (z *Reader) Close() {
	if z.err != errClosed {
		z.err = errClosed
		z.close()
	}
}
