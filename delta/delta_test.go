// SPDX-License-Identifier: GPL-3.0-or-later

package delta_test

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
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/delta"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/reuse"
)

var must = testhelp.Must

// Items are restored under the umask that the commands set.
func init() { unix.Umask(0o022) }

const (
	oldHash = "0123456789abcdfghijklmnpqrsvwxyz"
	newHash = "zyxwvsrqpnmlkjihgfdcba9876543210"
)

// tree is the contents of files by their paths, or of one file whose path is empty. A path that
// ends in a slash is a directory, and contents that begin with "->" are a link.
type tree map[string]string

func (tr tree) make(t testing.TB) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "item")
	for path, contents := range tr {
		name := filepath.Join(root, path)
		if path == "" {
			name = root
		}
		err := os.MkdirAll(filepath.Dir(name), 0o755)
		target, link := strings.CutPrefix(contents, "->")
		switch {
		case err != nil:
		case strings.HasSuffix(path, "/"):
			err = os.MkdirAll(name, 0o755)
		case link:
			err = os.Symlink(target, name)
		default:
			err = os.WriteFile(name, []byte(contents), map[bool]fs.FileMode{false: 0o644, true: 0o755}[strings.HasPrefix(contents, "#!")])
		}
		must(t, err)
	}
	return root
}

// noise is n bytes that do not compress.
func noise(seed uint64, n int) string {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return string(b)
}

func hashOf(t testing.TB, nodes nar.Nodes) [32]byte {
	t.Helper()
	sum, _, err := nar.Hash(t.Context(), nodes)
	must(t, err)
	return sum
}

func write(t testing.TB, new, old string, o delta.WriteOptions) []byte {
	t.Helper()
	var b bytes.Buffer
	n, err := delta.Write(t.Context(), &b, new, old, o)
	must(t, err)
	if n != int64(b.Len()) {
		t.Errorf("%d bytes were written, and %d are said to have been", b.Len(), n)
	}
	return b.Bytes()
}

var plenty = delta.ReadOptions{MaxSize: 1 << 40}

var hashes = []reuse.Replacement{{Old: oldHash, New: newHash}}

func TestRoundTrip(t *testing.T) {
	program := noise(1, 300<<10)
	// Two pieces with all of the old one as their dictionary, and one with a part.
	large := noise(2, 1<<20)
	larger := "inserted" + large[:500<<10] + strings.Repeat("x", 8<<20-500<<10-8) + large[len(large)-100<<10:] + "!"
	for _, test := range []struct {
		name     string
		old, new tree
		most     int // bytes of the delta
	}{
		{"the same", tree{"a/b": program, "c": "#!x"}, tree{"a/b": program, "c": "#!x"}, 110},
		{"a file", tree{"": program}, tree{"": program + "more"}, 160},
		{"a file for a directory", tree{"": program}, tree{"a": "x"}, 120},
		{"a directory for a file", tree{"a": program}, tree{"": "x"}, 110},
		{"hashes", tree{"a": "/gnu/store/" + oldHash + "-x", "b": program + oldHash}, tree{"a": "/gnu/store/" + newHash + "-x", "b": program + newHash}, 150},
		{"hashes, and changes", tree{"b": oldHash + program + strings.Repeat(oldHash, 1000)}, tree{"b": newHash + program + strings.Repeat(newHash, 1000) + "!"}, 200},
		{"of all kinds", tree{"x": "->y", "bin/z": "#!a"}, tree{"x": "->z", "empty/": "", "bin/z": "#!a", "none": "", "deep/er/er": "->" + strings.Repeat("x", 500)}, 200},
		{"version in a path", tree{"lib/foo-1.2/" + oldHash + "-bar.so": program}, tree{"lib/foo-1.3/" + newHash + "-bar.so": program + "x"}, 250},
		{"a link where a file was", tree{"a": program}, tree{"a": "->b"}, 110},
		{"a file where a link was", tree{"a": "->b", "b": program}, tree{"a": program[:10], "b": program}, 130},
		{"a file where a directory was", tree{"a/b": program}, tree{"a": "x"}, 120},
		{"pieces", tree{"a": large}, tree{"a": larger}, 1500},
		{"of one byte", tree{"a": "x"}, tree{"a": "y"}, 120},
		{"that grow", tree{"a": "x" + program}, tree{"a": strings.Repeat(program[:100000], 12)}, 110000},
	} {
		t.Run(test.name, func(t *testing.T) {
			old, new := test.old.make(t), test.new.make(t)
			b := write(t, new, old, delta.WriteOptions{Replacements: hashes})
			if again := write(t, new, old, delta.WriteOptions{Replacements: hashes}); !bytes.Equal(b, again) {
				t.Error("another delta the second time")
			}
			if len(b) > test.most {
				t.Errorf("%d bytes, more than %d", len(b), test.most)
			}
			r, err := delta.NewReader(t.Context(), bytes.NewReader(b), old, plenty)
			must(t, err)
			defer r.Close()
			if hashOf(t, r) != hashOf(t, nar.NewTree(new)) {
				t.Error("another tree")
			}
			if n, err := r.Next(); err != io.EOF {
				t.Errorf("%v, %v behind the end", n, err)
			}
			// Contents may be passed over.
			r, err = delta.NewReader(t.Context(), bytes.NewReader(b), old, plenty)
			must(t, err)
			defer r.Close()
			for err == nil {
				_, err = r.Next()
			}
			if err != io.EOF {
				t.Errorf("error %v", err)
			}
			// Cut off or continued, it is an error and not a smaller tree.
			for _, wrong := range [][]byte{b[:len(b)-1], b[:len(b)/2], append(bytes.Clone(b), 0)} {
				if _, err := read(t.Context(), wrong, old, plenty); err == nil {
					t.Errorf("%d of %d bytes are accepted", len(wrong), len(b))
				}
			}
		})
	}
}

// read returns the archive that a delta makes.
func read(ctx context.Context, b []byte, base string, o delta.ReadOptions) ([]byte, error) {
	r, err := delta.NewReader(ctx, bytes.NewReader(b), base, o)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	var archive bytes.Buffer
	_, err = nar.Write(&archive, r)
	return archive.Bytes(), err
}

// TestLink restores files that are the same as links to those of the base.
func TestLink(t *testing.T) {
	store := t.TempDir()
	t.Cleanup(func() { // store items are read-only, and only root can remove those
		items, _ := filepath.Glob(store + "/*")
		for _, item := range items {
			os.Chmod(item, 0o755)
		}
	})
	same := noise(1, 10<<10)
	for name, tr := range map[string]tree{"old": {"a": same, "b": same + oldHash}, "new": {"a": same, "b": same + newHash}} {
		if _, err := restore.Restore(t.Context(), nar.NewTree(tr.make(t)), store+"/"+name, restore.Options{}); err != nil {
			t.Fatal(err)
		}
	}
	b := write(t, store+"/new", store+"/old", delta.WriteOptions{Replacements: hashes})
	for link, want := range map[bool]bool{false: false, true: true} {
		r, err := delta.NewReader(t.Context(), bytes.NewReader(b), store+"/old", delta.ReadOptions{MaxSize: 1 << 20, Link: link})
		must(t, err)
		defer r.Close()
		to := fmt.Sprintf("%s/made-%t", store, link)
		result, err := restore.Restore(t.Context(), r, to, restore.Options{LinksDirectory: t.TempDir()})
		if err != nil || result.NarHash != hashOf(t, nar.NewTree(store+"/new")) {
			t.Errorf("another tree, error %v", err)
		}
		a, _ := os.Stat(store + "/old/a")
		made, err := os.Stat(to + "/a")
		if err != nil || os.SameFile(a, made) != want {
			t.Errorf("with links %t: the file is the same: %t, %v", link, !want, err)
		}
	}
}

// TestBase reads deltas with a base that is another one, changes, or has traps in it.
func TestBase(t *testing.T) {
	file := noise(1, 100<<10)
	good := tree{"d/f": file, "g": file}
	new := tree{"d/f": file + "x", "g": file}.make(t)
	b := write(t, new, good.make(t), delta.WriteOptions{})
	want := hashOf(t, nar.NewTree(new))
	for _, test := range []struct {
		name   string
		change func(base string) error
		fails  bool // or the hash is another one
	}{
		{"nothing", func(string) error { return nil }, false},
		{"gone", func(base string) error { return os.RemoveAll(base) }, true},
		{"file gone", func(base string) error { return os.Remove(base + "/g") }, true},
		{"shorter", func(base string) error { return os.Truncate(base+"/g", 1000) }, true},
		{"dictionary shorter", func(base string) error { return os.Truncate(base+"/d/f", 1000) }, true},
		{"other contents", func(base string) error { return os.WriteFile(base+"/g", []byte(noise(2, len(file))), 0o644) }, false},
		{"other dictionary", func(base string) error { return os.WriteFile(base+"/d/f", []byte(noise(2, len(file))), 0o644) }, false},
		{"a link to the same", func(base string) error {
			return errors.Join(os.Rename(base+"/g", base+"/h"), os.Symlink("h", base+"/g"))
		}, true},
		{"a directory that is a link", func(base string) error {
			return errors.Join(os.Rename(base+"/d", base+"/e"), os.Symlink("e", base+"/d"))
		}, true},
		{"a link itself", func(base string) error {
			return errors.Join(os.Rename(base, base+"-real"), os.Symlink(base+"-real", base))
		}, true},
		{"a pipe", func(base string) error { return errors.Join(os.Remove(base+"/g"), unix.Mkfifo(base+"/g", 0o600)) }, true},
		{"a file", func(base string) error {
			return errors.Join(os.RemoveAll(base), os.WriteFile(base, []byte(file), 0o644))
		}, true},
	} {
		base := good.make(t)
		must(t, test.change(base))
		archive, err := read(t.Context(), b, base, plenty)
		if (err != nil) != test.fails {
			t.Errorf("%s: error %v", test.name, err)
		}
		if err == nil && (sha256.Sum256(archive) == want) != (test.name == "nothing") {
			t.Errorf("%s: the same tree, or not", test.name)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := read(ctx, b, good.make(t), plenty); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

// TestTooLarge writes deltas that are of no use.
func TestTooLarge(t *testing.T) {
	for name, new := range map[string]tree{
		"files": {"a": noise(1, 100<<10)},
		"index": {strings.Repeat("x", 200): noise(1, 10), strings.Repeat("y", 200): noise(3, 10), noise(2, 30)[:1] + "z": "->" + strings.ReplaceAll(noise(5, 4000), "\x00", "")},
	} {
		var b bytes.Buffer
		_, err := delta.Write(t.Context(), &b, new.make(t), tree{"b": "x"}.make(t), delta.WriteOptions{MaxSize: 100})
		if !errors.Is(err, delta.ErrTooLarge) || b.Len() > 0 {
			t.Errorf("%s: error %v, %d bytes", name, err, b.Len())
		}
	}
}

// TestManyFiles compares many small files, which take no memory each.
func TestManyFiles(t *testing.T) {
	old, new := tree{}, tree{}
	for i := range 3000 {
		old[fmt.Sprint(i)], new[fmt.Sprint(i)] = "a", "b"
	}
	oldTree, newTree := old.make(t), new.make(t)
	n := testhelp.Allocated(func() { write(t, newTree, oldTree, delta.WriteOptions{}) })
	if n > 200<<20 { // the race detector has memory used again less often
		t.Errorf("%d MiB were allocated", n>>20)
	}
}

// TestPatchFrom has the reference implementation decompress a frame, with the base in one file and
// the frame in another: the last bytes of a delta of one file.
func TestPatchFrom(t *testing.T) {
	program, err := exec.LookPath("zstd")
	if err != nil {
		t.Skip(err)
	}
	for name, size := range map[string]int{"small": 5000, "large": 1500 << 10} {
		old := noise(1, size)
		new := "begins otherwise, " + old[:size/2] + old[size/2+10:]
		oldFile, newFile := tree{"": old}.make(t), tree{"": new}.make(t)
		b := write(t, newFile, oldFile, delta.WriteOptions{})
		frame := filepath.Join(t.TempDir(), "frame.zst")
		start := bytes.LastIndex(b, []byte("\x28\xb5\x2f\xfd"))
		must(t, os.WriteFile(frame, b[start:], 0o644))
		out, err := exec.Command(program, "-d", "-c", "--patch-from="+oldFile, frame).Output()
		if err != nil || string(out) != new {
			t.Errorf("%s: %d bytes, error %v", name, len(out), err)
		}
	}
}
