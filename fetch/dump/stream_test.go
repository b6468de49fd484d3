// SPDX-License-Identifier: GPL-3.0-or-later

package dump_test

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"testing/iotest"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/dump"
)

// What is written to a stream is read from one, however it is cut into pieces, and wherever the
// stream is cut off, all blocks that are whole have been handed over and the error says so.
func TestStream(t *testing.T) {
	var out bytes.Buffer
	s := dump.Stream{W: &out, KeepCapabilities: true}
	var refs []eris.Reference
	var ends []int // of blocks in the stream
	for i, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB, eris.BlockSize1KiB} {
		block := bytes.Repeat([]byte{byte(i)}, int(size))
		refs = append(refs, eris.Sum(block))
		if err := s.Put(t.Context(), refs[i], block); err != nil {
			t.Fatal(err)
		}
		ends = append(ends, out.Len())
	}
	c := eris.ReadCapability{BlockSize: eris.BlockSize1KiB, Root: refs[0]}
	if err := s.End(c); err != nil {
		t.Fatal(err)
	}
	if err := s.Put(t.Context(), refs[0], make([]byte, 1024)); err == nil {
		t.Error("a block was put behind the end")
	}
	read := func(r io.Reader) (n int, capabilities []eris.ReadCapability, err error) {
		capabilities, err = dump.Read(r, func(ref eris.Reference, block []byte) error {
			if ref != refs[n] || eris.Verify(ref, block) != nil {
				t.Fatalf("block %d is another one", n)
			}
			n++
			return nil
		})
		return n, capabilities, err
	}
	whole := out.Bytes()
	for _, r := range []io.Reader{bytes.NewReader(whole), iotest.OneByteReader(bytes.NewReader(whole)), iotest.DataErrReader(bytes.NewReader(whole))} {
		if n, capabilities, err := read(r); n != len(refs) || err != nil || len(capabilities) != 1 || capabilities[0] != c {
			t.Errorf("%d blocks, %v, %v", n, capabilities, err)
		}
	}
	for length := range whole {
		n, _, err := read(bytes.NewReader(whole[:length]))
		want := 0
		for want < len(ends) && ends[want] <= length {
			want++
		}
		var format *dump.FormatError
		if n != want || !errors.As(err, &format) || format.Err != io.ErrUnexpectedEOF {
			t.Fatalf("of %d bytes there are %d blocks instead of %d: %v", length, n, want, err)
		}
	}
	broken := errors.New("broken")
	if n, _, err := read(io.MultiReader(bytes.NewReader(whole[:ends[0]+9]), iotest.ErrReader(broken))); n != 1 || !errors.Is(err, broken) {
		t.Errorf("%d blocks, %v", n, err)
	}
	if _, _, err := read(bytes.NewReader([]byte("Hello, world."))); err == nil || errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("text is taken for a dump: %v", err)
	}
}
