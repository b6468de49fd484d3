// SPDX-License-Identifier: GPL-3.0-or-later

package pool_test

import (
	"context"
	"encoding/binary"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
)

// instant is a source that takes no time.
type instant struct{ block []byte }

func (instant) String() string { return "instant:" }
func (instant) Close() error   { return nil }
func (s instant) Get(context.Context, eris.Reference, eris.BlockSize, []byte) ([]byte, error) {
	return s.block, nil
}

// BenchmarkOverhead measures what the pool takes for a block, beside its source.
func BenchmarkOverhead(b *testing.B) {
	s := instant{make([]byte, 1024)}
	for name, list := range map[string][]fetch.Source{"one": {s}, "two": {s, s}} {
		b.Run(name, func(b *testing.B) {
			p := pool.New(list, pool.Options{})
			defer p.Close()
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			b.ReportAllocs()
			var ref eris.Reference
			n := uint64(0)
			for b.Loop() {
				n++
				binary.LittleEndian.PutUint64(ref[:], n)
				if _, err := p.Get(ctx, ref, 1024, nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
