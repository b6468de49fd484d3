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
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var must = testhelp.Must

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
	c := Open(directory, maxBytes, func(err error) { t.Error(err) })
	t.Cleanup(func() { must(t, closeSurely(c)) })
	return c
}

// closeSurely closes a cache, which waits for two seconds only: once more if the machine has done
// something else.
func closeSurely(c *Cache) error {
	if c.Close() == nil {
		return nil
	}
	return c.Close()
}

// Blocks that come together are written together in a large cache too: a part of this one is more
// bytes than an int of 32 bits can say.
func TestLargeBatch(t *testing.T) {
	c := testOpen(t, t.TempDir(), 8<<20)
	must(t, put(c, 0, 1, mixed))
	c.maxBytes = 64 << 30
	must(t, put(c, 0, 32, func(int) eris.BlockSize { return large }))
	if n := len(c.buffer); n != mostBatch {
		t.Errorf("%d bytes were written at a time", n)
	}
}

// TestMakeRoom gives the room of blocks back: that cache has none any more, another one those that
// come later.
func TestMakeRoom(t *testing.T) {
	directory := t.TempDir()
	c, other := testOpen(t, directory, 8<<20), testOpen(t, directory, 8<<20)
	must(t, put(c, 0, 100, mixed))
	if other.MakeRoom("/proc") {
		t.Error("on another file system")
	}
	if !c.MakeRoom(directory) || c.MakeRoom(directory) {
		t.Error("not once")
	}
	must(t, put(c, 0, 100, mixed))
	if n := count(t, c, 0, 100, mixed) + count(t, other, 0, 100, mixed); n != 0 {
		t.Errorf("%d blocks are there", n)
	}
	must(t, put(other, 50, 150, mixed))
	if n := count(t, other, 50, 150, mixed); n != 100 {
		t.Errorf("%d blocks are there", n)
	}
}

// put keeps blocks from number first to before last, of sizes that a function tells.
func put(c *Cache, first, last int, size func(int) eris.BlockSize) error {
	var errs []error
	for i := first; i < last; {
		var refs []eris.Reference
		var blocks [][]byte
		for ; i < last && len(refs) < 256; i++ {
			ref, block := testBlock(i, size(i))
			refs, blocks = append(refs, ref), append(blocks, block)
		}
		errs = append(errs, c.Keep(benchContext, refs, blocks))
	}
	return errors.Join(errs...)
}

// has reports whether a block is found.
func has(t testing.TB, c *Cache, i int, size eris.BlockSize) bool {
	t.Helper()
	ref, want := testBlock(i, size)
	memory := make([]byte, 0, size)
	got, err := fetch.Get(t.Context(), c, ref, size, memory)
	if err == nil && !bytes.Equal(got, want) {
		t.Fatalf("block %d is another one", i)
	}
	if err == nil && &got[0] != &memory[:1][0] {
		t.Errorf("block %d is not where there was room for it", i)
	}
	return err == nil
}

// peek reports whether a block is there, without using it.
func peek(c *Cache, i int, size eris.BlockSize) bool {
	ref, _ := testBlock(i, size)
	r, position := c.find(&ref, size)
	if r == nil {
		return false
	}
	block := make([]byte, size)
	ok, err := r.read(block, position)
	return ok && err == nil && eris.Verify(ref, block) == nil
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
		for _, size := range []eris.BlockSize{large, 5} {
			if _, err := fetch.Get(t.Context(), c, ref, size, nil); !errors.Is(err, eris.ErrNotFound) {
				t.Errorf("%s: %v", name, err)
			}
		}
		if got, err := fetch.Get(t.Context(), c, ref, small, nil); err != nil || !bytes.Equal(got, block) {
			t.Errorf("%s: without memory: %v", name, err)
		}
	}
	for _, block := range [][]byte{nil, []byte("x")} {
		if c.Keep(t.Context(), []eris.Reference{eris.Sum(block)}, [][]byte{block}) == nil {
			t.Errorf("a block of %d bytes is kept", len(block))
		}
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
				// Not by a request, which writes again what is old.
				if peek(c, i, size(i)) {
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
	}
}

// Whatever happens to the file, no wrong block is found, and the cache goes on or is at least
// replaced by the next process.
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
			running := Open(d, most, nil)
			put(running, 0, n, all)
			file := filepath.Join(d, fileName)
			b, err := os.ReadFile(file)
			must(t, err)
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

// What is no cache of this size under the name is replaced, and what it refers to is left alone.
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
			must(t, os.WriteFile(victim, []byte("victim"), 0o600))
			d := t.TempDir()
			os.Chmod(d, 0o700)
			must(t, prepare(filepath.Join(d, fileName)))
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
	c := Open(directory, most, nil)
	return errors.Join(put(c, -1, 0, func(int) eris.BlockSize { return small }), closeSurely(c))
}

func TestOpenFails(t *testing.T) {
	d := t.TempDir()
	writable := filepath.Join(d, "writable")
	must(t, errors.Join(os.Mkdir(writable, 0o700), os.Chmod(writable, 0o777)))
	file := filepath.Join(d, "file")
	must(t, os.WriteFile(file, nil, 0o600))
	occupied := filepath.Join(d, "occupied")
	must(t, os.MkdirAll(filepath.Join(occupied, fileName, "x"), 0o700))
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
			var told []error
			c := Open(test.directory, test.most, func(err error) { told = append(told, err) })
			put(c, 0, 10, mixed)
			if got := count(t, c, 0, 10, mixed); got != 0 || len(told) != 1 || !strings.Contains(told[0].Error(), test.directory) {
				t.Errorf("%d blocks are kept nowhere; told: %q", got, told)
			}
			must(t, closeSurely(c))
		})
	}
	if entries, err := os.ReadDir(writable); err != nil || len(entries) != 0 {
		t.Errorf("%v, %v", entries, err)
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
	c := Open(d, 1<<20, func(err error) { t.Error(err) })
	absent()
	must(t, closeSurely(c))
	put(c, 0, 1, mixed)
	if has(t, c, 0, large) {
		t.Error("a closed cache has blocks")
	}
	absent()
	c = Open(d, 1<<20, func(err error) { t.Error(err) })
	put(c, 0, 100, mixed)
	if got := count(t, c, 0, 100, mixed); got < 90 {
		t.Errorf("%d blocks of 100", got)
	}
	for range 2 {
		must(t, closeSurely(c))
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
		c := Open(d, 4<<20, nil)
		var group sync.WaitGroup
		started := make(chan struct{}, 8)
		for g := range 8 {
			group.Go(func() {
				for i := range 500 {
					if i == 20 {
						started <- struct{}{}
					}
					put(c, g*1000+i, g*1000+i+1, func(int) eris.BlockSize { return mixed(i) })
					has(t, c, g*1000+i/2, mixed(i/2))
				}
			})
		}
		<-started
		err := c.Close()
		group.Wait()
		if err != nil {
			must(t, closeSurely(c))
		}
	}
}

// Files that were being made by processes that were killed are removed, those of others that may be
// at it are not.
func TestTemporary(t *testing.T) {
	d := t.TempDir()
	os.Chmod(d, 0o700)
	for name, age := range map[string]time.Duration{files.TemporaryPrefix + strings.Repeat("A", 26): 48 * time.Hour, files.TemporaryPrefix + "new": 0, "foreign": 48 * time.Hour} {
		name = filepath.Join(d, name)
		must(t, os.WriteFile(name, nil, 0o600))
		must(t, os.Chtimes(name, time.Time{}, time.Now().Add(-age)))
	}
	has(t, testOpen(t, d, 1<<20), 1, small)
	entries, err := os.ReadDir(d)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if got := strings.Join(names, " "); err != nil || got != files.TemporaryPrefix+"new "+fileName+" foreign" {
		t.Errorf("%s, %v", got, err)
	}
}

// A process that has been stopped while it held the lock stops nobody: blocks are not kept
// meanwhile.
func TestStuckLock(t *testing.T) {
	d := t.TempDir()
	c := testOpen(t, d, 8<<20)
	put(c, 0, 100, mixed)
	f, err := os.Open(filepath.Join(d, fileName))
	must(t, err)
	defer f.Close()
	must(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
	if err := put(c, 100, 300, mixed); !errors.Is(err, files.ErrLocked) {
		t.Error(err)
	}
	if got := count(t, c, 0, 300, mixed); got < 90 || got > 100 {
		t.Errorf("%d blocks of 100, while another process has the lock", got)
	}
	must(t, unix.Flock(int(f.Fd()), unix.LOCK_UN))
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
	must(f, err)
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
		must(t, os.WriteFile(file, damaged, 0o600))
		must(t, os.Rename(file, filepath.Join(d, fileName)))
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

// cpu reports the time of the processor per operation, which other work on the machine does not
// change much.
func cpu(b *testing.B) func() {
	used := func() int64 {
		var r unix.Rusage
		unix.Getrusage(unix.RUSAGE_SELF, &r)
		return r.Utime.Nano() + r.Stime.Nano()
	}
	before := used()
	return func() { b.ReportMetric(float64(used()-before)/float64(b.N), "cpu-ns/op") }
}

// BenchmarkKeep keeps blocks that are new, 256 KiB at a time.
func BenchmarkKeep(b *testing.B) {
	for name, size := range map[string]eris.BlockSize{"1KiB": small, "32KiB": large} {
		b.Run(name, func(b *testing.B) {
			c := testOpen(b, b.TempDir(), 512<<20)
			ref, block := testBlock(0, size)
			c.Has(benchContext, ref, size) // opens it
			refs, blocks := make([]eris.Reference, (256<<10)/int(size)), make([][]byte, (256<<10)/int(size))
			for i := range blocks {
				blocks[i] = block
			}
			i := uint64(0)
			b.SetBytes(256 << 10)
			b.ReportAllocs()
			defer cpu(b)()
			for b.Loop() {
				for k := range refs { // other ones, without the time for their computation
					i += 0x9e3779b97f4a7c15
					binary.LittleEndian.PutUint64(refs[k][:], i)
					binary.LittleEndian.PutUint64(refs[k][16:], i)
				}
				must(b, c.Keep(benchContext, refs, blocks))
			}
		})
	}
}

func BenchmarkGet(b *testing.B) {
	for name, size := range map[string]eris.BlockSize{"1KiB": small, "32KiB": large} {
		c := testOpen(b, b.TempDir(), 128<<20)
		const n = 1000
		refs := make([]eris.Reference, n)
		for i := range n {
			refs[i], _ = testBlock(i, size)
		}
		put(c, 0, n, func(int) eris.BlockSize { return size })
		b.Run("hit/"+name, func(b *testing.B) {
			dst := make([]byte, 0, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			defer cpu(b)()
			for i := 0; b.Loop(); i++ {
				if _, err := fetch.Get(benchContext, c, refs[i%n], size, dst); err != nil {
					b.Fatal(err)
				}
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
			if _, err := fetch.Get(benchContext, c, ref, large, dst); err == nil {
				b.Fatal("a block")
			}
		}
	})
}

// TestConformance runs the suite of sources over a pool with an empty cache.
func TestConformance(t *testing.T) {
	sourcetest.Test(t, func(t *testing.T, backend *sourcetest.Backend) sourcetest.Fixture {
		c := Open(t.TempDir(), 16<<20, func(err error) { t.Error(err) })
		return sourcetest.Fixture{
			Source: pool.New([]pool.Member{{Source: c, Near: true}, {Source: backend.Open(64)}}, pool.Options{}),
			Bans:   true,
			Held:   4,
		}
	})
}

// TestInPool keeps what comes from elsewhere, and gets it from the cache the next time, in place of
// a block that is damaged, too.
func TestInPool(t *testing.T) {
	d := t.TempDir()
	backend := sourcetest.NewBackend()
	const n = 500
	for i := range n {
		ref, block := testBlock(i, mixed(i))
		backend.Set(ref, block)
	}
	for _, kept := range []bool{false, true} {
		c := Open(d, 16<<20, func(err error) { t.Error(err) })
		far := backend.Open(64)
		p := pool.New([]pool.Member{{Source: c, Near: true}, {Source: far}}, pool.Options{})
		for i := range n {
			ref, _ := testBlock(i, mixed(i))
			if _, err := fetch.Get(t.Context(), p, ref, mixed(i), nil); err != nil {
				t.Fatal(err)
			}
		}
		// On a busy machine some are kept too late, and others are late, so that both are asked.
		if s := p.Stats(); kept && s[0].Misses > n/2 || !kept && s[1].Requests < n {
			t.Errorf("kept: %v, %d misses, %d requests elsewhere", kept, s[0].Misses, s[1].Requests)
		}
		must(t, p.Close())
	}
	c := Open(d, 16<<20, nil)
	ref, _ := testBlock(1, small)
	_, wrong := testBlock(2, small)
	c.Keep(context.Background(), []eris.Reference{ref}, [][]byte{wrong})
	p := pool.New([]pool.Member{{Source: c, Near: true}, {Source: backend.Open(64)}}, pool.Options{})
	if _, err := fetch.Get(t.Context(), p, ref, small, nil); err != nil || p.Stats()[0].Banned {
		t.Errorf("%v; %+v", err, p.Stats()[0])
	}
	p.Close()
	if !has(t, testOpen(t, d, 16<<20), 1, small) {
		t.Error("the block has not been replaced")
	}
}
