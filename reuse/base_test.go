// SPDX-License-Identifier: GPL-3.0-or-later

package reuse

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

// published is an item whose blocks somebody has.
type published struct {
	blocks     *sourcetest.Backend
	capability eris.ReadCapability
}

func publish(t testing.TB, nodes nar.Nodes) published {
	t.Helper()
	p := published{blocks: sourcetest.NewBackend()}
	r, err := erisfs.Encode(t.Context(), nodes, p.blocks.Put, erisfs.EncodeOptions{})
	must(t, err)
	p.capability = r.Capability
	return p
}

// bare is nodes without what is of use only to whoever restores them.
type bare struct{ nar.Nodes }

func (b bare) Next() (nar.Node, error) {
	n, err := b.Nodes.Next()
	n.Same, n.Unique = nil, false
	return n, err
}

// publishedTwice is twice with the blocks of the new item.
func (s *testStore) publishedTwice(name string, references []string, build func(item string, references []string)) (old string, want *narinfo.Narinfo, p published) {
	s.t.Helper()
	old, want = s.twice(name, references, func(item string, refs []string) {
		build(item, refs)
		p = publish(s.t, nar.NewTree(s.dir+"/"+item))
	})
	return old, want, p
}

// open opens the blocks, with a base. Calls of the returned function tell how many bytes were
// fetched.
func (p published) open(t testing.TB, base erisfs.Base) (nodes nar.Nodes, done func(), fetched func() int64) {
	t.Helper()
	var bytes atomic.Int64
	source := fetch.Within(p.blocks.Open(16), eris.Reference{}, func(n int) { bytes.Add(int64(n)) })
	x, err := image.Open(t.Context(), source, p.capability, erisfs.Limits{NarSize: 1 << 40}, fetch.Window{})
	must(t, err)
	x.Base = base
	nodes, closeNodes, err := x.Nodes(t.Context())
	must(t, err)
	return nodes, func() { closeNodes(); source.Close() }, bytes.Load
}

// get restores an item from blocks and a base. It returns how many bytes were fetched.
func (s *testStore) get(want *narinfo.Narinfo, p published, base erisfs.Base) int64 {
	s.t.Helper()
	nodes, done, fetched := p.open(s.t, base)
	defer done()
	r, err := restore.Restore(s.t.Context(), nodes, want.StorePath, restore.Options{LinksDirectory: s.dir + "/.links", MaxBytes: 1 << 40})
	must(s.t, err)
	if r.NarHash != want.NarDigest {
		s.t.Error("wrong hash")
	}
	return fetched()
}

// base returns the base of the first candidate.
func (s *testStore) base(f *Finder, want *narinfo.Narinfo) *Base {
	s.t.Helper()
	for c := range f.Find(s.t.Context(), want) {
		base, err := c.Base(s.t.Context())
		must(s.t, err)
		return base
	}
	s.t.Fatal("no candidate")
	return nil
}

// TestBase has items that are the same but for some bytes, among them those that cannot be made by
// rewriting alone, and counts what is fetched of them.
func TestBase(t *testing.T) {
	const program = `package main
import ("archive/tar"; "archive/zip"; "crypto/tls"; "encoding/json"; "encoding/xml"; "fmt"; "html/template"; "go/types"; "net/http"; "net/rpc"; "image/png")
func main() {
	http.Handle("/", http.FileServer(http.Dir(%q)))
	_ = tls.Config{}; _ = json.Valid; _ = zip.Deflate; _ = tar.TypeReg; _ = xml.Header; _ = png.Decode; _ = rpc.DefaultRPCPath
	_ = template.New; _ = types.NewChecker
	fmt.Println(template.New("x").Parse(""))
	rpc.Accept(nil)
	png.Decode(nil)
}`
	for name, test := range map[string]struct {
		programs []string
		reason   error // why it is not made by rewriting; nil if its length is another one
		build    func(s *testStore, item, out, reference string)
	}{
		"Go build ID": {[]string{"go"}, errGo, func(s *testStore, item, out, reference string) {
			dir := s.workDir(map[string]string{"main.go": fmt.Sprintf(program, reference)})
			s.run(dir, "mkdir", "-p", out+"/bin")
			s.run(dir, "env", "CGO_ENABLED=0", "GOFLAGS=", "go", "build", "-o", out+"/bin/x", "main.go")
		}},
		"debug link without the debug file": {[]string{"gcc", "objcopy", "strip"}, errWrong, func(s *testStore, item, out, reference string) {
			dir := s.workDir(map[string]string{
				"main.c": fmt.Sprintf("const char *path = %q; extern const char data[];\n"+
					"__asm__(\".section .rodata\\n.globl data\\ndata: .incbin \\\"data\\\"\\n.previous\");\nint main() { return data[path[0]]; }\n", reference),
				"data": mixed(3600 << 10),
			})
			s.run(dir, "mkdir", "-p", out+"/bin")
			s.run(dir, "gcc", "-g", "-o", "x", "main.c")
			s.run(dir, "objcopy", "--only-keep-debug", "x", "x.debug")
			s.run(dir, "strip", "x")
			s.run(dir, "objcopy", "--add-gnu-debuglink=x.debug", "x", out+"/bin/x")
		}},
		"compressed manual page, of another length": {[]string{"gzip"}, nil, func(s *testStore, item, out, reference string) {
			dir := s.workDir(map[string]string{"page.1": strings.Repeat(reference, 1+len(reference)%7) + item + item[:int(item[0])%32]})
			s.run(dir, "gzip", "-n", "page.1")
			s.run(dir, "mkdir", "-p", out+"/share/man")
			s.run(dir, "cp", "page.1.gz", out+"/share/man")
			s.write(item, map[string]string{"bin/x": mixed(1 << 20), "lib/x": mixed(1<<20) + reference, "lib/" + item + "/x": reference, "empty": ""})
		}},
		"a byte here and there": {nil, errWrong, func(s *testStore, item, out, reference string) {
			large := []byte(mixed(2<<20) + reference)
			large[1<<20] = item[0]
			s.write(item, map[string]string{"bin/x": mixed(2 << 20), "lib/large": string(large), "small": item, "lib/" + item[:3]: "x", "lib/" + item: "y"})
		}},
	} {
		t.Run(name, func(t *testing.T) {
			needs(t, test.programs...)
			s := newTestStore(t)
			old, want, p := s.publishedTwice("x-1.0", []string{"y-1.0"}, func(item string, refs []string) {
				test.build(s, item, s.dir+"/"+item, s.dir+"/"+refs[0])
			})
			if test.reason != nil {
				s.misses(old, want, test.reason)
			}
			before := s.snapshot(old)
			for _, database := range []Database{s.database, nil} {
				f := s.finderOf(database)
				if c, _ := s.attempt(f, want); c != nil {
					t.Fatal("made by rewriting")
				}
				for range 2 { // known to be of no use, and known to have been read in vain
					fetched := s.get(want, p, s.base(f, want))
					t.Logf("%d bytes of %d: %.4f", fetched, want.NarSize, float64(fetched)/float64(want.NarSize))
					if fetched > int64(want.NarSize)*3/100 {
						t.Errorf("%d bytes were fetched of %d", fetched, want.NarSize)
					}
					if linked := sameInode(s.dir+"/"+old+"/bin/x", want.StorePath+"/bin/x"); linked != (database != nil && test.programs == nil || database != nil && name[0] == 'c') {
						t.Errorf("linked: %t", linked)
					}
					must(t, restore.Remove(want.StorePath))
					if s.snapshot(old) != before {
						t.Error("the old item has changed")
					}
				}
			}
		})
	}
}

func sameInode(a, b string) bool {
	x, err1 := os.Stat(a)
	y, err2 := os.Stat(b)
	return err1 == nil && err2 == nil && os.SameFile(x, y)
}

// TestLeaves has files of all lengths around those of blocks, of which some differ in the last
// byte, and counts what is fetched: of each that differs, the nodes above its leaves and one leaf.
func TestLeaves(t *testing.T) {
	sizes := []int{1, 1022, 1023, 1024, 1025, 2048, 16383, 16384, 32767, 32768, 32769, 65535, 65536, 200000}
	fetched := func(differ bool) int64 {
		s, builds := newTestStore(t), 0
		_, want, p := s.publishedTwice("x-1.0", nil, func(item string, _ []string) {
			builds++
			files := map[string]string{}
			for _, size := range sizes {
				for i := range 5 {
					contents := []byte(mixed(size))
					if i == 3 && differ {
						contents[size-1] += byte(builds)
					}
					files[fmt.Sprintf("%06d-%d", size, i)] = string(contents)
				}
			}
			s.write(item, files)
		})
		return s.get(want, p, s.base(s.finder(), want))
	}
	expected := int64(0)
	for _, size := range sizes {
		block := int(eris.BlockSizeFor(int64(size)))
		blocks := 1
		for n := size/block + 1; n > 1; {
			n = (n + block/64 - 1) / (block / 64)
			blocks += n
		}
		expected += int64(blocks * block)
	}
	index := fetched(false)
	if n := fetched(true) - index; index > 64<<10 || n != expected {
		t.Errorf("%d bytes beside the index of %d instead of %d", n, index, expected)
	}
}

// TestBrokenBase has old items that are not what they should be. What is wrong is fetched.
func TestBrokenBase(t *testing.T) {
	for name, spoil := range map[string]func(item string) error{
		"another byte": func(item string) error { return overwrite(item+"/bin/real", 100000, "!") },
		"shorter":      func(item string) error { return os.Truncate(item+"/bin/real", 100000) },
		"no file":      func(item string) error { return os.Remove(item + "/bin/real") },
		"empty":        func(item string) error { return os.RemoveAll(item + "/bin") },
		"a pipe": func(item string) error {
			return errors.Join(os.Remove(item+"/bin/real"), unix.Mkfifo(item+"/bin/real", 0o444))
		},
		"a link": func(item string) error {
			return errors.Join(os.Remove(item+"/bin/real"), os.Symlink("../share/plain", item+"/bin/real"))
		},
		"a directory that is a link": func(item string) error {
			return errors.Join(os.Rename(item+"/bin", item+"/moved"), os.Symlink("moved", item+"/bin"))
		},
		"cannot be read":  func(item string) error { return os.Chmod(item+"/bin/real", 0) },
		"somebody else's": func(item string) error { return chownIfRoot(item + "/bin/real") },
	} {
		t.Run(name, func(t *testing.T) {
			s := newTestStore(t)
			old, want, p := s.publishedTwice("x-1.0", []string{"bash-5.1"}, func(item string, refs []string) { s.write(item, tree(item, refs)) })
			base := s.base(s.finder(), want)
			must(t, writable(s.dir+"/"+old))
			must(t, spoil(s.dir+"/"+old))
			all := s.get(want, p, nil)
			must(t, restore.Remove(want.StorePath))
			if fetched := s.get(want, p, base); fetched > all*2/3 {
				t.Errorf("%d bytes were fetched of %d", fetched, all)
			}
			if sameInode(s.dir+"/"+old+"/bin/real", want.StorePath+"/bin/real") {
				t.Error("linked to what is wrong")
			}
		})
	}
}

func overwrite(file string, offset int64, text string) error {
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte(text), offset)
	return errors.Join(err, f.Close())
}

func chownIfRoot(file string) error {
	if os.Geteuid() != 0 {
		return os.Chmod(file, 0o600) // not canonical either
	}
	return os.Chown(file, 1234, 1234)
}

// writable makes a tree one that can be changed.
func writable(root string) error {
	return filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type()&os.ModeSymlink == 0 {
			err = os.Chmod(path, 0o755)
		}
		return err
	})
}

// TestNoBase has an old item that has gone, so that nothing need be fetched in vain.
func TestNoBase(t *testing.T) {
	s := newTestStore(t)
	old, want, p := s.publishedTwice("x-1.0", []string{"bash-5.1"}, func(item string, refs []string) { s.write(item, tree(item, refs)) })
	base := s.base(s.finder(), want)
	s.forget(old)
	source := p.blocks.Open(16)
	defer source.Close()
	x, err := image.Open(t.Context(), source, p.capability, erisfs.Limits{NarSize: 1 << 40}, fetch.Window{})
	must(t, err)
	x.Base = base
	if _, done, err := x.Nodes(t.Context()); err == nil {
		done()
		t.Error("there is a tree")
	}
}

// TestReadPart reads parts of a file that has hashes everywhere, and compares them with those of
// the whole.
func TestReadPart(t *testing.T) {
	s := newTestStore(t)
	old, want := s.both("x-1.0", []string{"bash-5.1"}, func(item string, refs []string) map[string]string {
		return map[string]string{"f": strings.Repeat(strings.Join(forms(item), " ")+refs[0], 300)}
	})
	base := s.base(s.finder(), want)
	node, contents, done, err := base.File("f", false)
	must(t, err)
	defer done()
	var whole []byte
	for {
		c, err := contents.Next()
		if err != nil {
			break
		}
		whole = append(whole, c.Bytes...)
		c.Release()
	}
	if text, err := os.ReadFile(s.dir + "/" + old + "/f"); err != nil || uint64(len(whole)) != node.Size || string(text) == string(whole) {
		t.Fatal("not rewritten")
	}
	r := rand.New(rand.NewPCG(7, 8))
	for range 3000 {
		p := make([]byte, 1+r.IntN(3000))
		offset := r.IntN(len(whole) + 1)
		n, err := base.ReadPart("f", p, int64(offset))
		if want := whole[offset:min(offset+len(p), len(whole))]; err != nil || string(p[:n]) != string(want) {
			t.Fatalf("%d bytes at %d are others: %v", len(p), offset, err)
		}
	}
	// Of one that is longer than all of the new item no more than that is of use.
	must(t, errors.Join(os.Chmod(s.dir+"/"+old+"/f", 0o644), os.Truncate(s.dir+"/"+old+"/f", 1<<40)))
	node, _, done, err = base.File("f", false)
	must(t, err)
	done()
	if node.Size > max(want.NarSize, 1<<20) {
		t.Errorf("%d bytes for an item of %d", node.Size, want.NarSize)
	}
	must(t, os.Truncate(s.dir+"/"+old+"/f", int64(len(whole))))
	for _, wrong := range []struct {
		path   string
		offset int64
	}{{"f", int64(len(whole)) + 1}, {"g", 0}, {"", 0}} {
		if n, err := base.ReadPart(wrong.path, make([]byte, 10), wrong.offset); n > 0 || err == nil {
			t.Errorf("%d bytes of %q at %d", n, wrong.path, wrong.offset)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for c := range s.finder().Find(t.Context(), want) {
		base, err := c.Base(ctx)
		must(t, err)
		if _, _, done, err := base.File("f", true); err == nil {
			done()
		}
	}
}
