// SPDX-License-Identifier: GPL-3.0-or-later

//go:build unix

package decompress

import (
	"bytes"
	stdgzip "compress/gzip"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/benchdata"
)

// bench decompresses 32 MiB with Open, with other decoders and, if it is installed, with a program,
// in turns, and reports the ratios of processor times: below 1, Open is faster.
func bench(b *testing.B, method string, compressed []byte, size int, others map[string]func(), program ...string) {
	b.Logf("compressed to %.1f %%", 100*float64(len(compressed))/float64(size))
	ours := func() {
		z := open(b, method, bytes.NewReader(compressed))
		n, err := io.Copy(discard{}, z)
		if err != nil || n != int64(size) {
			b.Fatal(n, err)
		}
		z.Close()
	}
	b.Run("Open", func(b *testing.B) {
		b.SetBytes(int64(size))
		for b.Loop() {
			ours()
		}
	})
	least := func(a, b time.Duration) time.Duration {
		if a == 0 || b < a {
			return b
		}
		return a
	}
	if path, err := exec.LookPath(program[0]); err == nil {
		name := filepath.Join(b.TempDir(), "data."+method)
		must(b, os.WriteFile(name, compressed, 0o600))
		b.Run("ratio to the program "+program[0], func(b *testing.B) {
			var mine, theirs time.Duration
			for b.Loop() {
				mine = least(mine, benchdata.Function(ours))
				theirs = least(theirs, benchdata.Program(func() {
					must(b, exec.Command(path, append(program[1:len(program):len(program)], name)...).Run())
				}))
			}
			b.ReportMetric(mine.Seconds()*1e9/float64(size), "cpu-ns/B")
			b.ReportMetric(mine.Seconds()/theirs.Seconds(), "ratio")
		})
	}
	for name, other := range others {
		b.Run("ratio to "+name, func(b *testing.B) {
			var mine, theirs time.Duration
			for b.Loop() {
				mine = least(mine, benchdata.Function(ours))
				theirs = least(theirs, benchdata.Function(other))
			}
			b.ReportMetric(mine.Seconds()/theirs.Seconds(), "ratio")
		})
	}
}

// discard is io.Discard without its buffers.
type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

func BenchmarkGzip(b *testing.B) {
	data := benchdata.Archive(32 << 20)
	var w bytes.Buffer
	z, err := gzip.NewWriterLevel(&w, 9)
	must(b, err)
	write(b, z, data)
	compressed := w.Bytes()
	bench(b, "gzip", compressed, len(data), map[string]func(){
		"compress-gzip": func() {
			z, err := stdgzip.NewReader(bytes.NewReader(compressed))
			must(b, err)
			_, err = io.Copy(discard{}, z)
			must(b, err)
		},
	}, "gzip", "-t")
}

func BenchmarkZstd(b *testing.B) {
	data := benchdata.Archive(32 << 20)
	var w bytes.Buffer
	z, err := zstd.NewWriter(&w, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithWindowSize(8<<20))
	must(b, err)
	write(b, z, data)
	compressed := w.Bytes()
	bench(b, "zstd", compressed, len(data), map[string]func(){
		"concurrent-klauspost": func() {
			z, err := zstd.NewReader(bytes.NewReader(compressed), zstd.WithDecoderConcurrency(2))
			must(b, err)
			_, err = io.Copy(discard{}, z)
			must(b, err)
			z.Close()
		},
	}, "zstd", "-tq")
}
