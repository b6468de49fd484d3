// SPDX-License-Identifier: GPL-3.0-or-later

package reuse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

// A testStore is a store with what the daemon's database says about it.
type testStore struct {
	t     testing.TB
	dir   string
	items map[string]*narinfo.Narinfo // by hash part
	state string
}

func newTestStore(t testing.TB) *testStore {
	t.Helper()
	s := &testStore{t: t, dir: t.TempDir() + "/store", items: map[string]*narinfo.Narinfo{}, state: t.TempDir()}
	must(t, os.Mkdir(s.dir, 0o755))
	t.Cleanup(func() {
		names, _ := os.ReadDir(s.dir)
		for _, n := range names {
			restore.Remove(s.dir + "/" + n.Name())
		}
	})
	return s
}

// database is the store's [Database].
func (s *testStore) database(_ context.Context, hashPart string) (*narinfo.Narinfo, error) {
	if n := s.items[hashPart]; n != nil {
		return n, nil
	}
	return nil, errors.New("no such item")
}

// finder returns one as a new process has it.
func (s *testStore) finder() *Finder { return s.finderOf(s.database) }

func (s *testStore) finderOf(database Database) *Finder {
	if database == nil {
		database = func(context.Context, string) (*narinfo.Narinfo, error) { return nil, ErrNoDatabase }
	}
	return New(Config{StoreDir: s.dir, Database: database, MissesFile: s.state + "/reuse"})
}

// register makes a canonical item of the tree that a build has left in the store, and returns its
// narinfo.
func (s *testStore) register(name string, references ...string) *narinfo.Narinfo {
	s.t.Helper()
	built := s.dir + "/" + name
	canonical := s.dir + "/.canonical"
	r, err := restore.Restore(s.t.Context(), nar.NewTree(built), canonical, restore.Options{})
	must(s.t, err)
	must(s.t, restore.Remove(built))
	must(s.t, os.Rename(canonical, built))
	n := &narinfo.Narinfo{StorePath: built, NarDigest: r.NarHash, NarSize: r.NarSize, NarSizeKnown: true, References: references}
	s.items[name[:HashLength]] = n
	return n
}

// write writes a tree of files, of which those that are called bin/… can be executed, and links,
// whose contents begin with "->".
func (s *testStore) write(name string, files map[string]string) {
	s.t.Helper()
	for path, contents := range files {
		path = filepath.Join(s.dir, name, path)
		must(s.t, os.MkdirAll(filepath.Dir(path), 0o755))
		mode := os.FileMode(0o644)
		if filepath.Base(filepath.Dir(path)) == "bin" {
			mode = 0o755
		}
		var err error
		if target, ok := bytes.CutPrefix([]byte(contents), []byte("->")); ok {
			err = os.Symlink(string(target), path)
		} else {
			err = os.WriteFile(path, []byte(contents), mode)
		}
		must(s.t, err)
	}
}

// forget takes an item out of the store, as if it had never been there.
func (s *testStore) forget(name string) {
	s.t.Helper()
	must(s.t, restore.Remove(s.dir+"/"+name))
	delete(s.items, name[:HashLength])
}

// twice makes an item with each of two sets of hashes. The build is told the names of the item and
// of its references. It returns the name of the old item, which is in the store, and the narinfo of
// the new one, which is not.
func (s *testStore) twice(name string, references []string, build func(item string, references []string)) (string, *narinfo.Narinfo) {
	s.t.Helper()
	made := func(set int) string {
		item := hash(1000*set) + "-" + name
		var refs []string
		for i, r := range references {
			refs = append(refs, hash(1000*set+i+1)+"-"+r)
		}
		build(item, refs)
		s.present(refs...)
		s.register(item, refs...)
		return item
	}
	old, new := made(1), made(2)
	want := s.items[new[:HashLength]]
	s.forget(new)
	return old, want
}

// present makes items, of nothing, unless they are in the store.
func (s *testStore) present(names ...string) {
	s.t.Helper()
	for _, name := range names {
		if err := os.Mkdir(s.dir+"/"+name, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			s.t.Fatal(err)
		}
	}
}

// both makes an old and a new item of files that mention other items by what text says.
func (s *testStore) both(name string, references []string, text func(item string, references []string) map[string]string) (string, *narinfo.Narinfo) {
	s.t.Helper()
	return s.twice(name, references, func(item string, refs []string) { s.write(item, text(item, refs)) })
}

// attempt makes the item of the narinfo of the first candidate that there is and which makes it. It
// returns what was wrong with the others.
func (s *testStore) attempt(f *Finder, want *narinfo.Narinfo) (made *Candidate, failures []error) {
	s.t.Helper()
	for c := range f.Find(s.t.Context(), want) {
		if c.Hopeless {
			continue
		}
		nodes := c.Nodes(s.t.Context())
		r, err := restore.Restore(s.t.Context(), nodes, want.StorePath, restore.Options{LinksDirectory: s.dir + "/.links", MaxBytes: want.NarSize})
		nodes.Close()
		if err == nil && r.NarHash == want.NarDigest {
			return c, failures
		}
		if err == nil {
			err = errors.Join(errWrong, c.Missed(s.t.Context()))
		}
		failures = append(failures, err)
		must(s.t, restore.Remove(want.StorePath))
	}
	return nil, failures
}

var errWrong = errors.New("wrong hash")

// snapshot is all that must not change of an item.
func (s *testStore) snapshot(name string) string {
	s.t.Helper()
	var all bytes.Buffer
	err := filepath.WalkDir(s.dir+"/"+name, func(path string, d fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &st)
		}
		if err != nil {
			return err
		}
		fmt.Fprintln(&all, path, st.Ino, st.Mode, st.Uid, st.Gid, st.Size, st.Mtim)
		return nil
	})
	must(s.t, err)
	sum, _, err := nar.HashTree(s.t.Context(), s.dir+"/"+name)
	must(s.t, err)
	return fmt.Sprintf("%s%x", all.String(), sum)
}

// check wants the item of the narinfo to be made of the old one, whatever is known, and the old one
// to stay as it is.
func (s *testStore) check(old string, want *narinfo.Narinfo) {
	s.t.Helper()
	before := s.snapshot(old)
	for _, database := range []Database{s.database, nil} {
		c, failures := s.attempt(s.finderOf(database), want)
		if c == nil {
			s.t.Fatalf("not made (with a database: %t): %v", database != nil, failures)
		}
		if c.String() != s.dir+"/"+old {
			s.t.Errorf("made of %s", c)
		}
		must(s.t, restore.Remove(want.StorePath))
	}
	if s.snapshot(old) != before {
		s.t.Error("the old item has changed")
	}
}

// run runs a program in a directory, which is the same for each build, and fails the test if it
// fails.
func (s *testStore) run(dir, program string, arguments ...string) {
	s.t.Helper()
	command := exec.Command(program, arguments...)
	command.Dir = dir
	command.Env = append(os.Environ(), "SOURCE_DATE_EPOCH=1", "TZ=UTC", "GUILE_AUTO_COMPILE=0")
	if output, err := command.CombinedOutput(); err != nil {
		s.t.Fatalf("%s: %v\n%s", command, err, output)
	}
}

// needs skips a test of programs that are not there.
func needs(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("%s is not installed", p)
		}
	}
}

// workDir makes an empty directory of the given name, the same each time, with the given files of
// one modification time.
func (s *testStore) workDir(files map[string]string) string {
	s.t.Helper()
	dir := filepath.Dir(s.dir) + "/build"
	must(s.t, os.RemoveAll(dir))
	for name, contents := range files {
		name = dir + "/" + name
		must(s.t, errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(contents), 0o644),
			os.Chtimes(name, time.Unix(1e9, 0), time.Unix(1e9, 0))))
	}
	return dir
}
