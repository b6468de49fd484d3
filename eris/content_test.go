// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
)

func TestReadAt(t *testing.T) {
	t.Parallel()
	for _, size := range bothSizes {
		for _, n := range []int{0, 1, int(size) - 1, int(size), 3*int(size) + 5, 17 * int(size), 600 * int(size), 300 * 1024} {
			content := randomContent(1, n)
			capability, m := mustEncode(t, content, EncodeOptions{BlockSize: size})
			c, err := Open(t.Context(), m, capability, int64(n), Window{})
			if err != nil {
				t.Fatal(err)
			}
			if c.Size() != int64(n) || c.Capability() != capability {
				t.Errorf("%v, %d bytes: size %d", size, n, c.Size())
			}
			check := func(offset int64, length int) {
				t.Helper()
				p := bytes.Repeat([]byte{0xA5}, length+10)
				got, err := c.ReadAt(t.Context(), p[:length], offset)
				want, wantErr := bytes.NewReader(content).ReadAt(make([]byte, length), offset)
				if length == 0 {
					wantErr = nil
				}
				if got != want || err != wantErr {
					t.Fatalf("%v, %d bytes, %d at %d: %d, %v; want %d, %v", size, n, length, offset, got, err, want, wantErr)
				}
				if got > 0 && !bytes.Equal(p[:got], content[offset:][:got]) {
					t.Fatalf("%v, %d bytes, %d at %d: wrong bytes", size, n, length, offset)
				}
				if len(bytes.Trim(p[length:], "\xA5")) != 0 {
					t.Fatalf("%v, %d bytes, %d at %d: wrote behind its slice", size, n, length, offset)
				}
			}
			random := rand.New(rand.NewPCG(uint64(n), 1))
			for range 60 {
				check(random.Int64N(int64(n)+2), random.IntN(4*int(size)))
			}
			for _, offset := range []int64{0, int64(n) - 1, int64(n), int64(n) + 1, math.MaxInt64} {
				if offset >= 0 {
					check(offset, 0)
					check(offset, 1)
					check(offset, int(size))
					check(offset, int(size)+1)
				}
			}
			check(0, n)
			check(0, n+1)
			if _, err := c.ReadAt(t.Context(), make([]byte, 1), -1); err == nil {
				t.Error("negative offset: no error")
			}
		}
	}
}

// A source that writes more than a block cannot write behind the slice of the caller.
func TestReadAtTooLongBlock(t *testing.T) {
	content := randomContent(1, 5000)
	capability, m := mustEncode(t, content, EncodeOptions{BlockSize: BlockSize1KiB})
	long := false
	source := blocksFunc(func(ctx context.Context, ref Reference, size BlockSize, dst []byte) ([]byte, error) {
		block, err := m.Get(ctx, ref, size, dst)
		dst = append(dst, block...)
		if long {
			dst = append(dst, "and more"...)
		}
		return dst, err
	})
	c, err := Open(t.Context(), source, capability, 5000, Window{})
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 2048)
	if _, err := c.ReadAt(t.Context(), p[:1024], 0); err != nil || !bytes.Equal(p[:1024], content[:1024]) {
		t.Error(err)
	}
	long = true
	if _, err := c.ReadAt(t.Context(), p[:1024], 1024); errorKind(err) != "block" {
		t.Error(err)
	}
	if len(bytes.Trim(p[1024:], "\x00")) != 0 {
		t.Error("wrote behind its slice")
	}
}

func TestReadAtConcurrently(t *testing.T) {
	content := randomContent(1, 500_000)
	capability, m := mustEncode(t, content, EncodeOptions{BlockSize: BlockSize1KiB})
	c, err := Open(t.Context(), m, capability, int64(len(content)), Window{})
	if err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	for i := range 4 {
		group.Go(func() {
			random := rand.New(rand.NewPCG(uint64(i), 2))
			for range 200 {
				offset, p := random.IntN(len(content)-3000), make([]byte, 3000)
				if _, err := c.ReadAt(t.Context(), p, int64(offset)); err != nil || !bytes.Equal(p, content[offset:][:len(p)]) {
					t.Errorf("at %d: %v", offset, err)
				}
			}
		})
	}
	group.Wait()
}

// Neighbouring reads do not fetch the same internal nodes again.
func TestReadAtRemembersNodes(t *testing.T) {
	content := randomContent(1, 500_000)
	capability, m := mustEncode(t, content, EncodeOptions{BlockSize: BlockSize1KiB})
	source := &counting{Blocks: m}
	c, err := Open(t.Context(), source, capability, int64(len(content)), Window{})
	if err != nil {
		t.Fatal(err)
	}
	// The right-most path, and the left-most one without the root.
	if n := source.calls.Load(); n != 2*int64(capability.Level)+1 {
		t.Errorf("opening fetched %d blocks", n)
	}
	p := make([]byte, 10)
	for offset := int64(0); offset < c.Size(); offset += 1024 {
		if _, err := c.ReadAt(t.Context(), p, offset); err != nil {
			t.Fatal(err)
		}
	}
	if n := source.calls.Load(); n != int64(m.puts) {
		t.Errorf("%d blocks were fetched, there are %d", n, m.puts)
	}
}

func TestReader(t *testing.T) {
	content := randomContent(2, 70_000)
	capability, m := mustEncode(t, content, EncodeOptions{BlockSize: BlockSize1KiB})
	c, err := Open(t.Context(), m, capability, int64(len(content)), Window{Requests: 4})
	if err != nil {
		t.Fatal(err)
	}
	// All ways of reading, several times, from one Content.
	for range 3 {
		r := c.NewReader(t.Context())
		if err := iotest.TestReader(r, content); err != nil {
			t.Error(err)
		}
		if n, err := r.Read(make([]byte, 5)); n != 0 || err != io.EOF {
			t.Errorf("behind the end: %d, %v", n, err)
		}
		r.Close()

		r = c.NewReader(t.Context())
		start := make([]byte, 1500)
		if _, err := io.ReadFull(r, start); err != nil {
			t.Error(err)
		}
		rest := bytes.NewBuffer(start)
		if n, err := io.Copy(rest, r); err != nil || int(n) != len(content)-len(start) || !bytes.Equal(rest.Bytes(), content) {
			t.Errorf("Read, then WriteTo: %d, %v", n, err)
		}
		if n, err := r.WriteTo(rest); n != 0 || err != nil {
			t.Errorf("behind the end: %d, %v", n, err)
		}
		r.Close()

		var b bytes.Buffer
		if n, err := c.WriteTo(t.Context(), &b); err != nil || n != c.Size() || !bytes.Equal(b.Bytes(), content) {
			t.Errorf("WriteTo: %d, %v", n, err)
		}

		r = c.NewReader(t.Context())
		r.Close()
		if _, err := r.Read(make([]byte, 5)); err == nil || err == io.EOF {
			t.Errorf("closed: %v", err)
		}
	}
}

// writerFunc makes an io.Writer of a function.
type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestWriteToFaultyWriter(t *testing.T) {
	content := randomContent(2, 70_000)
	capability, m := mustEncode(t, content, EncodeOptions{BlockSize: BlockSize1KiB})
	failure := errors.New("disk is full")
	for name, test := range map[string]struct {
		write func(p []byte) (int, error)
		n     int64
		want  error
	}{
		"fails":          {func(p []byte) (int, error) { return 7, failure }, 7, failure},
		"short":          {func(p []byte) (int, error) { return len(p) - 1, nil }, 1023, io.ErrShortWrite},
		"too much":       {func(p []byte) (int, error) { return len(p) + 1, nil }, 0, nil},
		"less than none": {func(p []byte) (int, error) { return -1, nil }, 0, nil},
	} {
		synctest.Test(t, func(t *testing.T) {
			c, err := Open(t.Context(), m, capability, int64(len(content)), Window{})
			if err != nil {
				t.Fatal(err)
			}
			n, err := c.WriteTo(t.Context(), writerFunc(test.write))
			if n != test.n || err == nil || test.want != nil && !errors.Is(err, test.want) {
				t.Errorf("%s: %d, %v; want %d, %v", name, n, err, test.n, test.want)
			}
		})
	}
}

// What was written before an error is a prefix of the content.
func TestWriteToAfterError(t *testing.T) {
	content := randomContent(2, 300_000)
	capability, m := mustEncode(t, content, EncodeOptions{BlockSize: BlockSize1KiB})
	for i, ref := range m.sorted() {
		if i%10 != 0 {
			continue
		}
		c, err := Open(t.Context(), m, capability, int64(len(content)), Window{Requests: 5})
		if err != nil {
			t.Fatal(err)
		}
		block := m.blocks[ref]
		delete(m.blocks, ref)
		var b bytes.Buffer
		n, err := c.WriteTo(t.Context(), &b)
		if n != int64(b.Len()) || !bytes.HasPrefix(content, b.Bytes()) {
			t.Errorf("%d bytes written, %d reported, or they are wrong", b.Len(), n)
		}
		if (err == nil) != (int(n) == len(content)) || err != nil && !errors.Is(err, ErrNotFound) {
			t.Errorf("%d bytes: error %v", n, err)
		}
		m.blocks[ref] = block
	}
}

func TestOpenCancelled(t *testing.T) {
	content := randomContent(2, 300_000)
	capability, m := mustEncode(t, content, EncodeOptions{BlockSize: BlockSize1KiB})
	synctest.Test(t, func(t *testing.T) {
		all := 2*capability.Level + 1 // blocks of both paths
		for after := range int64(all + 2) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
			var calls atomic.Int64
			source := blocksFunc(func(ctx context.Context, ref Reference, size BlockSize, dst []byte) ([]byte, error) {
				if calls.Add(1) > after {
					<-ctx.Done()
					return nil, ctx.Err()
				}
				return m.Get(ctx, ref, size, dst)
			})
			_, err := Open(ctx, source, capability, int64(len(content)), Window{})
			if after < int64(all) && !errors.Is(err, context.DeadlineExceeded) || after >= int64(all) && err != nil {
				t.Errorf("hanging after %d calls: %v", after, err)
			}
			cancel()
		}
	})
	c, err := Open(t.Context(), m, capability, int64(len(content)), Window{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Open(ctx, m, capability, int64(len(content)), Window{}); !errors.Is(err, context.Canceled) {
		t.Errorf("Open: %v", err)
	}
	if n, err := c.ReadAt(ctx, make([]byte, 100), 0); n != 0 || !errors.Is(err, context.Canceled) {
		t.Errorf("ReadAt: %d, %v", n, err)
	}
	if n, err := c.WriteTo(ctx, io.Discard); n != 0 || !errors.Is(err, context.Canceled) {
		t.Errorf("WriteTo: %d, %v", n, err)
	}
}

// distant is a source at the other end of a line without a bound to its rate.
type distant struct {
	Blocks
	roundTrip time.Duration
}

func (d distant) Get(ctx context.Context, ref Reference, size BlockSize, dst []byte) ([]byte, error) {
	time.Sleep(d.roundTrip)
	return d.Blocks.Get(ctx, ref, size, dst)
}

// TestRoundTrips counts how many round trips it takes until a content can be read: one for each level of the tree and one for
// leaves, since both sides of the tree are gone down at the same time; and one more until all of it is there, if the window is
// large enough.
func TestRoundTrips(t *testing.T) {
	const roundTrip = time.Second
	for _, length := range []int{10, 5_000, 100_000, 500_000} {
		content := randomContent(3, length)
		capability, m := mustEncode(t, content, EncodeOptions{BlockSize: BlockSize1KiB})
		levels := capability.Level
		synctest.Test(t, func(t *testing.T) {
			source := &counting{Blocks: distant{m, roundTrip}}
			begin := time.Now()
			trips := func() int { return int(time.Since(begin) / roundTrip) }
			c, err := Open(t.Context(), source, capability, int64(length), Window{Requests: 4096})
			if err != nil {
				t.Fatal(err)
			}
			if n := trips(); n != levels+1 {
				t.Errorf("%d bytes, level %d: opening took %d round trips", length, levels, n)
			}
			r := c.NewReader(t.Context())
			defer r.Close()
			if _, err := r.Read(make([]byte, min(length, 1024))); err != nil {
				t.Fatal(err)
			}
			if n := trips(); n != levels+1 {
				t.Errorf("%d bytes, level %d: the first leaf took %d round trips", length, levels, n)
			}
			if _, err := io.Copy(io.Discard, r); err != nil {
				t.Fatal(err)
			}
			// Nodes at one level are asked for when those above have come.
			if n := trips(); n > 2*levels+1 {
				t.Errorf("%d bytes, level %d: the whole took %d round trips", length, levels, n)
			}
			if n := source.calls.Load(); n != int64(m.puts) {
				t.Errorf("%d bytes: %d requests for %d blocks", length, n, m.puts)
			}
		})
		synctest.Test(t, func(t *testing.T) {
			begin := time.Now()
			s := NewSequence(t.Context(), distant{m, roundTrip}, slices.Values([]Want{{capability, int64(length)}}), int64(length), Window{Requests: 4096})
			defer s.Close()
			if _, err := s.Next(); err != nil {
				t.Fatal(err)
			}
			leaf, err := s.Leaf()
			if err != nil {
				t.Fatal(err)
			}
			leaf.Release()
			most := levels + 1
			if levels > 0 {
				most++ // leaves are asked for when the content is open
			}
			if n := int(time.Since(begin) / roundTrip); n > most {
				t.Errorf("%d bytes, level %d: the first leaf of a sequence took %d round trips", length, levels, n)
			}
		})
	}
}
