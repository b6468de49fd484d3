// SPDX-License-Identifier: GPL-3.0-or-later

package content

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
)

// unreadable fails in the midst of the second leaf.
type unreadable struct{ io.ReaderAt }

func (u unreadable) ReadAt(p []byte, offset int64) (int, error) {
	if offset > 0 {
		return 17, errors.New("cannot be read")
	}
	return u.ReaderAt.ReadAt(p, offset)
}

// TestNear reads contents of which something like them is near, and counts the leaves that are
// requested all the same.
func TestNear(t *testing.T) {
	for _, size := range bothSizes {
		for _, leaves := range []int{1, 2, 3, 20, 40} {
			for _, rest := range []int{0, 1, int(size) - 1} {
				random := rand.New(rand.NewPCG(uint64(leaves), uint64(rest)))
				contents := make([]byte, (leaves-1)*int(size)+rest)
				for i := range contents {
					contents[i] = byte(random.Uint32())
				}
				backend := sourcetest.NewBackend()
				capability, err := eris.Encode(t.Context(), bytes.NewReader(contents), backend.Put, eris.EncodeOptions{BlockSize: size})
				must(t, err)
				nodes := 0
				for n := leaves; n > 1; {
					n = (n + size.Arity() - 1) / size.Arity()
					nodes += n
				}
				changed := func(at int) io.ReaderAt {
					b := slices.Clone(contents)
					if at >= 0 && at < len(b) {
						b[at]++
					}
					return bytes.NewReader(b)
				}
				for name, near := range map[string]io.ReaderAt{
					"the same":   bytes.NewReader(contents),
					"nothing":    nil,
					"empty":      bytes.NewReader(nil),
					"begin":      changed(0),
					"end":        changed(len(contents) - 1),
					"longer":     bytes.NewReader(append(slices.Clone(contents), 0x80)),
					"shorter":    bytes.NewReader(contents[:max(0, len(contents)-1)]),
					"unreadable": unreadable{bytes.NewReader(contents)},
				} {
					missing := leaves
					switch name {
					case "nothing":
					case "unreadable":
						missing--
					default:
						missing = leavesFrom(contents, near, int(size))
					}
					var requests atomic.Int64
					get := func(ctx context.Context, ref eris.Reference, s eris.BlockSize, dst []byte) ([]byte, error) {
						requests.Add(1)
						return backend.Get(ctx, ref, s, dst)
					}
					t.Run(fmt.Sprintf("%s/%d+%d/%s", size, leaves, rest, name), func(t *testing.T) {
						for _, source := range []fetch.Source{open(t, get), openImmediate(t, get)} {
							for _, window := range []fetch.Window{{}, {Requests: 1, Bytes: 1}} {
								requests.Store(0)
								want := Want{Capability: capability, Limit: int64(len(contents)), NearKeys: keysOf(t, near, size), Near: reading(near)}
								must(t, readSequence(t.Context(), source, []Want{want, want}, math.MaxInt64, window, func(got []byte) {
									if !bytes.Equal(got, contents) {
										t.Error("other contents")
									}
								}))
								if n := int(requests.Load()); n != 2*(nodes+missing) {
									t.Errorf("%d requests instead of %d", n, 2*(nodes+missing))
								}
							}
						}
					})
				}
			}
		}
	}
}

// keysOf are the keys of the leaves of what is near, as whoever has read it as a whole knows them.
func keysOf(t *testing.T, near io.ReaderAt, size eris.BlockSize) (keys []eris.Key) {
	t.Helper()
	if u, ok := near.(unreadable); ok {
		near = u.ReaderAt
	}
	if near == nil {
		return nil
	}
	_, err := eris.Encode(t.Context(), io.NewSectionReader(near, 0, math.MaxInt64), nil, eris.EncodeOptions{
		BlockSize: size, Workers: 1,
		Leaves: func(_ int64, pairs []eris.Pair) {
			for _, p := range pairs {
				keys = append(keys, p.Key)
			}
		},
	})
	must(t, err)
	return keys
}

// reading is a reader as a sequence has it.
func reading(r io.ReaderAt) func([]byte, int64) (int, error) {
	if r == nil {
		return nil
	}
	return func(p []byte, offset int64) (int, error) {
		n, err := r.ReadAt(p, offset)
		if err == io.EOF {
			err = nil
		}
		return n, err
	}
}

// leavesFrom counts the leaves, with their padding, that something near does not have.
func leavesFrom(contents []byte, near io.ReaderAt, size int) (n int) {
	other, _ := io.ReadAll(io.NewSectionReader(near, 0, math.MaxInt64))
	leaf := func(b []byte, at int) string {
		leaf := string(b[min(at, len(b)):min(at+size, len(b))])
		if len(leaf) < size {
			leaf += "\x80" // also behind the end, where a leaf of padding alone may be
		}
		return leaf
	}
	for at := 0; at <= len(contents); at += size {
		if at > len(other) || leaf(contents, at) != leaf(other, at) {
			n++
		}
	}
	return n
}
