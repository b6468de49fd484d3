// SPDX-License-Identifier: GPL-3.0-or-later

package content

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync/atomic"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// TestNear reads contents of which something like them is near, and counts the leaves that are
// requested all the same.
func TestNear(t *testing.T) {
	for _, size := range bothSizes {
		for _, leaves := range []int{1, 2, 3, 20, 40} {
			if leaves*int(size) > 1<<20 {
				continue // no more nodes than with fewer leaves
			}
			for _, rest := range []int{0, 1, int(size) - 1} {
				contents := randomContent(byte(leaves+rest), (leaves-1)*int(size)+rest)
				capability, backend := mustEncode(t, contents, eris.EncodeOptions{BlockSize: size})
				nodes := 0
				for n := leaves; n > 1; {
					n = (n + size.Arity() - 1) / size.Arity()
					nodes += n
				}
				changed := func(at int) []byte {
					b := slices.Clone(contents)
					if at >= 0 && at < len(b) {
						b[at]++
					}
					return b
				}
				for name, near := range map[string][]byte{
					"the same":   contents,
					"nothing":    nil,
					"empty":      {},
					"begin":      changed(0),
					"end":        changed(len(contents) - 1),
					"longer":     append(slices.Clone(contents), 0x80),
					"shorter":    contents[:max(0, len(contents)-1)],
					"unreadable": contents, // but for the first leaf
				} {
					want := Want{Capability: capability, Limit: int64(len(contents)), NearKeys: keysOf(t, near, size)}
					want.Near = func(p []byte, offset int64) (int, error) {
						if name == "unreadable" && offset > 0 {
							return 17, errors.New("cannot be read")
						}
						return copy(p, near[min(offset, int64(len(near))):]), nil
					}
					missing := leavesFrom(contents, near, int(size))
					if name == "unreadable" {
						missing = leaves - 1
					}
					var requests atomic.Int64
					get := counted(backend.Get, &requests)
					t.Run(fmt.Sprintf("%s/%d+%d/%s", size, leaves, rest, name), func(t *testing.T) {
						for _, source := range []fetch.Source{open(t, get), openImmediate(t, get)} {
							for _, window := range []fetch.Window{{}, {Requests: 1, Bytes: 1}} {
								requests.Store(0)
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
func keysOf(t *testing.T, near []byte, size eris.BlockSize) (keys []eris.Key) {
	t.Helper()
	if near == nil {
		return nil
	}
	_, err := eris.Encode(t.Context(), bytes.NewReader(near), nil, eris.EncodeOptions{
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

// leavesFrom counts the leaves, with their padding, that something near does not have.
func leavesFrom(contents, near []byte, size int) (n int) {
	leaf := func(b []byte, at int) string {
		leaf := string(b[min(at, len(b)):min(at+size, len(b))])
		if len(leaf) < size {
			leaf += "\x80" // also behind the end, where a leaf of padding alone may be
		}
		return leaf
	}
	for at := 0; at <= len(contents); at += size {
		if near == nil || at > len(near) || leaf(contents, at) != leaf(near, at) {
			n++
		}
	}
	return n
}
