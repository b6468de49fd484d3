// SPDX-License-Identifier: GPL-3.0-or-later

package restore_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

var must = testhelp.Must

// Items are restored under the umask that the commands set.
func init() { unix.Umask(0o022) }

// makeTree fills an empty directory with files of all kinds, the same for equal seeds.
func makeTree(t testing.TB, root string, seed uint64, files int) {
	t.Helper()
	random := rand.New(rand.NewPCG(seed, 1))
	must(t, os.Mkdir(root, 0o755))
	dirs := []string{root}
	for i := range files {
		dir := dirs[random.IntN(len(dirs))]
		path := fmt.Sprintf("%s/%c-%d", dir, 'A'+random.IntN(50), i)
		switch random.IntN(8) {
		case 0:
			must(t, os.Mkdir(path, 0o755))
			dirs = append(dirs, path)
		case 1:
			must(t, os.Symlink("../"+strings.Repeat("x", 1+random.IntN(100)), path))
		default:
			size := random.IntN(30000)
			if random.IntN(20) == 0 {
				size = random.IntN(3 << 20)
			}
			b := make([]byte, size)
			for j := range b {
				b[j] = byte(random.IntN(256))
			}
			must(t, os.WriteFile(path, b, []fs.FileMode{0o644, 0o755}[random.IntN(2)]))
		}
	}
}

// archiveOf returns the archive of a tree.
func archiveOf(t testing.TB, path string) []byte {
	t.Helper()
	var b bytes.Buffer
	_, err := nar.Write(&b, nar.NewTree(path))
	must(t, err)
	return b.Bytes()
}

// restoreArchive restores an archive that comes in pieces of the given length.
func restoreArchive(archive []byte, piece int, destination string, o restore.Options) (restore.Result, error) {
	ahead := nar.NewReadAhead(context.Background(), bytes.NewReader(archive), 32, piece, 0)
	defer ahead.Close()
	return restore.Restore(context.Background(), nar.NewReader(ahead), destination, o)
}

// mustRestore restores an archive that is a good one.
func mustRestore(t testing.TB, archive []byte, piece int, destination string, o restore.Options) restore.Result {
	t.Helper()
	r, err := restoreArchive(archive, piece, destination, o)
	must(t, err)
	return r
}

// wantTree wants a tree to be that of an archive.
func wantTree(t testing.TB, path string, archive []byte) {
	t.Helper()
	if !bytes.Equal(archiveOf(t, path), archive) {
		t.Errorf("%s is another tree", path)
	}
}

// checkCanonical checks modes and times of a tree.
func checkCanonical(t *testing.T, root string) {
	t.Helper()
	must(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		must(t, err)
		if info.ModTime() != time.Unix(1, 0) {
			t.Errorf("%s: modification time %v", path, info.ModTime())
		}
		mode := info.Mode()
		if kind := mode.Type(); kind != fs.ModeSymlink && mode.Perm() != 0o555 && (kind != 0 || mode != 0o444) {
			t.Errorf("%s: mode %v", path, mode)
		}
		return nil
	}))
}

// store returns an empty store that is removed at the end of the test even though its directories
// are read-only.
func store(t testing.TB) string {
	t.Helper()
	d := filepath.Join(t.TempDir(), "store")
	must(t, os.Mkdir(d, 0o755))
	t.Cleanup(func() {
		must(t, restore.Remove(d))
	})
	return d
}

func TestRoundTrip(t *testing.T) {
	d := t.TempDir()
	makeTree(t, d+"/tree", 1, 120)
	files := map[string]func(string) error{
		"file":       func(p string) error { return os.WriteFile(p, []byte("hello\n"), 0o644) },
		"executable": func(p string) error { return os.WriteFile(p, []byte("hello\n"), 0o755) },
		"empty":      func(p string) error { return os.WriteFile(p, nil, 0o644) },
		"big":        func(p string) error { return os.WriteFile(p, bytes.Repeat([]byte("abc"), 1<<20), 0o644) },
		"link":       func(p string) error { return os.Symlink("/gnu/store/x", p) },
		"directory":  func(p string) error { return os.Mkdir(p, 0o755) },
	}
	items := []string{"tree"}
	for name, f := range files {
		must(t, f(d+"/"+name))
		items = append(items, name)
	}
	for _, item := range items {
		archive := archiveOf(t, d+"/"+item)
		for _, piece := range []int{100, 5000, 128 << 10} {
			for _, deduplicate := range []bool{false, true} {
				t.Run(fmt.Sprint(item, piece, deduplicate), func(t *testing.T) {
					s := store(t)
					var o restore.Options
					if deduplicate {
						o.LinksDirectory = s + "/.links"
					}
					o.MaxBytes = uint64(len(archive))
					for _, name := range []string{"one", "two"} {
						got := mustRestore(t, archive, piece, s+"/"+name, o)
						if want := (restore.Result{NarHash: sha256.Sum256(archive), NarSize: uint64(len(archive))}); got != want {
							t.Errorf("result %v, want %v", got, want)
						}
						wantTree(t, s+"/"+name, archive)
						checkCanonical(t, s+"/"+name)
					}
					// What is not part of a store can be changed.
					mustRestore(t, archive, piece, s+"/writable", restore.Options{Writable: true})
					wantTree(t, s+"/writable", archive)
					info, err := os.Lstat(s + "/writable")
					if err != nil || info.Mode().Perm()&0o200 == 0 || info.ModTime().Unix() == 1 {
						t.Errorf("writable: %v, %v, error %v", info.Mode(), info.ModTime(), err)
					}
				})
			}
		}
	}
}

// TestLimit checks that no byte beyond the limit is accepted, wherever it is.
func TestLimit(t *testing.T) {
	d := t.TempDir()
	makeTree(t, d+"/tree", 2, 10)
	archive := archiveOf(t, d+"/tree")
	for _, less := range []int{1, 8, 100, len(archive) / 2, len(archive) - 10} {
		s := store(t)
		_, err := restoreArchive(archive, 4096, s+"/item", restore.Options{MaxBytes: uint64(len(archive) - less)})
		testhelp.WantError(t, fmt.Sprint(less, " bytes too many"), err, "more than the")
	}
}

// TestHugeFile checks that a size that the archive only claims has no effect.
func TestHugeFile(t *testing.T) {
	var framer nar.Framer
	archive := framer.AppendNode(nil, nar.Node{Kind: nar.Regular, Size: 1 << 62})
	archive = append(archive, "only this"...)
	s := store(t)
	_, err := restoreArchive(archive, 4096, s+"/item", restore.Options{MaxBytes: 1 << 20})
	testhelp.WantError(t, "with a limit", err, "more than the 1048576 bytes")
	if _, err := restoreArchive(archive, 4096, s+"/item", restore.Options{}); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("error %v", err)
	}
}

// TestTruncated checks that a cut archive is an error, whatever has been written, and that
// everything can be removed again.
func TestTruncated(t *testing.T) {
	d := t.TempDir()
	makeTree(t, d+"/tree", 3, 60)
	archive := archiveOf(t, d+"/tree")
	s := store(t)
	for i := range 40 {
		cut := i * len(archive) / 40
		_, err := restoreArchive(archive[:cut], 10000, s+"/item", restore.Options{LinksDirectory: s + "/.links"})
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%d of %d bytes: error %v", cut, len(archive), err)
		}
		must(t, restore.Remove(s+"/item"))
	}
	// What has been shared meanwhile is complete.
	mustRestore(t, archive, 10000, s+"/item", restore.Options{LinksDirectory: s + "/.links"})
	wantTree(t, s+"/item", archive)
	links, err := os.ReadDir(s + "/.links")
	must(t, err)
	for _, l := range links {
		sum := sha256.Sum256(archiveOf(t, s+"/.links/"+l.Name()))
		if got := nixbase32.EncodeToString(sum[:]); got != l.Name() {
			t.Errorf("link %s has the contents of %s", l.Name(), got)
		}
	}
}

func TestDestinationExists(t *testing.T) {
	s := store(t)
	archive := archiveOf(t, s)
	outside := t.TempDir()
	must(t, os.Symlink(outside, s+"/item"))
	if _, err := restoreArchive(archive, 4096, s+"/item", restore.Options{}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("error %v", err)
	}
	if _, err := restoreArchive(archive, 4096, s+"/absent/item", restore.Options{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v", err)
	}
}

// node lists for trees that no archive may hold; the restorer must not rely on the reader alone to
// stay inside the destination.
type nodeList []nar.Node

func (l *nodeList) Next() (nar.Node, error) {
	if len(*l) == 0 {
		return nar.Node{}, io.EOF
	}
	n := (*l)[0]
	*l = (*l)[1:]
	return n, nil
}

func (l *nodeList) Contents() (nar.Chunk, error) { return nar.Chunk{}, io.EOF }

func TestNeverThroughLinks(t *testing.T) {
	outside := t.TempDir()
	for name, nodes := range map[string]nodeList{
		"file through a link": {
			{Kind: nar.Directory},
			{Kind: nar.Symlink, Name: "a", Target: outside + "/file"},
			{Kind: nar.Regular, Name: "a"},
			{Kind: nar.End},
		},
		"directory through a link": {
			{Kind: nar.Directory},
			{Kind: nar.Symlink, Name: "a", Target: outside},
			{Kind: nar.Directory, Name: "a"},
			{Kind: nar.Regular, Name: "file"},
			{Kind: nar.End},
			{Kind: nar.End},
		},
	} {
		s := store(t)
		if _, err := restore.Restore(context.Background(), &nodes, s+"/item", restore.Options{}); !errors.Is(err, fs.ErrExist) {
			t.Errorf("%s: error %v", name, err)
		}
		if entries, err := os.ReadDir(outside); err != nil || len(entries) > 0 {
			t.Errorf("%s: %v was written outside (error %v)", name, entries, err)
		}
	}
}

// TestMissingContents gives fewer bytes than a node says.
func TestMissingContents(t *testing.T) {
	s := store(t)
	nodes := nodeList{{Kind: nar.Regular, Size: 10000}}
	_, err := restore.Restore(context.Background(), &nodes, s+"/item", restore.Options{LinksDirectory: s + "/.links"})
	testhelp.WantError(t, "no contents", err, "0 bytes of contents instead of 10000")
	if _, err := os.Stat(s + "/.links"); err == nil {
		t.Error("something was shared")
	}
}

func TestCancel(t *testing.T) {
	s := store(t)
	ctx, cancel := context.WithCancel(context.Background())
	r, w := io.Pipe()
	var framer nar.Framer
	go func() {
		defer w.Close()
		w.Write(framer.AppendNode(nil, nar.Node{Kind: nar.Regular, Size: 1 << 40}))
		for ctx.Err() == nil {
			w.Write(make([]byte, 1<<20))
			cancel()
		}
	}()
	ahead := nar.NewReadAhead(ctx, r, 16, 64<<10, 0)
	_, err := restore.Restore(ctx, nar.NewReader(ahead), s+"/item", restore.Options{})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	r.Close()
	ahead.Close()
}

// inode returns the number of a file and how many names it has.
func inode(t *testing.T, path string) (number, names uint64) {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(path, &st))
	return st.Ino, uint64(st.Nlink)
}

func TestDeduplication(t *testing.T) {
	d := t.TempDir()
	for name, file := range map[string]struct {
		size int
		mode fs.FileMode
	}{
		"a": {20000, 0o644}, "b": {20000, 0o644}, "program": {20000, 0o755},
		"small": {8191, 0o644}, "least": {8192, 0o644},
		"large": {3 << 20, 0o644}, "twin": {3 << 20, 0o644},
	} {
		must(t, os.WriteFile(d+"/"+name, bytes.Repeat([]byte("x"), file.size), file.mode))
	}
	archive := archiveOf(t, d)
	s := store(t)
	o := restore.Options{LinksDirectory: s + "/.links"}
	for _, item := range []string{"one", "two"} {
		mustRestore(t, archive, 64<<10, s+"/"+item, o)
	}
	names := map[string]uint64{"a": 5, "b": 5, "program": 3, "small": 1, "least": 3, "large": 5, "twin": 5}
	for name, want := range names {
		if _, got := inode(t, s+"/one/"+name); got != want {
			t.Errorf("%s has %d names, want %d", name, got, want)
		}
	}
	// The name of a link is the hash of the file as an archive.
	const link = "0chzg68p5xqd2562jffa0ms74k7s11a316kx0j0772325mx7z05w" // of 20000 times x
	want, _ := inode(t, s+"/.links/"+link)
	if got, _ := inode(t, s+"/two/b"); got != want {
		t.Errorf("b is not %s", link)
	}
	checkCanonical(t, s+"/one")
	checkCanonical(t, s+"/two")
}

// TestDamagedLinks has files in the directory of links that are not what their names say: cut, or
// with other bytes. They are not linked to, but told and replaced.
func TestDamagedLinks(t *testing.T) {
	d := t.TempDir()
	sizes := map[string]int{"small": 20000, "large": 3 << 20}
	for name, size := range sizes {
		must(t, os.WriteFile(d+"/"+name, bytes.Repeat([]byte(name), size/5), 0o644))
	}
	archive := archiveOf(t, d)
	s := store(t)
	var mu sync.Mutex
	var damaged []string
	o := restore.Options{LinksDirectory: s + "/.links", Damaged: func(file string) {
		mu.Lock()
		defer mu.Unlock()
		damaged = append(damaged, file)
	}}
	first := mustRestore(t, archive, 64<<10, s+"/one", o)
	for i, damage := range []func(f *os.File) error{
		func(f *os.File) error { return f.Truncate(5) },
		func(f *os.File) error { _, err := f.WriteAt([]byte("X"), 4000); return err },
	} {
		for name := range sizes {
			path := s + "/one/" + name
			must(t, os.Chmod(path, 0o644))
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			must(t, err)
			must(t, damage(f))
			must(t, f.Close())
		}
		item := fmt.Sprintf("%s/after%d", s, i)
		again := mustRestore(t, archive, 64<<10, item, o)
		for name, size := range sizes {
			text, err := os.ReadFile(item + "/" + name)
			if err != nil || !bytes.Equal(text, bytes.Repeat([]byte(name), size/5)) {
				t.Errorf("%s has %d bytes, %v", name, len(text), err)
			}
			if _, links := inode(t, item+"/"+name); links != 2 {
				t.Errorf("%s has %d names", name, links)
			}
		}
		if again != first || len(damaged) != 2*(i+1) {
			t.Errorf("%d files were told to be damaged", len(damaged))
		}
		must(t, restore.Remove(s+"/one"))
		mustRestore(t, archive, 64<<10, s+"/one", o)
	}
}

// TestLinksStay has a file shared that is too large to be kept in memory: nothing comes to the
// directory of links for a moment. The garbage collector of Guix looks at each name that it has
// read, and ends with an error where it is gone (nix/libstore/gc.cc: removeUnusedLinks).
func TestLinksStay(t *testing.T) {
	file := t.TempDir() + "/file"
	must(t, os.WriteFile(file, make([]byte, 3<<20), 0o644))
	s := store(t)
	o := restore.Options{LinksDirectory: s + "/.links"}
	mustRestore(t, archiveOf(t, file), 64<<10, s+"/one", o)
	watch, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil { // a user may have so many only
		t.Skip(err)
	}
	defer unix.Close(watch)
	_, err = unix.InotifyAddWatch(watch, s+"/.links", unix.IN_CREATE|unix.IN_MOVE|unix.IN_DELETE)
	must(t, err)
	mustRestore(t, archiveOf(t, file), 64<<10, s+"/two", o)
	if _, links := inode(t, s+"/two"); links != 3 {
		t.Errorf("the file has %d names", links)
	}
	var events [4096]byte
	if n, err := unix.Read(watch, events[:]); err != unix.EAGAIN {
		t.Errorf("the directory has changed: %q, %v", events[:max(n, 0)], err)
	}
}

func TestNoDeduplication(t *testing.T) {
	d := t.TempDir()
	file := d + "/file"
	must(t, os.WriteFile(file, make([]byte, 8191), 0o644))
	s := store(t)
	mustRestore(t, archiveOf(t, file), 4096, s+"/small", restore.Options{LinksDirectory: s + "/.links"})
	if _, err := os.Stat(s + "/.links"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("small files make a links directory: %v", err)
	}
	must(t, os.WriteFile(file, make([]byte, 20000), 0o644))
	// A link of another size was cut off by a crash; a link with another mode is being made by
	// somebody; a directory in its place is nonsense.
	sum := sha256.Sum256(archiveOf(t, file))
	link := s + "/.links/" + nixbase32.EncodeToString(sum[:])
	must(t, os.Mkdir(s+"/.links", 0o755))
	for name, prepare := range map[string]func() error{
		"truncated":   func() error { return os.WriteFile(link, make([]byte, 19999), 0o444) },
		"directory":   func() error { return os.Mkdir(link, 0o755) },
		"not a link":  func() error { return os.Symlink("/nowhere", link) },
		"no .links":   func() error { return os.Remove(s + "/.links") },
		"a file":      func() error { return errors.Join(os.Remove(s+"/.links"), os.WriteFile(s+"/.links", nil, 0o644)) },
		"other mode":  func() error { return os.WriteFile(link, make([]byte, 20000), 0o600) },
		"a good link": func() error { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			must(t, prepare())
			mustRestore(t, archiveOf(t, file), 4096, s+"/item", restore.Options{LinksDirectory: s + "/.links"})
			wantTree(t, s+"/item", archiveOf(t, file))
			checkCanonical(t, s+"/item")
		})
		os.RemoveAll(s + "/item")
		os.RemoveAll(s + "/.links")
		must(t, os.Mkdir(s+"/.links", 0o755))
	}
}

// TestConcurrentDeduplication restores the same item in several places at once.
func TestConcurrentDeduplication(t *testing.T) {
	d := t.TempDir()
	makeTree(t, d+"/tree", 4, 100)
	archive := archiveOf(t, d+"/tree")
	s := store(t)
	failures := make(chan error)
	const times = 6
	for i := range times {
		go func() {
			_, err := restoreArchive(archive, 30000, fmt.Sprintf("%s/item-%d", s, i), restore.Options{LinksDirectory: s + "/.links"})
			failures <- err
		}()
	}
	for range times {
		must(t, <-failures)
	}
	for i := range times {
		item := fmt.Sprintf("%s/item-%d", s, i)
		wantTree(t, item, archive)
		checkCanonical(t, item)
	}
	links, err := os.ReadDir(s + "/.links")
	must(t, err)
	for _, l := range links {
		if strings.HasPrefix(l.Name(), ".tmp") {
			t.Errorf("%s was left behind", l.Name())
		}
		if _, names := inode(t, s+"/.links/"+l.Name()); names < times+1 {
			t.Errorf("link %s has %d names", l.Name(), names)
		}
	}
}

// TestDeep restores a tree with more levels, and files all the way, than the process may have open
// files.
func TestDeep(t *testing.T) {
	d := t.TempDir()
	deep := d + "/tree"
	for i := range 500 {
		must(t, errors.Join(os.Mkdir(deep, 0o755), os.WriteFile(deep+"/f", fmt.Appendf(nil, "%9999d", i), 0o644)))
		deep += "/d"
	}
	archive := archiveOf(t, d+"/tree")
	var limit unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	low := unix.Rlimit{Cur: 96, Max: limit.Max}
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &low))
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit) // before the directory is removed
	if r := mustRestore(t, archive, 128<<10, d+"/again", restore.Options{LinksDirectory: d + "/.links"}); r.NarHash != sha256.Sum256(archive) {
		t.Error("another hash")
	}
	wantTree(t, d+"/again", archive)
	info, err := os.Stat(d + "/again/d/d/d")
	if err != nil || info.Mode().Perm() != 0o555 || info.ModTime().Unix() != 1 {
		t.Errorf("directory %v, error %v", info, err)
	}
	must(t, restore.Remove(d+"/again"))
	// One that is cut, or goes deeper, leaves nothing open.
	open, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	if _, err := restoreArchive(archive[:len(archive)/2], 128<<10, d+"/cut", restore.Options{}); err == nil {
		t.Error("half an archive is restored")
	}
	if now, err := os.ReadDir("/proc/self/fd"); err != nil || len(now) > len(open) {
		t.Errorf("%d open files, after %d, error %v", len(now), len(open), err)
	}
	for _, name := range []string{"/cut", "/tree"} { // which the clean-up would have an open file for each level of
		must(t, restore.Remove(d+name))
	}
}

func TestRemove(t *testing.T) {
	d := t.TempDir()
	outside := t.TempDir()
	must(t, os.WriteFile(outside+"/precious", nil, 0o644))
	makeTree(t, d+"/tree", 7, 50)
	must(t, os.Symlink(outside, d+"/tree/link"))
	deep := d + "/tree"
	for range 100 {
		deep += "/deep"
		must(t, os.Mkdir(deep, 0o755))
	}
	for ; deep != d; deep = filepath.Dir(deep) {
		must(t, os.Chmod(deep, 0o100))
	}
	for range 2 {
		must(t, restore.Remove(d+"/tree"))
	}
	if _, err := os.Lstat(d + "/tree"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v", err)
	}
	if _, err := os.Stat(outside + "/precious"); err != nil {
		t.Error(err)
	}
}

// What a process has left that was killed goes, and nothing that is in use.
func TestTemporary(t *testing.T) {
	parent := t.TempDir()
	used, remove, err := restore.Temporary(parent, "ours-")
	must(t, err)
	left, foreign := parent+"/ours-1", parent+"/other-1"
	must(t, os.MkdirAll(left+"/item", 0o700))
	must(t, os.Chmod(left+"/item", 0o500))
	must(t, os.Mkdir(foreign, 0o700))
	must(t, os.Symlink(foreign, parent+"/ours-2"))
	_, removeOther, err := restore.Temporary(parent, "ours-")
	must(t, err)
	for path, want := range map[string]bool{used: true, left: false, foreign: true} {
		if _, err := os.Stat(path); (err == nil) != want {
			t.Errorf("%s: %v", path, err)
		}
	}
	must(t, errors.Join(removeOther(), remove()))
	if left, _ := os.ReadDir(parent); len(left) != 2 {
		t.Errorf("%v are left", left)
	}
}

func BenchmarkRestore(b *testing.B) {
	for _, bench := range []struct {
		name        string
		files, size int
	}{{"small", 5000, 1000}, {"medium", 1000, 40000}, {"large", 4, 16 << 20}} {
		for _, deduplicate := range []bool{false, true} {
			b.Run(fmt.Sprintf("%s/deduplicate=%v", bench.name, deduplicate), func(b *testing.B) {
				d := b.TempDir()
				contents := make([]byte, bench.size)
				for i := range bench.files {
					copy(contents, fmt.Sprint(i))
					must(b, os.WriteFile(fmt.Sprintf("%s/%d", d, i), contents, 0o644))
				}
				archive := archiveOf(b, d)
				b.SetBytes(int64(len(archive)))
				for b.Loop() {
					b.StopTimer()
					s := b.TempDir()
					b.StartTimer()
					var o restore.Options
					if deduplicate {
						o.LinksDirectory = s + "/.links"
					}
					_, err := restoreArchive(archive, 128<<10, s+"/item", o)
					must(b, err)
					b.StopTimer()
					must(b, restore.Remove(s))
					b.StartTimer()
				}
			})
		}
	}
}
