// SPDX-License-Identifier: GPL-3.0-or-later

package reuse

import (
	"archive/zip"
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

var must = testhelp.Must

// Items are restored under the umask that the commands set.
func init() { unix.Umask(0o022) }

// plain is a file without a hash in it that is long enough for a link.
var plain = strings.Repeat("No hash is here.\n", 9000)

// tree is an item with hashes everywhere, in an order that depends on them.
func tree(item string, refs []string) map[string]string {
	files := map[string]string{
		"bin/run": "#!/store/" + refs[0] + "/bin/sh\nexec /store/" + item + "/bin/real\n", "bin/real": plain, "share/plain": plain, "share/empty": "",
		"share/large": strings.Repeat(plain, 3) + refs[0], "link": "->/store/" + refs[0] + "/lib", "lib/x": strings.Join(forms(item), " "),
	}
	for i, r := range append(refs, item) {
		files["share/"+r+".desktop"] = "Exec=/store/" + r
		files["share/d-"+r+"/"+fmt.Sprint(i)] = fmt.Sprint(i)
	}
	return files
}

func TestReuse(t *testing.T) {
	for _, test := range []struct {
		name       string
		references []string
	}{
		{"one reference", []string{"bash-5.1"}},
		{"many", []string{"bash-5.1", "glibc-2.35", "glibc-2.35-static", "gcc-11.3.0-lib"}},
		{"two of one name", []string{"bash-5.1", "glibc-2.35", "glibc-2.35"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newTestStore(t)
			s.check(s.both("x-1.0", test.references, tree))
		})
	}
}

// TestOrders has two references of one name that belong together in the order that is tried last.
func TestOrders(t *testing.T) {
	s := newTestStore(t)
	_, want := s.both("x-1.0", []string{"y-1.0", "y-1.0"}, func(_ string, refs []string) map[string]string {
		first, second := 0, 1
		if strings.Compare(refs[0], refs[1]) > 0 != (refs[0][:HashLength] == hash(1001)) {
			first, second = 1, 0
		}
		return map[string]string{"a": refs[first], "b": refs[second] + plain}
	})
	f := s.finder()
	c, failures := s.attempt(f, want)
	if c == nil || len(failures) > 1 {
		t.Fatalf("not made in two tries: %v", failures)
	}
	// What failed is not tried again.
	must(t, restore.Remove(want.StorePath))
	if c, failures := s.attempt(s.finder(), want); c == nil || len(failures) > 0 {
		t.Errorf("made of %v after %v", c, failures)
	}
}

func TestMappings(t *testing.T) {
	h := func(i int, name string) string { return hash(i) + "-" + name }
	itself := Replacement{h(1, "x"), h(2, "x")}
	for _, test := range []struct {
		name     string
		old, new []string
		want     [][]Replacement
	}{
		{"no references", nil, nil, [][]Replacement{{itself}}},
		{"itself", []string{h(1, "x")}, []string{h(2, "x")}, [][]Replacement{{itself}}},
		{"only the old one refers to itself", []string{h(1, "x")}, nil, [][]Replacement{{itself}}},
		{"the same", []string{h(3, "a")}, []string{h(3, "a")}, [][]Replacement{{itself}}},
		{"by name", []string{h(3, "a"), h(4, "b")}, []string{h(6, "b"), h(5, "a")},
			[][]Replacement{{itself, {h(3, "a"), h(5, "a")}, {h(4, "b"), h(6, "b")}}}},
		{"by digits", []string{h(3, "a-1.2")}, []string{h(5, "a-1.3")}, [][]Replacement{{itself, {h(3, "a-1.2"), h(5, "a-1.3")}}}},
		{"by name, then by digits", []string{h(3, "a-1.2"), h(4, "a-1.3")}, []string{h(5, "a-1.3"), h(6, "a-1.4")},
			[][]Replacement{{itself, {h(4, "a-1.3"), h(5, "a-1.3")}, {h(3, "a-1.2"), h(6, "a-1.4")}}}},
		{"another length", []string{h(3, "a-1.9")}, []string{h(5, "a-1.10")}, nil},
		{"one more", []string{h(3, "a")}, []string{h(5, "a"), h(6, "b")}, nil},
		{"one less", []string{h(3, "a"), h(4, "b")}, []string{h(5, "a")}, nil},
		{"no hash", []string{"a"}, []string{"b"}, nil},
	} {
		got := mappings(h(1, "x"), h(2, "x"), test.old, test.new)
		for _, way := range append(got, test.want...) {
			slices.SortFunc(way[1:], func(a, b Replacement) int { return strings.Compare(a.Old, b.Old) })
		}
		if !reflect.DeepEqual(got, test.want) {
			t.Errorf("%s: %v instead of %v", test.name, got, test.want)
		}
	}
	// Several of one name: each order once, not too many.
	for n, want := range []int{1, 1, 2, 4, 4} {
		var old, new []string
		for i := range n {
			old, new = append(old, h(10+i, "a")), append(new, h(20+i, "a"))
		}
		ways := map[string]bool{}
		for _, way := range mappings(h(1, "x"), h(2, "x"), old, new) {
			ways[fmt.Sprint(way)] = true
		}
		if len(ways) != want {
			t.Errorf("%d references of one name: %d ways instead of %d", n, len(ways), want)
		}
	}
}

// TestDigits has a dependency of another version, whose name is as long.
func TestDigits(t *testing.T) {
	s := newTestStore(t)
	versions := func(set int, version string) (string, *narinfo.Narinfo) {
		item, ref := hash(set)+"-x-1.0", hash(set+1)+"-y-"+version
		s.present(ref)
		s.write(item, tree(item, []string{ref}))
		return item, s.register(item, ref)
	}
	old, _ := versions(10, "1.2")
	new, want := versions(20, "1.3")
	s.forget(new)
	s.check(old, want)
}

func TestLinks(t *testing.T) {
	s := newTestStore(t)
	old, want := s.both("x-1.0", []string{"bash-5.1"}, tree)
	for _, database := range []Database{s.database, nil} {
		if c, failures := s.attempt(s.finderOf(database), want); c == nil {
			t.Fatal(failures)
		}
		for path, linked := range map[string]bool{"bin/real": true, "share/plain": true, "share/large": false, "bin/run": false} {
			same := sameInode(s.dir+"/"+old+"/"+path, want.StorePath+"/"+path)
			if linked = linked && database != nil; same != linked {
				t.Errorf("%s (with a database: %t) is the same file: %t", path, database != nil, same)
			}
		}
		must(t, restore.Remove(want.StorePath))
	}
}

// TestNotCanonical has files of the old item that are not as files of a store should be, and that
// others share through the directory of links, or not: they are not made so, and not linked to.
func TestNotCanonical(t *testing.T) {
	for name, change := range map[string]func(file string) error{
		"nothing": func(string) error { return nil },
		"mode":    func(file string) error { return os.Chmod(file, 0o644) },
		"time": func(file string) error {
			return unix.UtimesNanoAt(unix.AT_FDCWD, file, []unix.Timespec{{Sec: 5}, {Sec: 5}}, 0)
		},
		"owner":      chownIfRoot,
		"attributes": func(file string) error { return unix.Setxattr(file, "user.test", []byte("x"), 0) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newTestStore(t)
			old, want := s.both("x-1.0", []string{"bash-5.1"}, func(_ string, refs []string) map[string]string {
				return map[string]string{"share/plain": plain, "share/other": plain + "!", "x": refs[0]}
			})
			for _, shared := range []bool{false, true} {
				if shared { // as if the daemon had done that
					must(t, os.RemoveAll(s.dir+"/.links"))
					_, err := restore.Restore(t.Context(), nar.NewTree(s.dir+"/"+old), s.dir+"/shared", restore.Options{LinksDirectory: s.dir + "/.links"})
					must(t, err)
					must(t, restore.Remove(s.dir+"/"+old))
					must(t, os.Rename(s.dir+"/shared", s.dir+"/"+old))
				}
				if err := change(s.dir + "/" + old + "/share/plain"); err != nil {
					t.Skip(err)
				}
				before := s.snapshot(old)
				for _, database := range []Database{nil, s.database} {
					c, failures := s.attempt(s.finderOf(database), want)
					if c == nil {
						t.Fatal(failures)
					}
					if s.snapshot(old) != before {
						t.Error("the old item has changed")
					}
					linked := shared || database != nil
					if sameInode(s.dir+"/"+old+"/share/other", want.StorePath+"/share/other") != linked {
						t.Errorf("another file (shared: %t, with a database: %t) is linked: %t", shared, database != nil, !linked)
					}
					linked = linked && (name == "nothing" || name == "attributes")
					if sameInode(s.dir+"/"+old+"/share/plain", want.StorePath+"/share/plain") != linked {
						t.Errorf("shared: %t, with a database: %t, linked: %t", shared, database != nil, !linked)
					}
					info, err := os.Stat(want.StorePath + "/share/plain")
					must(t, err)
					if st := info.Sys().(*syscall.Stat_t); st.Mode&0o7777 != 0o444 || st.Mtim.Sec != 1 || int(st.Uid) != os.Geteuid() {
						t.Errorf("the new file has mode %o, time %d and owner %d", st.Mode, st.Mtim.Sec, st.Uid)
					}
					must(t, restore.Remove(want.StorePath))
				}
			}
		})
	}
}

// TestGates has old items of which nothing can be made, and that is known without reading them.
func TestGates(t *testing.T) {
	for name, change := range map[string]func(s *testStore, old string, want *narinfo.Narinfo){
		"wrong size in the database": func(s *testStore, old string, _ *narinfo.Narinfo) { s.items[old[:HashLength]].NarSize++ },
		"not in the database":        func(s *testStore, old string, _ *narinfo.Narinfo) { delete(s.items, old[:HashLength]) },
		"another name": func(s *testStore, _ string, want *narinfo.Narinfo) {
			want.StorePath = s.dir + "/" + hash(77) + "-yx-1.0"
		},
		"another store":     func(_ *testStore, _ string, want *narinfo.Narinfo) { want.StorePath = "/gnu" + want.StorePath },
		"unknown reference": func(_ *testStore, _ string, want *narinfo.Narinfo) { want.References[0] = hash(78) + "-zsh" },
		"itself": func(s *testStore, old string, want *narinfo.Narinfo) {
			want.StorePath = s.dir + "/" + old
		},
	} {
		s := newTestStore(t)
		old, want := s.both("x-1.0", []string{"bash-5.1"}, tree)
		change(s, old, want)
		for c := range s.finder().Find(t.Context(), want) {
			if !c.Hopeless {
				t.Errorf("%s: %s is a candidate", name, c)
			}
		}
	}
}

// TestMuchLonger has an old item of another length than what is wanted, which nobody reads to find
// its references without a database.
func TestMuchLonger(t *testing.T) {
	s := newTestStore(t)
	old, want := s.both("x-1.0", []string{"bash-5.1"}, tree)
	must(t, os.Chmod(s.dir+"/"+old, 0o755))
	must(t, errors.Join(os.WriteFile(s.dir+"/"+old+"/a", nil, 0o644), os.Truncate(s.dir+"/"+old+"/a", 1<<38)))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for c := range s.finderOf(nil).Find(ctx, want) {
		t.Errorf("%s is a candidate", c)
	}
	must(t, ctx.Err())
}

// TestBroken has old items that are not what they should be, or not for long. All fail without
// harm.
func TestBroken(t *testing.T) {
	file := func(s *testStore, old string) string { return s.dir + "/" + old + "/share/plain" }
	for name, change := range map[string]func(s *testStore, old string) error{
		"corrupt": func(s *testStore, old string) error {
			return errors.Join(os.Chmod(file(s, old), 0o644), os.WriteFile(file(s, old), []byte(plain[1:]+"x"), 0o644))
		},
		"corrupt: a file less": func(s *testStore, old string) error {
			return errors.Join(os.Chmod(filepath.Dir(file(s, old)), 0o755), os.Remove(file(s, old)))
		},
		"longer": func(s *testStore, old string) error {
			return errors.Join(os.Chmod(file(s, old), 0o644), os.Truncate(file(s, old), 64<<20))
		},
		"vanished":        func(s *testStore, old string) error { return restore.Remove(s.dir + "/" + old) },
		"being collected": func(s *testStore, old string) error { return os.Rename(s.dir+"/"+old, s.dir+"/.trash") },
	} {
		s := newTestStore(t)
		old, want := s.both("x-1.0", []string{"bash-5.1"}, tree)
		f := s.finder()
		f.listing.named(filepath.Base(want.StorePath)) // it was there a moment ago
		must(t, change(s, old))
		c, failures := s.attempt(f, want)
		text, corrupt := fmt.Sprint(failures), strings.HasPrefix(name, "corrupt")
		// It is not read to its end, which may be far.
		if longer := strings.Contains(text, "plain: longer than what is wanted"); longer != (name == "longer") {
			t.Errorf("%s: longer: %t, %s", name, longer, text)
		}
		if c != nil || strings.Contains(text, "corrupt") != corrupt || corrupt && !strings.Contains(text, old) {
			t.Errorf("%s: made: %t, %s", name, c != nil, text)
		}
	}
}

// TestNext goes on with the second old item after one that is corrupt.
func TestNext(t *testing.T) {
	s := newTestStore(t)
	older, want := s.both("x-1.0", []string{"bash-5.1"}, tree)
	newer, reference := hash(300)+"-x-1.0", hash(301)+"-bash-5.1"
	s.write(newer, tree(newer, []string{reference}))
	s.register(newer, reference)
	name := s.dir + "/" + newer + "/share/plain"
	must(t, errors.Join(os.Chmod(name, 0o644), os.WriteFile(name, []byte(plain[1:]+"x"), 0o644)))
	c, failures := s.attempt(s.finder(), want)
	if c == nil || c.String() != s.dir+"/"+older || len(failures) != 1 {
		t.Errorf("made of %v after %v", c, failures)
	}
}

// stepping does something before a step.
type stepping struct {
	nar.Nodes
	left int
	do   func() error
}

func (s *stepping) Next() (nar.Node, error) {
	if s.left--; s.left == -1 {
		if err := s.do(); err != nil {
			return nar.Node{}, err
		}
	}
	return s.Nodes.Next()
}

var errTest = errors.New("a failure of the test")

// TestEveryStep fails at every step, or takes the old item away: what has been made by then is not
// what it should be, or is, as links to files that nobody else has. Then it removes that, and looks
// at the old item.
func TestEveryStep(t *testing.T) {
	s := newTestStore(t)
	old, want, p := s.publishedTwice("x-1.0", []string{"bash-5.1"}, func(item string, refs []string) { s.write(item, tree(item, refs)) })
	before := s.snapshot(old)
	rewritten := func() (nar.Nodes, func()) {
		for c := range s.finder().Find(t.Context(), want) {
			nodes := c.Nodes(t.Context())
			return nodes, nodes.Close
		}
		return nil, nil
	}
	fromBlocks := func() (nar.Nodes, func()) {
		nodes, done, _ := p.open(t, s.base(s.finder(), want))
		return nodes, done
	}
	for i, open := range []func() (nar.Nodes, func()){rewritten, rewritten, fromBlocks, fromBlocks} {
		vanish := i%2 == 1
		for step, failed := 0, true; failed; step++ {
			nodes, done := open()
			gone := false
			r, err := restore.Restore(t.Context(), &stepping{nodes, step, func() error {
				if gone = vanish; !gone {
					return errTest
				}
				return os.Rename(s.dir+"/"+old, s.dir+"/gone")
			}}, want.StorePath, restore.Options{LinksDirectory: s.dir + "/.links"})
			done()
			if gone {
				must(t, os.Rename(s.dir+"/gone", s.dir+"/"+old))
			}
			failed = err != nil
			if failed && !vanish && !errors.Is(err, errTest) || !failed && (r.NarHash != want.NarDigest || step < 10) {
				t.Errorf("way %d, step %d: %v", i, step, err)
			}
			must(t, restore.Remove(want.StorePath))
			if s.snapshot(old) != before {
				t.Fatalf("way %d: the old item has changed after step %d", i, step)
			}
		}
	}
	// Whoever gives up is not kept waiting.
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for c := range s.finder().Find(ctx, want) {
		nodes := c.Nodes(ctx)
		cancel()
		if _, err := nodes.Next(); !errors.Is(err, context.Canceled) {
			t.Errorf("goes on after the end: %v", err)
		}
	}
}

// telling is nodes that tell each step to a parent process.
type telling struct{ nar.Nodes }

func (n telling) Next() (nar.Node, error) {
	fmt.Println("step")
	return n.Nodes.Next()
}

// TestKills kills a process at every second step of its work, and looks at the old item.
func TestKills(t *testing.T) {
	if dir := os.Getenv("REUSE_TEST_STORE"); dir != "" {
		s := &testStore{t: t, dir: dir, items: map[string]*narinfo.Narinfo{}}
		names, err := filepath.Glob(dir + "/*-x-1.0")
		if err != nil || len(names) == 0 {
			t.Fatal(err)
		}
		old := filepath.Base(names[0])
		s.items[old[:HashLength]] = &narinfo.Narinfo{StorePath: names[0], References: []string{hash(1001) + "-bash-5.1"}}
		want := &narinfo.Narinfo{StorePath: dir + "/" + hash(2000) + "-x-1.0", References: []string{hash(2001) + "-bash-5.1"}}
		for c := range s.finder().Find(t.Context(), want) {
			restore.Restore(t.Context(), telling{c.Nodes(t.Context())}, want.StorePath, restore.Options{LinksDirectory: dir + "/.links"})
			must(t, restore.Remove(want.StorePath))
			base, err := c.Base(t.Context())
			must(t, err)
			nodes, done, _ := publish(t, bare{c.Nodes(t.Context())}).open(t, base)
			restore.Restore(t.Context(), telling{nodes}, want.StorePath, restore.Options{LinksDirectory: dir + "/.links"})
			done()
		}
		fmt.Println("end")
		return
	}
	s := newTestStore(t)
	old, want := s.both("x-1.0", []string{"bash-5.1"}, tree)
	before := s.snapshot(old)
	for kill, ended := 1, false; !ended; kill += 2 {
		child := exec.Command(os.Args[0], "-test.run", "^TestKills$")
		child.Env = append(os.Environ(), "REUSE_TEST_STORE="+s.dir)
		output, err := child.StdoutPipe()
		must(t, err)
		must(t, child.Start())
		lines := bufio.NewScanner(output)
		for steps := 0; steps < kill; steps++ {
			if !lines.Scan() {
				t.Fatalf("the child has failed after %d steps", steps)
			}
			if ended = lines.Text() == "end"; ended && steps < 10 {
				t.Fatalf("the child has made %d steps only", steps)
			}
		}
		child.Process.Kill()
		child.Wait()
		if s.snapshot(old) != before {
			t.Fatalf("the old item has changed after a kill at step %d", kill)
		}
		must(t, restore.Remove(want.StorePath))
		if s.snapshot(old) != before {
			t.Fatalf("the old item has changed by the removal after a kill at step %d", kill)
		}
	}
}

func TestMisses(t *testing.T) {
	m := misses{t.TempDir() + "/reuse"}
	a, b := newRecord("a", [32]byte{1}, 0), newRecord("a", [32]byte{1}, 1)
	if m.has(a) {
		t.Error("a record without a file")
	}
	m.add(a)
	if !m.has(a) || m.has(b) {
		t.Error("not the record that was added")
	}
	for i := range 3 * missSlots {
		m.add(newRecord("x", [32]byte{}, i))
	}
	if info, err := os.Stat(m.path); err != nil || info.Size() > missSlots*int64(len(a)) {
		t.Errorf("the file has %d bytes: %v", info.Size(), err)
	}
	if r := newRecord("x", [32]byte{}, 3*missSlots-1); !m.has(r) {
		t.Error("the last record is not there")
	}
	// What somebody else has put in its place is left alone.
	secret := t.TempDir() + "/secret"
	must(t, errors.Join(os.WriteFile(secret, []byte("secret"), 0o600), os.Remove(m.path), os.Symlink(secret, m.path)))
	m.add(a)
	if text, err := os.ReadFile(secret); string(text) != "secret" || m.has(a) {
		t.Errorf("another file has %q: %v", text, err)
	}
}

// TestSharedPlace has an attempt of which what is remembered belongs to one place in the file. It
// is not made again.
func TestSharedPlace(t *testing.T) {
	for _, test := range []struct {
		name  string
		other func(old string, digest, wrong [32]byte) record
	}{
		{"all orders", func(old string, _, wrong [32]byte) record { return newRecord(old, wrong, noOrder) }},
		{"the old item is right", func(old string, digest, _ [32]byte) record { return newRecord(old, digest, noOrder) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newTestStore(t)
			old, want := s.both("x-1.0", []string{"bash-5.1"}, tree)
			digest, wrong := s.items[old[:HashLength]].NarDigest, [32]byte{}
			for i := uint32(1); newRecord(old, wrong, 0).offset() != test.other(old, digest, wrong).offset(); i++ {
				binary.LittleEndian.PutUint32(wrong[:], i)
			}
			want.NarDigest = wrong
			if c, failures := s.attempt(s.finder(), want); c != nil || len(failures) != 1 {
				t.Fatalf("made: %t, %v", c != nil, failures)
			}
			must(t, restore.Remove(want.StorePath))
			if _, failures := s.attempt(s.finder(), want); len(failures) > 0 {
				t.Errorf("tried again: %v", failures)
			}
		})
	}
}

// TestOpensLate does not ask the database about items that cannot be of use.
func TestOpensLate(t *testing.T) {
	s := newTestStore(t)
	s.both("x-1.0", []string{"bash-5.1"}, tree)
	f := New(Config{StoreDir: s.dir, Database: func(context.Context, string) (*narinfo.Narinfo, error) {
		t.Error("the database is asked")
		return nil, ErrNoDatabase
	}})
	for c := range f.Find(t.Context(), &narinfo.Narinfo{StorePath: s.dir + "/" + hash(5) + "-other-1.0"}) {
		t.Errorf("%s is a candidate", c)
	}
}

// TestListing sees what is new in the store, but does not read it for each item that is made.
func TestListing(t *testing.T) {
	s := newTestStore(t)
	l := &Listing{Directory: s.dir}
	count := func() int {
		t.Helper()
		names, err := l.read()
		must(t, err)
		return len(names)
	}
	// File systems count time in ticks, in which the store may change more than once.
	tick := time.Now().Add(time.Minute)
	s.present(hash(1)+"-x", hash(2)+"-x", hash(2)+"-x.lock", ".links")
	must(t, os.Chtimes(s.dir, tick, tick))
	if n := count(); n != 3 {
		t.Errorf("%d items instead of 3", n)
	}
	s.present(hash(3) + "-x")
	must(t, os.Chtimes(s.dir, tick, tick))
	l.again = time.Now().Add(time.Hour)
	if n := count(); n != 3 {
		t.Errorf("read again, %d items", n)
	}
	l.again = time.Time{}
	if n := count(); n != 4 {
		t.Errorf("not read again, %d items", n)
	}
}

// TestManyDebugItems looks into some of the items only that may have debug files.
func TestManyDebugItems(t *testing.T) {
	s := newTestStore(t)
	for i := range 2 * mostDebug {
		s.present(hash(i)+"-x-1.0-debug", hash(i)+"-x-1.0")
	}
	for _, item := range []string{"-x-1.0", "-x-1.0-lib"} {
		if got := (&Listing{Directory: s.dir}).debug(hash(0) + item); len(got) != mostDebug {
			t.Errorf("%d items", len(got))
		}
	}
}

// FuzzRepairs gives files to the repairs that are broken in any way.
func FuzzRepairs(f *testing.F) {
	table := NewReplacer(somePairs())
	f.Add([]byte("\x7fELF\x02\x01\x01"), "bin/x")
	f.Add([]byte(elfFile(binary.LittleEndian, 64, hash(1), "")), "bin/x")
	f.Add([]byte(elfFile(binary.BigEndian, 32, hash(1), "")), "bin/x")
	f.Add([]byte("\xa7\r\r\n\x01\x00\x00\x00abcdefgh"), "x/__pycache__/x.cpython-311.pyc")
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	for i := range 3 {
		w, err := z.CreateHeader(&zip.FileHeader{Name: "a" + fmt.Sprint(i), Method: uint16(i%2) * zip.Deflate})
		must(f, err)
		fmt.Fprint(w, hash(i))
	}
	must(f, z.Close())
	f.Add(b.Bytes(), "x.jar")
	f.Fuzz(func(t *testing.T, contents []byte, path string) {
		w := &workshop{
			store: "/nonexistent", old: hash(1) + "-x", new: hash(2) + "-x", table: table,
			debug: func() []string { return nil }, unread: 1 << 20,
		}
		patches, err := w.repairs(bytes.NewReader(contents), path, int64(len(contents)))
		for _, p := range patches {
			if err != nil || p.offset < 0 || p.offset+int64(len(p.bytes)) > int64(len(contents)) {
				t.Errorf("a patch of %d bytes at %d: %v", len(p.bytes), p.offset, err)
			}
		}
	})
}
