// SPDX-License-Identifier: GPL-3.0-or-later

package lzip

import (
	"bytes"
	"os/exec"
	"slices"
	"testing"
)

// TestWriter compresses, and decompresses with our reader and with lzip.
func TestWriter(t *testing.T) {
	for level, data := range map[int][]byte{1: nil, 2: noise(1, 1<<17+1), 5: words(2, 1<<18), 9: words(3, 1<<19)} {
		var b, again bytes.Buffer
		for _, to := range []*bytes.Buffer{&b, &again} {
			w, err := NewWriter(to, level)
			must(t, err)
			for piece := range slices.Chunk(data, 100000) {
				_, err := w.Write(piece)
				must(t, err)
			}
			must(t, w.Close())
		}
		if !bytes.Equal(b.Bytes(), again.Bytes()) {
			t.Errorf("level %d: other bytes the second time", level)
		}
		if got, err := decompress(b.Bytes()); err != nil || !bytes.Equal(got, data) {
			t.Errorf("level %d: %d of %d bytes, %v", level, len(got), len(data), err)
		}
		program, err := exec.LookPath("lzip")
		if err != nil {
			continue // our reader is strict
		}
		c := exec.Command(program, "-d")
		c.Stdin = &b
		if got, err := c.Output(); err != nil || !bytes.Equal(got, data) {
			t.Errorf("level %d: lzip makes %d of %d bytes of it, %v", level, len(got), len(data), err)
		}
	}
	for _, level := range []int{-1, 0, 10} {
		if _, err := NewWriter(&bytes.Buffer{}, level); err == nil {
			t.Errorf("level %d", level)
		}
	}
}

// TestWriterFails has errors of the writer below.
func TestWriterFails(t *testing.T) {
	for after := range 3 {
		w, err := NewWriter(&failing{left: after}, 1)
		if err == nil {
			_, err = w.Write(noise(1, 1<<20))
		}
		if err == nil {
			err = w.Close()
		}
		if err == nil {
			t.Errorf("no error after %d writes", after)
		}
	}
}

// failing fails after some writes.
type failing struct{ left int }

// Write implements io.Writer.
func (f *failing) Write(p []byte) (int, error) {
	if f.left == 0 {
		return 0, bytes.ErrTooLarge
	}
	f.left--
	return len(p), nil
}
