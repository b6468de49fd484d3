// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"bytes"
	"fmt"
	"testing"
)

func BenchmarkEncode(b *testing.B) {
	content := randomContent(1, 16<<20)
	for _, size := range bothSizes {
		for _, workers := range []int{1, 2} {
			b.Run(fmt.Sprintf("%v/%d", size, workers), func(b *testing.B) {
				b.SetBytes(int64(len(content)))
				for b.Loop() {
					if _, err := Encode(b.Context(), bytes.NewReader(content), nil, EncodeOptions{BlockSize: size, Workers: workers}); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// BenchmarkEncodeSmall encodes contents of one small block, as trees of many files have them.
func BenchmarkEncodeSmall(b *testing.B) {
	for _, n := range []int{100, 10000} {
		content := randomContent(1, n)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Encode(b.Context(), bytes.NewReader(content), nil, EncodeOptions{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
