// SPDX-License-Identifier: GPL-3.0-or-later

package cache

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

const (
	small = eris.BlockSize1KiB
	large = eris.BlockSize32KiB
)

// testBlock returns block number i of a size.
func testBlock(i int, size eris.BlockSize) (eris.Reference, []byte) {
	block := make([]byte, size)
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], uint64(i))
	rand.NewChaCha8(seed).Read(block[:64])
	return eris.Sum(block), block
}

// mixed is the size of block number i where both sizes occur.
func mixed(i int) eris.BlockSize {
	if i%16 == 0 {
		return large
	}
	return small
}

func testOpen(t testing.TB, directory string, maxBytes int64) *Cache {
	t.Helper()
	c, err := Open(directory, maxBytes)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// put puts blocks from number first to before last, of sizes that a function tells.
func put(c *Cache, first, last int, size func(int) eris.BlockSize) {
	waiting := 0
	for i := first; i < last; i++ {
		ref, block := testBlock(i, size(i))
		// Not faster than the disk, where blocks could be dropped.
		if waiting += len(block); waiting > c.writer.most {
			c.flush()
			waiting = len(block)
		}
		c.Put(ref, block)
	}
	c.flush()
}

// has tells whether a block is found. It fails if something else is.
func has(t testing.TB, c *Cache, i int, size eris.BlockSize) bool {
	t.Helper()
	ref, want := testBlock(i, size)
	memory := make([]byte, 0, size)
	got, err := c.Get(t.Context(), ref, size, memory)
	if err == nil && !bytes.Equal(got, want) {
		t.Fatalf("block %d is another one", i)
	}
	if err == nil && &got[0] != &memory[:1][0] {
		t.Errorf("block %d is not where there was room for it", i)
	}
	if err != nil && err != eris.ErrNotFound {
		t.Fatal(err)
	}
	return err == nil
}

// count returns how many blocks are found.
func count(t testing.TB, c *Cache, first, last int, size func(int) eris.BlockSize) int {
	t.Helper()
	n := 0
	for i := first; i < last; i++ {
		if has(t, c, i, size(i)) {
			n++
		}
	}
	return n
}

func TestCache(t *testing.T) {
	d := filepath.Join(t.TempDir(), "a", "b")
	c := testOpen(t, d, 64<<20)
	other := testOpen(t, d, 64<<20)
	const n = 2000
	if got := count(t, c, 0, n, mixed); got != 0 {
		t.Errorf("%d blocks in an empty cache", got)
	}
	put(c, 0, n, mixed)
	for name, c := range map[string]*Cache{"same": c, "at the same time": other, "next": testOpen(t, d, 64<<20)} {
		if got := count(t, c, 0, n, mixed); got < n-1 {
			t.Errorf("%s: %d blocks of %d", name, got, n)
		}
		ref, block := testBlock(1, small)
		if !c.Has(t.Context(), ref, small) || c.Has(t.Context(), ref, large) || c.Has(t.Context(), ref, 5) {
			t.Errorf("%s: the cache does not know what it has", name)
		}
		if _, err := c.Get(t.Context(), ref, large, nil); err != eris.ErrNotFound {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := c.Get(t.Context(), ref, 5, nil); err != eris.ErrNotFound {
			t.Errorf("%s: %v", name, err)
		}
		if got, err := c.Get(t.Context(), ref, small, nil); err != nil || !bytes.Equal(got, block) {
			t.Errorf("%s: without memory: %v", name, err)
		}
	}
	// What is there is not written twice, and no other sizes are.
	before := other.ring.head.Load()
	put(other, 0, n, mixed)
	other.Put(eris.Sum(nil), nil)
	other.Put(eris.Sum([]byte("x")), []byte("x"))
	other.flush()
	if written := other.ring.head.Load() - before; written > 64 {
		t.Errorf("%d KiB were written again", written)
	}
	if info, err := os.Stat(d); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("directory: %v, %v", info.Mode(), err)
	}
	if info, err := os.Stat(filepath.Join(d, fileName)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("file: %v, %v", info.Mode(), err)
	}
}

// A cache keeps to its size and has the newest blocks.
func TestBound(t *testing.T) {
	for name, size := range map[string]func(int) eris.BlockSize{
		"1 KiB":  func(int) eris.BlockSize { return small },
		"32 KiB": func(int) eris.BlockSize { return large },
		"mixed":  mixed,
	} {
		t.Run(name, func(t *testing.T) {
			const most = 4 << 20
			d := t.TempDir()
			c := testOpen(t, d, most)
			next, total := 0, 0
			for total < 3*most {
				put(c, next, next+1, size)
				total += int(size(next))
				next++
			}
			if info, err := os.Stat(filepath.Join(d, fileName)); err != nil || info.Size() > most {
				t.Errorf("%d bytes, %v", info.Size(), err)
			}
			found, recent := 0, 0
			for i := next - 1; i >= 0; i-- {
				total -= int(size(i))
				// Not with Get, which writes again what is old.
				ref, _ := testBlock(i, size(i))
				if block, _ := c.get(&ref, size(i), nil); block != nil {
					found += int(size(i))
					if total > 2*most+most/2 {
						recent += int(size(i))
					}
				}
			}
			if recent < most/2*98/100 || found < most*90/100 || found > most {
				t.Errorf("%d bytes are found, of the last %d bytes %d", found, most/2, recent)
			}
		})
	}
}

// Blocks that are used stay, however many others come.
func TestUsedStay(t *testing.T) {
	c := testOpen(t, t.TempDir(), 4<<20)
	put(c, 0, 100, mixed)
	for i := 1000; i < 9000; i += 100 { // some 300 KiB, many times
		put(c, i, i+100, mixed)
		if got := count(t, c, 0, 100, mixed); got < 90 {
			t.Fatalf("%d blocks of 100 that are used are left after %d others", got, i-900)
		}
		c.flush()
	}
}

// Whatever happens to the file, no wrong block is found, and the cache goes on or
// is at least replaced by the next process.
func TestDamage(t *testing.T) {
	const most, n = 1 << 20, 600
	all := func(int) eris.BlockSize { return small }
	random := rand.New(rand.NewPCG(1, 2))
	for name, damage := range map[string]func(b []byte) []byte{
		"bits":        func(b []byte) []byte { flip(random, b, 1000); return b },
		"head":        func(b []byte) []byte { flip(random, b[:headLength], 1000); return b },
		"counter":     func(b []byte) []byte { flip(random, b[counterAt:counterAt+8], 10); return b },
		"counter low": func(b []byte) []byte { binary.LittleEndian.PutUint64(b[counterAt:], 1000); return b },
		"counter 0":   func(b []byte) []byte { clear(b[counterAt : counterAt+8]); return b },
		"table":       func(b []byte) []byte { flip(random, b[headLength:headLength+4*bucketLength], 4000); return b },
		"zeros":       func(b []byte) []byte { clear(b); return b },
		"ones":        func(b []byte) []byte { return bytes.Repeat([]byte{0xff}, len(b)) },
		"empty":       func(b []byte) []byte { return nil },
		"cut":         func(b []byte) []byte { return b[:len(b)/2] },
		"cut table":   func(b []byte) []byte { return b[:headLength+100] },
		"cut head":    func(b []byte) []byte { return b[:10] },
		"longer":      func(b []byte) []byte { return append(b, make([]byte, 1<<20)...) },
	} {
		t.Run(name, func(t *testing.T) {
			d := t.TempDir()
			running, err := Open(d, most)
			if err != nil {
				t.Fatal(err)
			}
			put(running, 0, n, all)
			file := filepath.Join(d, fileName)
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, damage(b), 0o600); err != nil { // the same file: others have it open
				t.Fatal(err)
			}
			count(t, running, 0, n, all)
			put(running, n, 2*n, all)
			count(t, running, 0, 2*n, all)
			running.Close()
			next := testOpen(t, d, most)
			count(t, next, 0, 2*n, all)
			put(next, 2*n, 3*n, all)
			if got := count(t, next, 2*n, 3*n, all); got < n-n/50 {
				t.Errorf("%d blocks of %d after damage", got, n)
			}
		})
	}
}

func flip(random *rand.Rand, b []byte, times int) {
	for range times {
		b[random.IntN(len(b))] ^= 1 << random.IntN(8)
	}
}

// What is no cache of this size under the name is replaced, and what it refers to
// is left alone.
func TestReplace(t *testing.T) {
	victim := filepath.Join(t.TempDir(), "victim")
	for name, prepare := range map[string]func(file string) error{
		"text":      func(f string) error { return os.WriteFile(f, []byte("text"), 0o600) },
		"symlink":   func(f string) error { return os.Symlink(victim, f) },
		"dangling":  func(f string) error { return os.Symlink(victim+"-absent", f) },
		"FIFO":      func(f string) error { return syscall.Mkfifo(f, 0o600) },
		"socket":    func(f string) error { return syscall.Mknod(f, syscall.S_IFSOCK|0o600, 0) },
		"other":     func(f string) error { return makeCache(filepath.Dir(f), 2<<20) },
		"writable":  func(f string) error { return errors.Join(makeCache(filepath.Dir(f), 1<<20), os.Chmod(f, 0o666)) },
		"same size": func(f string) error { return makeCache(filepath.Dir(f), 1<<20) },
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(victim, []byte("victim"), 0o600); err != nil {
				t.Fatal(err)
			}
			d := t.TempDir()
			os.Chmod(d, 0o700)
			if err := prepare(filepath.Join(d, fileName)); err != nil {
				t.Fatal(err)
			}
			c := testOpen(t, d, 1<<20)
			if got := has(t, c, -1, small); got != (name == "same size") {
				t.Errorf("a block is there: %v", got)
			}
			put(c, 0, 100, mixed)
			if got := count(t, c, 0, 100, mixed); got < 90 {
				t.Errorf("%d blocks of 100", got)
			}
			if b, err := os.ReadFile(victim); err != nil || string(b) != "victim" {
				t.Errorf("a file elsewhere is now %q, %v", b, err)
			}
			if _, err := os.Lstat(victim + "-absent"); !errors.Is(err, os.ErrNotExist) {
				t.Error("a file has been made elsewhere")
			}
		})
	}
}

func makeCache(directory string, most int64) error {
	c, err := Open(directory, most)
	if err != nil {
		return err
	}
	put(c, -1, 0, func(int) eris.BlockSize { return small })
	return c.Close()
}

func TestOpenFails(t *testing.T) {
	d := t.TempDir()
	writable := filepath.Join(d, "writable")
	if err := errors.Join(os.Mkdir(writable, 0o700), os.Chmod(writable, 0o777)); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(d, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	occupied := filepath.Join(d, "occupied")
	if err := os.MkdirAll(filepath.Join(occupied, fileName, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		directory string
		most      int64
	}{
		"others can write":   {writable, 1 << 20},
		"a file":             {file, 1 << 20},
		"below a file":       {file + "/x/y", 1 << 20},
		"a directory within": {occupied, 1 << 20},
		"too small":          {filepath.Join(d, "small"), 1<<20 - 1},
		"nothing":            {filepath.Join(d, "nothing"), 0},
		"negative":           {filepath.Join(d, "negative"), -1 << 62},
		"too large":          {filepath.Join(d, "large"), 1 << 62},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Open(test.directory, test.most); err == nil || !strings.Contains(err.Error(), test.directory) {
				t.Errorf("error %v", err)
			}
			var told []error
			c := OpenLater(test.directory, test.most, func(err error) { told = append(told, err) })
			put(c, 0, 10, mixed)
			if got := count(t, c, 0, 10, mixed); got != 0 || len(told) != 1 {
				t.Errorf("%d blocks are kept nowhere; told: %q", got, told)
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	if entries, err := os.ReadDir(writable); err != nil || len(entries) != 0 {
		t.Errorf("%v, %v", entries, err)
	}
	var none *Cache
	none.Put(testBlock(1, small))
	if has(t, none, 1, small) || none.Has(t.Context(), eris.Reference{}, small) || none.Close() != nil {
		t.Error("no cache has a block")
	}
}

// Nothing is opened or made before there is need, or after Close.
func TestLater(t *testing.T) {
	d := filepath.Join(t.TempDir(), "cache")
	absent := func() {
		t.Helper()
		if _, err := os.Lstat(d); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("%s is there: %v", d, err)
		}
	}
	c := OpenLater(d, 1<<20, func(err error) { t.Error(err) })
	absent()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	put(c, 0, 1, mixed)
	if has(t, c, 0, large) {
		t.Error("a closed cache has blocks")
	}
	absent()
	c = OpenLater(d, 1<<20, func(err error) { t.Error(err) })
	put(c, 0, 100, mixed)
	if got := count(t, c, 0, 100, mixed); got < 90 {
		t.Errorf("%d blocks of 100", got)
	}
	for range 2 {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	put(c, 100, 200, mixed)
	if count(t, c, 0, 200, mixed) != 0 {
		t.Error("a closed cache has blocks")
	}
}

// Close may come at any time.
func TestCloseInUse(t *testing.T) {
	d := t.TempDir()
	for range 20 {
		c, err := Open(d, 4<<20)
		if err != nil {
			t.Fatal(err)
		}
		var group sync.WaitGroup
		started := make(chan struct{}, 8)
		for g := range 8 {
			group.Go(func() {
				for i := range 500 {
					if i == 20 {
						started <- struct{}{}
					}
					c.Put(testBlock(g*1000+i, mixed(i)))
					has(t, c, g*1000+i/2, mixed(i/2))
				}
			})
		}
		<-started
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		group.Wait()
	}
}

// Files that were being made by processes that were killed are removed, those of
// others that may be at it are not.
func TestTemporary(t *testing.T) {
	d := t.TempDir()
	os.Chmod(d, 0o700)
	for name, age := range map[string]time.Duration{temporaryPrefix + "old": 2 * temporaryAge, temporaryPrefix + "new": 0, "foreign": 2 * temporaryAge} {
		name = filepath.Join(d, name)
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(name, time.Time{}, time.Now().Add(-age)); err != nil {
			t.Fatal(err)
		}
	}
	testOpen(t, d, 1<<20)
	entries, err := os.ReadDir(d)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if got := strings.Join(names, " "); err != nil || got != temporaryPrefix+"new "+fileName+" foreign" {
		t.Errorf("%s, %v", got, err)
	}
}

// A process that has been stopped while it held the lock stops nobody: blocks are
// not kept meanwhile.
func TestStuckLock(t *testing.T) {
	d := t.TempDir()
	c, err := Open(d, 8<<20)
	if err != nil {
		t.Fatal(err)
	}
	put(c, 0, 100, mixed)
	f, err := os.Open(filepath.Join(d, fileName))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	for i := 100; i < 20000; i++ {
		c.Put(testBlock(i, mixed(i)))
	}
	c.flush()
	if got := count(t, c, 0, 100, mixed); got < 90 {
		t.Errorf("%d blocks of 100", got)
	}
	if got := count(t, c, 100, 20000, mixed); got != 0 {
		t.Errorf("%d blocks are kept while another process has the lock", got)
	}
	if err := c.Close(); !errors.Is(err, errBusy) {
		t.Error(err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	c = testOpen(t, d, 8<<20)
	put(c, 100, 200, mixed)
	if got := count(t, c, 0, 200, mixed); got < 198 {
		t.Errorf("%d blocks of 200", got)
	}
}

// The file may be anything.
func FuzzFile(f *testing.F) {
	const most = leastBytes
	d := f.TempDir()
	c := testOpen(f, d, most)
	put(c, 0, 100, mixed)
	good, err := os.ReadFile(filepath.Join(d, fileName))
	if err != nil {
		f.Fatal(err)
	}
	file := filepath.Join(d, "file")
	f.Add(good[:headLength], 0)
	f.Add(good[headLength:headLength+10*bucketLength], headLength)
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x3f}, counterAt)
	f.Fuzz(func(t *testing.T, b []byte, at int) {
		damaged := bytes.Clone(good)
		if at < 0 || at > len(damaged) {
			return
		}
		copy(damaged[at:], b)
		if err := os.WriteFile(file, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file, filepath.Join(d, fileName)); err != nil {
			t.Fatal(err)
		}
		c := testOpen(t, d, most)
		for i := range 20 {
			has(t, c, i, mixed(i))
		}
		put(c, 1000, 1020, mixed)
		for i := range 20 {
			has(t, c, 1000+i, mixed(1000+i))
		}
	})
}

var benchContext = context.Background()

// cpu reports the time of the processor per operation, which other work on the
// machine does not change much.
func cpu(b *testing.B) func() {
	used := func() int64 {
		var r unix.Rusage
		unix.Getrusage(unix.RUSAGE_SELF, &r)
		return r.Utime.Nano() + r.Stime.Nano()
	}
	before := used()
	return func() { b.ReportMetric(float64(used()-before)/float64(b.N), "cpu-ns/op") }
}

// BenchmarkPut keeps blocks that are new: by Put, and as Through does, which has
// looked for them already.
func BenchmarkPut(b *testing.B) {
	for name, size := range map[string]eris.BlockSize{"1KiB": small, "32KiB": large} {
		bench := func(b *testing.B, put func(c *Cache, ref *eris.Reference, block []byte)) {
			c := testOpen(b, b.TempDir(), 512<<20)
			ref, block := testBlock(0, size)
			c.Has(benchContext, ref, size) // opens it
			i := uint64(0)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			defer cpu(b)()
			for b.Loop() {
				// Other references, without the time for their computation.
				i += 0x9e3779b97f4a7c15
				binary.LittleEndian.PutUint64(ref[:], i)
				binary.LittleEndian.PutUint64(ref[16:], i)
				put(c, &ref, block)
			}
			c.flush()
		}
		b.Run(name, func(b *testing.B) {
			bench(b, func(c *Cache, ref *eris.Reference, block []byte) { c.Put(*ref, block) })
		})
		b.Run("missing/"+name, func(b *testing.B) { bench(b, (*Cache).putMissing) })
	}
}

func BenchmarkGet(b *testing.B) {
	for name, size := range map[string]eris.BlockSize{"1KiB": small, "32KiB": large} {
		c := testOpen(b, b.TempDir(), 128<<20)
		const n = 1000
		refs := make([]eris.Reference, n)
		for i := range n {
			var block []byte
			refs[i], block = testBlock(i, size)
			c.Put(refs[i], block)
		}
		c.flush()
		b.Run("hit/"+name, func(b *testing.B) {
			dst := make([]byte, 0, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			defer cpu(b)()
			for i := 0; b.Loop(); i++ {
				if _, err := c.Get(benchContext, refs[i%n], size, dst); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run("hash/"+name, func(b *testing.B) {
			_, block := testBlock(1, size)
			b.SetBytes(int64(size))
			defer cpu(b)()
			for b.Loop() {
				eris.Sum(block)
			}
		})
	}
	c := testOpen(b, b.TempDir(), 128<<20)
	b.Run("miss", func(b *testing.B) {
		dst := make([]byte, 0, large)
		ref, _ := testBlock(0, small)
		b.ReportAllocs()
		defer cpu(b)()
		for i := uint64(0); b.Loop(); i += 0x9e3779b97f4a7c15 {
			binary.LittleEndian.PutUint64(ref[:], i)
			if _, err := c.Get(benchContext, ref, large, dst); err == nil {
				b.Fatal("a block")
			}
		}
	})
}

// BenchmarkOpen opens a cache with 2 GiB of blocks of 1 KiB, and gets one.
func BenchmarkOpen(b *testing.B) {
	if testing.Short() {
		b.Skip("this needs 2 GiB of disk")
	}
	d := b.TempDir()
	c := testOpen(b, d, 2<<30)
	ref, block := testBlock(0, small)
	for i := uint64(1); i < 2<<20; i++ {
		binary.LittleEndian.PutUint64(ref[:], i*0x9e3779b97f4a7c15)
		binary.LittleEndian.PutUint64(ref[16:], i*0x9e3779b97f4a7c15)
		c.add(&ref, block)
		if i%512 == 0 {
			c.flush() // so that none is dropped where the disk is slow
		}
	}
	c.flush()
	put(c, 1, 2, func(int) eris.BlockSize { return small })
	defer cpu(b)()
	for b.Loop() {
		next, err := Open(d, 2<<30)
		if err != nil {
			b.Fatal(err)
		}
		if !has(b, next, 1, small) {
			b.Fatal("the last block is not there")
		}
		next.Close()
	}
}
