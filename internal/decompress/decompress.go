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
	"compress/bzip2"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/lzip"
)

const (
	// maxWindow is the largest window or dictionary, in bytes, that is accepted: what zstd --ultra
	// -22 and --long make at most, and more than xz -9 (64 MiB) and lzip -9 (32 MiB) do.
	maxWindow = 128 << 20

	inputSize = 64 << 10

	// freeInput is how many bytes are read in any case, and inputPerByte how many more for each
	// byte that comes out. No compressor makes data longer by more than a few hundredths; the
	// decoder of lzip reads some MiB ahead.
	freeInput    = 32 << 20
	inputPerByte = 2
)

// errNothing is in the chain of the error for data that are hardly any. A server could send them
// without end.
var errNothing = errors.New("hardly any data come out")

// ErrUnknownMethod is in the chain of the error for a method that there is not.
var ErrUnknownMethod = errors.New("unknown compression method")

var errClosed = errors.New("decompressor is closed")

// A Reader gives what was compressed. It is not safe for concurrent use.
type Reader struct {
	method string
	r      io.Reader
	close  func()
	err    error
	out    int64 // bytes that have come out
	free   int64 // freeInput but for tests
}

// An input is a source that ends when hardly anything comes out of it.
type input struct {
	r io.Reader
	z *Reader
	n int64
}

func (i *input) Read(p []byte) (int, error) {
	if i.n > i.z.free+inputPerByte*i.z.out {
		return 0, fmt.Errorf("%w: %d bytes of %d", errNothing, i.z.out, i.n)
	}
	n, err := i.r.Read(p)
	i.n += int64(n)
	return n, err
}

// Open returns a Reader of what r has, compressed with the given method: none, gzip, lzip, zstd, xz
// or bzip2, as it stands in a narinfo. With another one the error has [ErrUnknownMethod] in its
// chain. Nothing is read from r before data are asked for; more may be read than is needed. Closing
// the Reader does not close r.
//
// Data may consist of several members, streams or frames, one after the other, whose contents are
// joined. After a member of gzip, anything that does not begin like one is ignored, as gzip(1)
// does; for the others it is an error. Checksums are verified.
func Open(method string, r io.Reader) (*Reader, error) {
	z := &Reader{method: method, close: func() {}, free: freeInput}
	if method == "none" {
		z.r = r
		return z, nil
	}
	r = &input{r: r, z: z}
	switch method {
	case "gzip":
		z.r = newGzipReader(r)
	case "lzip":
		l := lzip.NewReader(r, maxWindow)
		z.r, z.close = l, func() { l.Close() }
	case "zstd":
		return z, z.openZstd(r)
	case "xz":
		z.r = newXzReader(bufio.NewReaderSize(r, inputSize))
	case "bzip2":
		// The reader of the standard library joins streams.
		z.r = bzip2.NewReader(bufio.NewReaderSize(r, inputSize))
	default:
		return nil, fmt.Errorf("%w %.40q", ErrUnknownMethod, method)
	}
	return z, nil
}

// openZstd makes a decoder that decodes one block after the other in the goroutine of its user.
// Measured on an archive of 200 MiB from level 19 (window 8 MiB), zstd(1) takes 0.35 s of processor
// time and this 0.34 to 0.39 s, with 12 MiB for the whole process; with goroutines of its own, the
// decoder takes 0.39 to 0.42 s and 17 MiB, and no less time until it is done. Reading and WriteTo
// differ by 3 to 5 %.
func (z *Reader) openZstd(r io.Reader) error {
	// The buffer saves calls, and hides a bytes.Buffer, which the decoder would decode as a whole
	// into memory.
	in := bufio.NewReaderSize(r, inputSize)
	d, err := zstd.NewReader(in,
		zstd.WithDecoderConcurrency(1),
		zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return fmt.Errorf("zstd: %w", err)
	}
	z.r, z.close = &zstdReader{in: in, d: d}, d.Close
	return nil
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
	return n, z.fail(err)
}

// read contains what goes wrong in a decoder: should it panic because of what it reads, that is an
// error of the data like another.
func (z *Reader) read(p []byte) (n int, err error) {
	defer caught(&err)
	return z.r.Read(p)
}

// WriteTo implements io.WriterTo: it writes all data, or up to an error as described at Read, to w.
// It saves copies with most methods.
func (z *Reader) WriteTo(w io.Writer) (int64, error) {
	if z.err != nil {
		if z.err == io.EOF {
			return 0, nil
		}
		return 0, z.err
	}
	out := &output{w: w, z: z}
	n, err := out.copy(z.r)
	if out.err != nil {
		z.err = out.err
		return n, out.err
	}
	if err == nil {
		z.err = io.EOF
	}
	return n, z.fail(err)
}

// An output remembers the error of a writer, so that it is not taken for one of the compressed
// data.
type output struct {
	w   io.Writer
	z   *Reader
	err error
}

func (o *output) copy(r io.Reader) (n int64, err error) {
	defer caught(&err)
	return io.Copy(o, r)
}

func (o *output) Write(p []byte) (int, error) {
	o.z.out += int64(len(p))
	n, err := o.w.Write(p)
	if err != nil {
		o.err = err
	}
	return n, err
}

// Close ends what works for the Reader and gives its memory back. It does not close the source. It
// returns nil, and may be called again.
func (z *Reader) Close() error {
	if z.err != errClosed {
		z.err = errClosed
		z.close()
	}
	return nil
}

func (z *Reader) fail(err error) error {
	if err != nil && err != io.EOF && z.method != "none" {
		err = fmt.Errorf("%s: %w", z.method, err)
	}
	if err != nil {
		z.err = err
	}
	return err
}

// A zstdReader takes no data at all for an error.
type zstdReader struct {
	in    *bufio.Reader
	d     *zstd.Decoder
	begun bool
}

func (z *zstdReader) Read(p []byte) (int, error) {
	if !z.begun {
		z.begun = true
		if _, err := z.in.Peek(1); err != nil {
			return 0, noEOF(err)
		}
	}
	return z.d.Read(p)
}

// noEOF turns the end of the source into an end too early.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

func caught(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("decoder failed: %v", p)
	}
}
