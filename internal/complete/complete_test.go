// SPDX-License-Identifier: GPL-3.0-or-later

package complete_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/dir"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/complete"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

var must = testhelp.Must

func open(t *testing.T, directory string) *dir.Store {
	s, err := dir.Open("file:" + directory)
	must(t, err)
	t.Cleanup(func() { s.Close() })
	return s
}

// encode puts a tree with a file of several levels, two equal ones, and some small ones into a
// directory.
func encode(t *testing.T, directory string) eris.ReadCapability {
	tree := t.TempDir()
	large := make([]byte, 100<<10) // blocks of 32 KiB would hide the levels
	for i := range large {
		large[i] = byte(i * i >> 8)
	}
	for name, contents := range map[string][]byte{"a/large": large[:15<<10], "zeros": make([]byte, 1<<20), "x": []byte("x"), "y": []byte("y"), "z": []byte("x")} {
		name := filepath.Join(tree, name)
		must(t, os.MkdirAll(filepath.Dir(name), 0o777))
		must(t, os.WriteFile(name, contents, 0o666))
	}
	nodes := nar.NewTree(tree)
	defer nodes.Close()
	result, err := erisfs.Encode(t.Context(), nodes, open(t, directory).Put, erisfs.EncodeOptions{})
	must(t, err)
	return result.Capability
}

// blocks returns the files of a directory of blocks.
func blocks(t *testing.T, directory string) []string {
	names, err := filepath.Glob(directory + "/??/*")
	if err != nil || len(names) == 0 {
		t.Fatal("there are no blocks", err)
	}
	return names
}

// Without any one of its blocks the tree is not complete, and the report says which files are
// affected; what another store has is put back.
func TestCheck(t *testing.T) {
	all, some := t.TempDir(), t.TempDir()
	c := encode(t, all)
	if encode(t, some) != c {
		t.Fatal("the tree is encoded in two ways")
	}
	check := func(from *dir.Store) complete.Report {
		o := complete.Options{Got: func(int) {}, Store: open(t, some)}
		if from != nil {
			o.From = from
		}
		r, err := complete.Check(t.Context(), c, o)
		must(t, err)
		return r
	}
	whole := check(nil)
	if !whole.Complete() || whole.Form != "eris-fs" || whole.Affected != nil {
		t.Fatalf("of the whole tree: %+v", whole)
	}
	affected := map[string]int{}
	for i, name := range blocks(t, some) {
		bad := i%2 == 1
		must(t, os.Remove(name))
		if bad {
			info, err := os.Stat(strings.Replace(name, some, all, 1))
			must(t, err)
			must(t, os.WriteFile(name, bytes.Repeat([]byte{1}, int(info.Size())), 0o666))
		}
		r := check(nil)
		if r.Missing != 1 || r.MissingBytes == 0 || len(r.Affected) == 0 {
			t.Fatalf("without %s: %+v", name, r)
		}
		affected[fmt.Sprint(r.Affected)]++
		if r = check(open(t, all)); !r.Complete() || r.Repaired != 1 || r.Blocks != whole.Blocks {
			t.Fatalf("repaired: %+v", r)
		}
		if r = check(nil); !r.Complete() || r.Repaired != 0 {
			t.Fatalf("after the repair: %+v", r)
		}
	}
	for _, want := range []string{"[.]", "[a/large]", "[x z]", "[y]", "[zeros]"} {
		if affected[want] == 0 {
			t.Errorf("no block of %s was missed: %v", want, affected)
		}
	}
	// Of nothing, all is got.
	must(t, errors.Join(os.RemoveAll(some), os.Mkdir(some, 0o777)))
	if r := check(open(t, all)); r.Repaired != int64(len(blocks(t, all))) || len(blocks(t, some)) != len(blocks(t, all)) {
		t.Errorf("of nothing: %+v", r)
	}
}

func TestCheckErrors(t *testing.T) {
	all := t.TempDir()
	c := encode(t, all)
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if _, err := complete.Check(ctx, c, complete.Options{Got: func(int) {}, Store: open(t, all)}); err != context.Canceled {
		t.Errorf("after the end of its context: %v", err)
	}
	r, err := complete.Check(t.Context(), c, complete.Options{Got: func(int) {}, Store: open(t, filepath.Join(all, "absent"))})
	if err == nil {
		t.Errorf("a store that is not there: %+v", r)
	}
	wrong := c
	wrong.Key[0] ^= 1
	if r, err := complete.Check(t.Context(), wrong, complete.Options{Got: func(int) {}, Store: open(t, all)}); err == nil && slices.Contains(r.Affected, "x") {
		t.Errorf("with a wrong key: %+v", r)
	}
}

// A directory from somebody else may have anything under the names of narinfos; nothing is waited
// for.
func TestDirectoryOfStrangers(t *testing.T) {
	directory := t.TempDir()
	must(t, errors.Join(unix.Mkfifo(directory+"/a.narinfo", 0o600), os.Symlink("/etc/passwd", directory+"/b.narinfo"),
		os.Mkdir(directory+"/c.narinfo", 0o700), os.WriteFile(directory+"/d.narinfo", []byte("x"), 0o600)))
	var names []string
	items, err := complete.Directory(t.Context(), directory, complete.Options{})
	for _, i := range items {
		if !i.Complete() {
			names = append(names, i.Path)
		}
	}
	if want := []string{"a.narinfo", "b.narinfo", "c.narinfo", "d.narinfo"}; err != nil || !slices.Equal(names, want) {
		t.Errorf("%q, %v", names, err)
	}
}
