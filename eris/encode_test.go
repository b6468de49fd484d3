// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/blake2b"
)

// encodeSlowly encodes as the section "Encoding" of ERIS 1.0.0 puts it, level by level, with
// nothing of this package but its types and the cipher, which has tests of its own.
func encodeSlowly(content []byte, size BlockSize, secret ConvergenceSecret) (ReadCapability, *memory) {
	m := newMemory()
	block := func(plaintext []byte, key Key, level int) Pair {
		encrypted := make([]byte, size)
		Decrypt(encrypted, plaintext, key, level)
		ref := Reference(blake2b.Sum256(encrypted))
		m.blocks[ref] = encrypted
		return Pair{ref, key}
	}
	padded := append(bytes.Clone(content), 0x80)
	for len(padded)%int(size) != 0 {
		padded = append(padded, 0)
	}
	var pairs []Pair
	for ; len(padded) > 0; padded = padded[size:] {
		hash, err := blake2b.New256(secret[:])
		if err != nil {
			panic(err)
		}
		hash.Write(padded[:size])
		pairs = append(pairs, block(padded[:size], Key(hash.Sum(nil)), 0))
	}
	level := 0
	for len(pairs) > 1 {
		level++
		var parents []Pair
		for len(pairs) > 0 {
			n := min(len(pairs), int(size)/64)
			node := make([]byte, size)
			for i, pair := range pairs[:n] {
				copy(node[64*i:], pair.Reference[:])
				copy(node[64*i+32:], pair.Key[:])
			}
			parents = append(parents, block(node, blake2b.Sum256(node), level))
			pairs = pairs[n:]
		}
		pairs = parents
	}
	return ReadCapability{size, level, pairs[0].Reference, pairs[0].Key}, m
}

// boundaries returns lengths at which the shape of a tree, or the way that an encoder goes,
// changes.
func boundaries(size BlockSize) []int {
	var lengths []int
	around := func(n int) {
		for _, d := range []int{-1, 0, 1} {
			if n+d >= 0 {
				lengths = append(lengths, n+d)
			}
		}
	}
	bs := int(size)
	for _, n := range []int{0, bs, 2 * bs, smallContent, turn, turn, 2 * turn, 3*turn + bs} {
		around(n)
	}
	if size == BlockSize1KiB {
		for _, leaves := range []int{15, 16, 17, 240, 256, 257, 272, 4096, 4112} {
			around(leaves * bs)
		}
	} else {
		lengths = append(lengths, 512*bs-1, 512*bs) // the greatest of level 1, and the least of level 2
	}
	return lengths
}

func TestEncodersAgree(t *testing.T) {
	t.Parallel()
	for _, size := range bothSizes {
		for _, n := range boundaries(size) {
			content := randomContent(byte(n), n)
			secret := ConvergenceSecret{byte(n % 3)}
			want, blocks := encodeSlowly(content, size, secret)
			for _, workers := range []int{1, 3} {
				if workers == 1 && n > 2<<20 {
					continue
				}
				got, made := mustEncode(t, content, EncodeOptions{BlockSize: size, Secret: secret, Workers: workers})
				if got != want {
					t.Fatalf("%v, %d bytes, %d workers: capability differs", size, n, workers)
				}
				if len(made.blocks) != len(blocks.blocks) {
					t.Errorf("%v, %d bytes: %d blocks, want %d", size, n, len(made.blocks), len(blocks.blocks))
				}
			}
		}
	}
}

// atOnce is a reader that says io.EOF together with its last bytes, and gets angry if it is asked
// again.
type atOnce struct {
	t    *testing.T
	rest []byte
	done bool
}

func (r *atOnce) Read(p []byte) (int, error) {
	if r.done {
		r.t.Error("read again after the end")
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	if len(r.rest) == 0 {
		r.done = true
		return n, io.EOF
	}
	return n, nil
}

// reckoned is a reader that says how much it has, which need not be true.
type reckoned struct {
	io.Reader
	length int
}

func (r reckoned) Len() int { return r.length }

// The content alone decides, whatever way the reader takes to say where it ends.
func TestEncodeReaders(t *testing.T) {
	t.Parallel()
	for _, n := range []int{0, 1, 1023, 1024, 16383, 16384, 16385, 40000, turn - 1, turn, turn + 1, 2*turn + 5} {
		content := randomContent(byte(n), n)
		want, _ := encodeSlowly(content, BlockSizeFor(int64(n)), ConvergenceSecret{})
		half := func() io.Reader { return iotest.HalfReader(bytes.NewReader(content)) }
		for name, r := range map[string]io.Reader{
			"plain":          bytes.NewReader(content),
			"at once":        &atOnce{t: t, rest: content},
			"half":           half(),
			"one byte":       iotest.OneByteReader(bytes.NewReader(content)),
			"one byte + end": iotest.DataErrReader(iotest.OneByteReader(bytes.NewReader(content))),
			"length":         reckoned{half(), n},
			"no length":      reckoned{half(), 0},
			"negative":       reckoned{half(), -1},
			"less":           reckoned{half(), n - 1},
			"more":           reckoned{half(), n + 1},
			"much more":      reckoned{half(), math.MaxInt},
		} {
			if got, err := Encode(t.Context(), r, nil, EncodeOptions{Workers: 1 + n%2}); err != nil || got != want {
				t.Errorf("%d bytes, %s: %v, %v, want %v", n, name, got, err, want)
			}
		}
	}
}

// badReader gives n bytes and then fails, or worse.
type badReader struct {
	n     int
	after func(p []byte) (int, error)
}

func (r *badReader) Read(p []byte) (int, error) {
	if r.n == 0 {
		return r.after(p)
	}
	n := min(r.n, len(p))
	r.n -= n
	return n, nil
}

func TestEncodeReaderErrors(t *testing.T) {
	t.Parallel()
	failure := errors.New("disk on fire")
	for name, test := range map[string]struct {
		after func(p []byte) (int, error)
		want  error
	}{
		"an error":            {func([]byte) (int, error) { return 0, failure }, failure},
		"an error with bytes": {func(p []byte) (int, error) { return len(p) / 2, failure }, failure},
		"cut off":             {func([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }, io.ErrUnexpectedEOF},
		"no progress":         {func([]byte) (int, error) { return 0, nil }, io.ErrNoProgress},
		"count too great":     {func(p []byte) (int, error) { return len(p) + 1, nil }, nil},
		"count negative":      {func([]byte) (int, error) { return -1, nil }, nil},
	} {
		for _, n := range []int{0, 100, 16384, 100000, 3*turn + 77} {
			for _, size := range []BlockSize{0, BlockSize1KiB, BlockSize32KiB} {
				_, err := Encode(t.Context(), &badReader{n, test.after}, newMemory().Put, EncodeOptions{BlockSize: size, Workers: 2})
				if err == nil || test.want != nil && !errors.Is(err, test.want) {
					t.Errorf("%s after %d bytes: error %v, want %v", name, n, err, test.want)
				}
			}
		}
	}
}

func TestEncodeSinkErrors(t *testing.T) {
	t.Parallel()
	failure := errors.New("store is full")
	for _, size := range bothSizes {
		content := randomContent(5, 12*turn)
		_, whole := mustEncode(t, content, EncodeOptions{BlockSize: size})
		for _, at := range []int{1, 2, 17, 100, whole.puts - 1, whole.puts} {
			if at > whole.puts {
				continue
			}
			var puts atomic.Int64
			sink := Sink(func(context.Context, Reference, []byte) error {
				if int(puts.Add(1)) == at {
					return failure
				}
				return nil
			})
			if _, err := Encode(t.Context(), bytes.NewReader(content), sink, EncodeOptions{BlockSize: size, Workers: 3}); !errors.Is(err, failure) {
				t.Errorf("%v, failure at %d: error %v", size, at, err)
			}
		}
	}
}

// A cancelled context must end an encoding that waits for a sink, and leave nothing behind: the
// bubble would not end.
func TestEncodeCancelledWhileSinkHangs(t *testing.T) {
	content := randomContent(6, 4<<20)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		sink := Sink(func(ctx context.Context, _ Reference, _ []byte) error {
			<-ctx.Done()
			return ctx.Err()
		})
		if _, err := Encode(ctx, bytes.NewReader(content), sink, EncodeOptions{Workers: 5}); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if _, err := Encode(ctx, bytes.NewReader(content), nil, EncodeOptions{}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("after the end: %v", err)
		}
	})
}

// With a sink whose every call takes a time of its own, turns are finished in any order, and
// workers have to wait for the one that is late. The result is the same, and calls do overlap: in
// virtual time, workers make it that much faster.
func TestEncodeWithSlowSink(t *testing.T) {
	t.Parallel()
	for _, size := range bothSizes {
		content := randomContent(8, 60*turn+12345)
		want, blocks := mustEncode(t, content, EncodeOptions{BlockSize: size})
		var took [5]time.Duration
		for _, workers := range []int{1, 4} {
			synctest.Test(t, func(t *testing.T) {
				made := newMemory()
				var now, most atomic.Int64
				sink := Sink(func(ctx context.Context, ref Reference, block []byte) error {
					most.Store(max(most.Load(), now.Add(1)))
					delay := time.Duration(ref[0]) * time.Millisecond
					if ref[0] == 7 {
						delay = 10 * time.Second
					}
					time.Sleep(delay)
					now.Add(-1)
					return made.Put(ctx, ref, block)
				})
				start := time.Now()
				got, err := Encode(t.Context(), bytes.NewReader(content), sink, EncodeOptions{BlockSize: size, Workers: workers})
				took[workers] = time.Since(start)
				if err != nil || got != want {
					t.Errorf("%v: %v, %v", size, got, err)
				}
				checkSameBlocks(t, made, blocks)
				if most.Load() > int64(workers)+1 {
					t.Errorf("%d calls at a time for %d workers", most.Load(), workers)
				}
			})
		}
		if took[4] > took[1]/2 {
			t.Errorf("%v: one worker takes %v, four %v", size, took[1], took[4])
		}
	}
}

func TestEncodeRefusesBlockSizes(t *testing.T) {
	for _, size := range []BlockSize{-1, 1, 1023, 2048, 65536} {
		if _, err := Encode(t.Context(), bytes.NewReader(nil), nil, EncodeOptions{BlockSize: size}); err == nil {
			t.Errorf("Encode takes a block size of %d", size)
		}
	}
}

func ExampleEncode() {
	capability, err := Encode(context.Background(), bytes.NewReader([]byte("Hello world!")), nil, EncodeOptions{})
	if err != nil {
		panic(err)
	}
	fmt.Println(capability.URN())
	// Output:
	// urn:eris:BIAD77QDJMFAKZYH2DXBUZYAP3MXZ3DJZVFYQ5DFWC6T65WSFCU5S2IT4YZGJ7AC4SYQMP2DM2ANS2ZTCP3DJJIRV733CRAAHOSWIYZM3M
}
