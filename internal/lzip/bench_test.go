// SPDX-License-Identifier: GPL-3.0-or-later

//go:build unix

package lzip

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/benchdata"
)

// BenchmarkLzip decompresses 32 MiB. If lzip is installed, it does the same in turns, and the ratio
// of processor times is reported: below 1 is faster.
func BenchmarkLzip(b *testing.B) {
	data := benchdata.Archive(32 << 20)
	compressed := compress(b, data, 0x17)
	name := filepath.Join(b.TempDir(), "data.lz")
	if err := os.WriteFile(name, compressed, 0o600); err != nil {
		b.Fatal(err)
	}
	b.Logf("compressed to %.1f %%", 100*float64(len(compressed))/float64(len(data)))

	b.Run("Reader", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			drain(b, compressed)
		}
	})
	b.Run("ratio", func(b *testing.B) {
		lzip := program(b, "lzip")
		b.SetBytes(int64(len(data)))
		ours, theirs := time.Duration(1<<62), time.Duration(1<<62)
		for b.Loop() {
			ours = min(ours, benchdata.Function(func() { drain(b, compressed) }))
			theirs = min(theirs, benchdata.Program(func() {
				if err := exec.Command(lzip, "-t", name).Run(); err != nil {
					b.Fatal(err)
				}
			}))
		}
		b.ReportMetric(ours.Seconds()*1e9/float64(len(data)), "cpu-ns/B")
		b.ReportMetric(theirs.Seconds()*1e9/float64(len(data)), "lzip-cpu-ns/B")
		b.ReportMetric(ours.Seconds()/theirs.Seconds(), "of-lzip")
	})
}

func drain(b *testing.B, compressed []byte) {
	z := NewReader(bytes.NewReader(compressed), 0)
	if _, err := z.WriteTo(io.Discard); err != nil {
		b.Fatal(err)
	}
	z.Close()
}
