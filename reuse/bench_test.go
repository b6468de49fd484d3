// SPDX-License-Identifier: GPL-3.0-or-later

package reuse

import (
	"math/rand/v2"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

// BenchmarkReuse makes an item of 256 MB, of which a part of the files has hashes, and reports what
// it costs for each GB: user and system time of all processors.
func BenchmarkReuse(b *testing.B) {
	for _, bench := range []struct {
		name   string
		miss   bool
		hashed int // of 16 files
	}{{"few hashes", false, 1}, {"half", false, 8}, {"all", false, 16}, {"miss", true, 1}} {
		b.Run(bench.name, func(b *testing.B) {
			s := newTestStore(b)
			contents := mixed(1 << 20)
			_, want := s.both("x-1.0", []string{"bash-5.1"}, func(item string, refs []string) map[string]string {
				files := map[string]string{}
				for i := range 256 {
					files[hash(i)[:20]] = contents
					if i%16 < bench.hashed {
						files[hash(i)[:20]] = contents[:1<<19] + refs[0] + contents[1<<19:]
					}
				}
				return files
			})
			if bench.miss {
				want.NarDigest[0]++
			}
			measure(b, want, func() {
				f := s.finder()
				f.MissesFile, f.misses.path = "", ""
				if c, failures := s.attempt(f, want); c == nil != bench.miss {
					b.Fatal(failures)
				}
			})
		})
	}
}

// BenchmarkBase makes an item of 256 MB from an old one and some blocks, where a part of the files
// has hashes, and one of them another byte, and reports the same.
func BenchmarkBase(b *testing.B) {
	for _, bench := range []struct {
		name   string
		files  int // of 256
		hashed int // of 16 of them
	}{{"few hashes", 256, 1}, {"all", 256, 16}, {"one file", 1, 16}, {"small files", 16384, 1}} {
		b.Run(bench.name, func(b *testing.B) {
			s := newTestStore(b)
			contents := mixed(256 << 20 / bench.files)
			_, want, p := s.publishedTwice("x-1.0", []string{"bash-5.1"}, func(item string, refs []string) {
				files := map[string]string{}
				for i := range bench.files {
					files[hash(i)[:20]] = contents
					if i%16 < bench.hashed {
						files[hash(i)[:20]] = contents[:len(contents)/2] + refs[0] + contents[len(contents)/2:]
					}
				}
				files[hash(0)[:20]] += item[:3]
				s.write(item, files)
			})
			measure(b, want, func() { s.get(want, p, s.base(s.finder(), want)) })
		})
	}
}

// measure reports what it costs to make an item.
func measure(b *testing.B, want *narinfo.Narinfo, make func()) {
	usage := func() (u unix.Rusage) {
		unix.Getrusage(unix.RUSAGE_SELF, &u)
		return u
	}
	before, bytes := usage(), 0.0
	for b.Loop() {
		make()
		bytes += float64(want.NarSize)
		b.StopTimer()
		restore.Remove(want.StorePath)
		b.StartTimer()
	}
	after := usage()
	b.ReportMetric(float64(after.Utime.Nano()-before.Utime.Nano())/bytes, "user-s/GB")
	b.ReportMetric(float64(after.Stime.Nano()-before.Stime.Nano())/bytes, "system-s/GB")
	b.SetBytes(int64(want.NarSize))
}

// mixed is what a program looks like: text, tables and what has no pattern.
func mixed(size int) string {
	r := rand.New(rand.NewPCG(3, 4))
	var b strings.Builder
	for b.Len() < size {
		switch r.IntN(3) {
		case 0:
			b.WriteString("some text with words, and_names_of_functions in it\x00")
		case 1:
			for range 16 {
				b.Write([]byte{byte(r.Uint32()), byte(r.IntN(4)), 0, 0})
			}
		default:
			for range 64 {
				b.WriteByte(byte(r.Uint32()))
			}
		}
	}
	return b.String()[:size]
}
