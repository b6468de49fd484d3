// SPDX-License-Identifier: GPL-3.0-or-later

package restore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

// failing gives the contents of a large file and then does what end says.
type failing struct {
	nodes  nodeList
	pieces int
	end    func() (nar.Chunk, error)
}

func (f *failing) Next() (nar.Node, error) { return f.nodes.Next() }

func (f *failing) Contents() (nar.Chunk, error) {
	if f.pieces == 0 {
		return f.end()
	}
	f.pieces--
	return nar.NewChunk(make([]byte, 64<<10), nil), nil
}

// TestCause checks that the error that is reported is the cause, and not what it makes a file that
// is being written fail with.
func TestCause(t *testing.T) {
	cause := errors.New("the compressed data are damaged")
	for range 100 {
		s := store(t)
		_, err := restore.Restore(context.Background(), &failing{
			nodes:  nodeList{{Kind: nar.Regular, Size: 1 << 30}},
			pieces: 20,
			end:    func() (nar.Chunk, error) { return nar.Chunk{}, cause },
		}, s+"/item", restore.Options{})
		if !errors.Is(err, cause) {
			t.Fatalf("error %v, want %v", err, cause)
		}
	}
}

// TestFaultOfSource checks that a fault in what gives the nodes is an error of this item and not
// the end of the process.
func TestFaultOfSource(t *testing.T) {
	s := store(t)
	_, err := restore.Restore(context.Background(), &failing{
		nodes:  nodeList{{Kind: nar.Directory}, {Kind: nar.Regular, Name: "a", Size: 1 << 30}},
		pieces: 20,
		end:    func() (nar.Chunk, error) { panic("index out of range") },
	}, s+"/item", restore.Options{})
	testhelp.WantError(t, "a panic", err, "index out of range")
	must(t, restore.Remove(s+"/item"))
}

// TestNoName checks that what is no name of a file is neither made nor removed.
func TestNoName(t *testing.T) {
	d := t.TempDir()
	must(t, os.MkdirAll(d+"/a/b", 0o755))
	must(t, os.WriteFile(d+"/a/b/file", nil, 0o644))
	t.Chdir(d + "/a/b")
	for _, path := range []string{"", ".", "..", "../.", "../b/.", "../b/..", d + "/a/.", "x\x00y", "../b/" + strings.Repeat("x", 256)} {
		if err := restore.Remove(path); err == nil {
			t.Errorf("%q was removed", path)
		}
		nodes := nodeList{{Kind: nar.Symlink, Target: "x"}}
		if _, err := restore.Restore(context.Background(), &nodes, path, restore.Options{}); err == nil {
			t.Errorf("%q was restored", path)
		}
	}
	if _, err := os.Stat(d + "/a/b/file"); err != nil {
		t.Error(err)
	}
	// A slash at the end changes nothing.
	must(t, restore.Remove(d+"/a/b/"))
	if _, err := os.Stat(d + "/a/b"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v", err)
	}
}

// TestRemoveKeepsMounts checks that nothing is deleted from another file system, or from a part of
// this one that is mounted into the tree.
func TestRemoveKeepsMounts(t *testing.T) {
	if _, err := unix.Openat2(unix.AT_FDCWD, "/", &unix.OpenHow{Resolve: unix.RESOLVE_NO_XDEV}); err == unix.ENOSYS {
		t.Skip("before Linux 5.6 mount points cannot be told")
	}
	d := t.TempDir()
	outside := filepath.Join(d, "outside")
	tree := filepath.Join(d, "tree")
	for _, name := range []string{outside, tree + "/sub/mount"} {
		must(t, os.MkdirAll(name, 0o755))
	}
	must(t, os.WriteFile(outside+"/file", []byte("precious"), 0o644))
	for name, at := range map[string]string{"below": tree + "/sub/mount", "itself": tree} {
		if err := unix.Mount(outside, at, "", unix.MS_BIND, ""); err != nil {
			t.Skipf("cannot mount: %v", err)
		}
		err := restore.Remove(tree)
		must(t, unix.Unmount(at, unix.MNT_DETACH))
		testhelp.WantError(t, name, err, "mount point")
		if b, err := os.ReadFile(outside + "/file"); err != nil || string(b) != "precious" {
			t.Fatalf("%s: %q, error %v: something was deleted that is not part of the tree", name, b, err)
		}
	}
	must(t, restore.Remove(tree))
}

// A tree of the lower layer of an overlay, whose directories cannot be renamed, is removed as well.
func TestRemoveOverlay(t *testing.T) {
	lower, upper := t.TempDir(), t.TempDir()
	must(t, os.MkdirAll(lower+"/tree"+strings.Repeat("/d", 30), 0o755))
	if err := unix.Mount("tmpfs", upper, "tmpfs", 0, ""); err != nil {
		t.Skipf("cannot mount: %v", err)
	}
	defer unix.Unmount(upper, unix.MNT_DETACH)
	must(t, errors.Join(os.Mkdir(upper+"/new", 0o755), os.Mkdir(upper+"/work", 0o755)))
	merged := t.TempDir()
	if err := unix.Mount("overlay", merged, "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s/new,workdir=%s/work", lower, upper, upper)); err != nil {
		t.Skipf("cannot mount: %v", err)
	}
	defer unix.Unmount(merged, unix.MNT_DETACH)
	must(t, restore.Remove(merged+"/tree"))
	if _, err := os.Lstat(merged + "/tree"); !errors.Is(err, os.ErrNotExist) {
		t.Error("the tree is still there: ", err)
	}
}

// TestDeepStaleTree removes a tree that is deeper than a process may have files open.
func TestDeepStaleTree(t *testing.T) {
	s := store(t)
	var limit unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	low := limit
	low.Cur = 28
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &low))
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	parent, err := unix.Open(s, unix.O_DIRECTORY|unix.O_RDONLY, 0)
	must(t, err)
	for range 3000 { // far beyond the longest path, too
		must(t, unix.Mkdirat(parent, "d", 0o755))
		fd, err := unix.Openat(parent, "d", unix.O_DIRECTORY|unix.O_RDONLY, 0)
		must(t, err)
		file, err := unix.Openat(fd, "file", unix.O_CREAT|unix.O_WRONLY, 0o444)
		must(t, err)
		unix.Close(file)
		unix.Fchmod(parent, 0o555)
		unix.Close(parent)
		parent = fd
	}
	unix.Close(parent)
	must(t, os.Chmod(s, 0o755))
	must(t, restore.Remove(s+"/d"))
	if names, err := os.ReadDir(s); err != nil || len(names) > 0 {
		t.Errorf("%v, error %v", names, err)
	}
}

// TestDefaultList restores items in a store that gives others no access to what is new in it.
func TestDefaultList(t *testing.T) {
	s := store(t)
	list := []byte("\x02\x00\x00\x00" + "\x01\x00\x07\x00\xff\xff\xff\xff" + "\x04\x00\x05\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff")
	if err := unix.Setxattr(s, "system.posix_acl_default", list, 0); err != nil {
		t.Skipf("no access control lists: %v", err)
	}
	for name, nodes := range map[string]nodeList{
		"file": {{Kind: nar.Regular}},
		"tree": {{Kind: nar.Directory}, {Kind: nar.Directory, Name: "d"}, {Kind: nar.Regular, Name: "f"}, {Kind: nar.End}, {Kind: nar.End}},
	} {
		_, err := restore.Restore(t.Context(), &nodes, s+"/"+name, restore.Options{})
		must(t, err)
		checkCanonical(t, s+"/"+name)
	}
}

// TestOddNames restores names that are as long as may be, and bytes that are no text.
func TestOddNames(t *testing.T) {
	s := store(t)
	nodes := nodeList{
		{Kind: nar.Directory},
		{Kind: nar.Regular, Name: "\x01\x1b[2J\n"},
		{Kind: nar.Symlink, Name: "\xfe\xff", Target: "\x80"},
		{Kind: nar.Directory, Name: "\xff" + strings.Repeat("x", nar.MaxName-1)},
		{Kind: nar.End},
		{Kind: nar.End},
	}
	var want bytes.Buffer
	again := append(nodeList(nil), nodes...)
	_, err := nar.Write(&want, &again)
	must(t, err)
	mustRestore(t, want.Bytes(), 100, s+"/item", restore.Options{})
	wantTree(t, s+"/item", want.Bytes())
	checkCanonical(t, s+"/item")
}
