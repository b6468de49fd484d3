// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/decompress"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

// BenchmarkDecompress decompresses 32 MiB, and then does that in turns with the program and with
// other decoders. It reports the ratios of processor times: below 1, ours is faster.
func BenchmarkDecompress(b *testing.B) {
	data := archive(32 << 20)
	for _, test := range []struct {
		method, compress, check string
		other                   func(io.Reader) (io.Reader, error)
	}{
		{"gzip", "gzip -9", "gzip -t", func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) }},
		{"zstd", "zstd -19", "zstd -tq", func(r io.Reader) (io.Reader, error) {
			return zstd.NewReader(r, zstd.WithDecoderConcurrency(2))
		}},
		{"lzip", "lzip -9", "lzip -t", nil},
	} {
		b.Run(test.method, func(b *testing.B) {
			if _, err := exec.LookPath(test.method); err != nil {
				b.Skip(err)
			}
			cmd := command(test.compress, "-c")
			cmd.Stdin = bytes.NewReader(data)
			compressed, err := cmd.Output()
			must(b, err)
			b.Logf("compressed to %.1f %%", 100*float64(len(compressed))/float64(len(data)))
			drain := func(r io.Reader, err error) {
				must(b, err)
				n, err := io.CopyBuffer(discard{}, struct{ io.Reader }{r}, make([]byte, 64<<10))
				must(b, err)
				if n != int64(len(data)) {
					b.Fatalf("%d bytes", n)
				}
			}
			ours := func() {
				z, err := decompress.Open(test.method, bytes.NewReader(compressed))
				drain(z, err)
				z.Close()
			}
			b.Run("Open", func(b *testing.B) {
				b.SetBytes(int64(len(data)))
				for b.Loop() {
					ours()
				}
			})
			ratio := func(name string, who int, theirs func()) {
				b.Run("ratio to "+name, func(b *testing.B) {
					least, leastOther := time.Duration(1<<62), time.Duration(1<<62)
					for b.Loop() {
						least = min(least, processorTime(syscall.RUSAGE_SELF, ours))
						leastOther = min(leastOther, processorTime(who, theirs))
					}
					b.ReportMetric(least.Seconds()*1e9/float64(len(data)), "cpu-ns/B")
					b.ReportMetric(least.Seconds()/leastOther.Seconds(), "ratio")
				})
			}
			name := filepath.Join(b.TempDir(), "data."+strings.Replace(test.method, "lzip", "lz", 1))
			must(b, os.WriteFile(name, compressed, 0o600))
			ratio("program", syscall.RUSAGE_CHILDREN, func() { must(b, command(test.check, name).Run()) })
			if test.other != nil {
				ratio("another decoder", syscall.RUSAGE_SELF, func() { drain(test.other(bytes.NewReader(compressed))) })
			}
		})
	}
}

func command(words string, more ...string) *exec.Cmd {
	args := append(strings.Fields(words), more...)
	return exec.Command(args[0], args[1:]...)
}

var must = testhelp.Must

// discard is io.Discard without its buffers.
type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

// processorTime returns how much processor time f takes, system calls included: in this process, or
// in those that f starts and waits for.
func processorTime(who int, f func()) time.Duration {
	used := func() time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(who, &u); err != nil {
			panic(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	before := used()
	f()
	return used() - before
}
