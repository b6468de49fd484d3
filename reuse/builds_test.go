// SPDX-License-Identifier: GPL-3.0-or-later

package reuse

import (
	"archive/zip"
	"bytes"
	"cmp"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"slices"
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// These tests build things twice with the real programs, with other hashes in the names of
// dependencies, and make the second of the first.

// cBuild builds a program and libraries with debug information, which goes into another output.
func cBuild(s *testStore) func(item string, refs []string) {
	return func(item string, refs []string) {
		dependency := s.dir + "/" + refs[0]
		must(s.t, errors.Join(os.MkdirAll(dependency+"/include", 0o755),
			os.WriteFile(dependency+"/include/libc.h", []byte("static inline int twice(int x) { return 2 * x; }\n"), 0o644)))
		dir := s.workDir(map[string]string{
			"config.h": fmt.Sprintf("#define DEPENDENCY %q\n", dependency),
			"lib.c": "#include \"config.h\"\n#include <uchar.h>\nconst char16_t *wide = u\"\" DEPENDENCY;\nconst char32_t *wider = U\"\" DEPENDENCY;\n" +
				"const char *path(void) { return DEPENDENCY \"/share\"; }\n",
			"main.c": "#include \"config.h\"\n#include <libc.h>\n#include <stdio.h>\nconst char *path(void);\nint main(int c, char **v) { return twice(c) + puts(path()) + puts(DEPENDENCY); }\n",
		})
		out, debug := s.dir+"/"+item, s.dir+"/"+refs[1]
		flags := []string{"-g", "-O1", "-fPIC", "-I" + dependency + "/include", "-Wl,--build-id=none", "-Wl,-rpath=" + out + "/lib:" + dependency + "/lib"}
		gcc := func(arguments ...string) { s.run(dir, "gcc", append(flags, arguments...)...) }
		gcc("-c", "lib.c", "-o", "lib.o")
		gcc("-shared", "lib.o", "-o", "libx.so")
		gcc("main.c", "-o", "prog", "-L.", "-lx")
		s.run(dir, "ar", "rcsD", "libx.a", "lib.o")
		s.run(dir, "mkdir", "-p", out+"/bin", out+"/lib", debug+"/lib/debug"+out+"/bin", debug+"/lib/debug"+out+"/lib")
		for _, file := range []string{"bin/prog", "lib/libx.so"} {
			built := dir + "/" + file[4:]
			s.run(dir, "objcopy", "--only-keep-debug", built, debug+"/lib/debug"+out+"/"+file+".debug")
			s.run(dir, "strip", "--strip-debug", built)
			s.run(dir, "objcopy", "--add-gnu-debuglink="+debug+"/lib/debug"+out+"/"+file+".debug", built, out+"/"+file)
		}
		s.run(dir, "cp", "libx.a", out+"/lib")
	}
}

func TestC(t *testing.T) {
	needs(t, "gcc", "ar", "objcopy", "strip")
	s := newTestStore(t)
	// The debug output is no reference, but is of the same derivation.
	debug := func(set int) string { return hash(1000*set+2) + "-hello-1.0-debug" }
	made := map[int]*narinfo.Narinfo{}
	var wantDebug *narinfo.Narinfo
	for _, set := range []int{1, 2} {
		item, dependency := hash(1000*set)+"-hello-1.0", hash(1000*set+1)+"-libc-2.35"
		cBuild(s)(item, []string{dependency, debug(set)})
		made[set] = s.register(item, item, dependency)
		wantDebug = s.register(debug(set), item, dependency)
		s.present(item)
	}
	old := made[1].StorePath[len(s.dir)+1:]
	s.forget(made[2].StorePath[len(s.dir)+1:])
	t.Run("new debug file", func(t *testing.T) { s.check(old, made[2]) })
	s.forget(debug(2))
	t.Run("old debug file", func(t *testing.T) { s.check(old, made[2]) })
	t.Run("no debug file", func(t *testing.T) {
		must(t, os.Rename(s.dir+"/"+debug(1), s.dir+"/gone"))
		s.misses(old, made[2], errWrong)
		must(t, os.Rename(s.dir+"/gone", s.dir+"/"+debug(1)))
	})
	t.Run("debug output", func(t *testing.T) { s.check(debug(1), wantDebug) })
}

// misses wants the item not to be made, with the error given, the old one to stay as it is, and
// nothing to be tried again.
func (s *testStore) misses(old string, want *narinfo.Narinfo, reason error) {
	s.t.Helper()
	before := s.snapshot(old)
	for attempt := range 2 {
		c, failures := s.attempt(s.finder(), want)
		switch {
		case c != nil:
			s.t.Fatalf("made of %s", c)
		case attempt == 0 && (len(failures) == 0 || !errors.Is(failures[0], reason)):
			s.t.Errorf("failed with %v instead of %v", failures, reason)
		case attempt == 1 && len(failures) > 0:
			s.t.Errorf("tried again: %v", failures)
		}
	}
	if s.snapshot(old) != before {
		s.t.Error("the old item has changed")
	}
	os.Remove(s.state + "/reuse")
}

func TestPython(t *testing.T) {
	needs(t, "python3")
	for _, mode := range []string{"unchecked-hash", "timestamp"} {
		s := newTestStore(t)
		s.check(s.twice("python-x-1.0", []string{"python-3.11"}, func(item string, refs []string) {
			dir := s.workDir(map[string]string{
				"x/__init__.py": fmt.Sprintf("PATH = %q\nSELF = %q\n", s.dir+"/"+refs[0], s.dir+"/"+item),
				"x/plain.py":    "def f(x):\n    return x\n",
			})
			out := s.dir + "/" + item
			s.run(dir, "python3", "-m", "compileall", "-q", "-s", dir, "--invalidation-mode", mode, "x")
			s.run(dir, "python3", "-O", "-m", "compileall", "-q", "-s", dir, "--invalidation-mode", mode, "x")
			s.run(dir, "mkdir", "-p", out)
			s.run(dir, "cp", "-r", "x", out+"/site-packages")
			s.register(item)
		}))
	}
}

// TestSipHash has what the function source_hash of Python's module _imp returns, of 3.7 to 3.10 and
// of 3.11 to 3.13, for the key 3495.
func TestSipHash(t *testing.T) {
	for rounds, want := range map[[2]int]string{{2, 4}: "734468660ff15255", {1, 3}: "f46c9d83f8aaba8b"} {
		if got := fmt.Sprintf("%x", binary.LittleEndian.AppendUint64(nil, sipHash(rounds, 3495, []byte("abc")))); got != want {
			t.Errorf("SipHash-%d-%d is %s instead of %s", rounds[0], rounds[1], got, want)
		}
	}
}

func TestGuile(t *testing.T) {
	needs(t, "guild")
	s := newTestStore(t)
	s.check(s.twice("guile-x-1.0", []string{"guile-3.0.9"}, func(item string, refs []string) {
		dir := s.workDir(map[string]string{
			"x.scm": fmt.Sprintf("(define-module (x) #:export (path self))\n(define path %q)\n(define self (string->symbol %q))\n",
				s.dir+"/"+refs[0], s.dir+"/"+item),
		})
		out := s.dir + "/" + item
		s.run(dir, "guild", "compile", "-L", ".", "x.scm", "-o", "x.go")
		s.run(dir, "mkdir", "-p", out+"/lib/guile/3.0/site-ccache")
		s.run(dir, "cp", "x.go", out+"/lib/guile/3.0/site-ccache")
	}))
}

func TestZip(t *testing.T) {
	needs(t, "zip")
	for _, options := range [][]string{{"-0"}, {"-n", ".sh:.txt"}, {"-0", "-fd"}} {
		s := newTestStore(t)
		s.check(s.twice("x-1.0.jar", []string{"bash-5.1"}, func(item string, refs []string) {
			dir := s.workDir(map[string]string{
				"run.sh": "#!" + s.dir + "/" + refs[0] + "/bin/sh\n", "self.txt": s.dir + "/" + item,
				"other.txt": strings.Repeat("No hash is here. ", 1000), "other.bin": strings.Repeat("No hash is here. ", 1000),
			})
			s.run(dir, "zip", append(append([]string{"-q", "-X", "-D"}, options...), "x.jar", "run.sh", "self.txt", "other.txt", "other.bin")...)
			s.run(dir, "cp", "x.jar", s.dir+"/"+item)
		}))
	}
}

// elfFile is a program of no code, of 64 bits or 32, that has data, and a debug link to a file of
// the given contents.
func elfFile(order binary.AppendByteOrder, bits int, data, debug string) string {
	link := order.AppendUint32([]byte("x.debug\x00"), crc32.ChecksumIEEE([]byte(debug)))
	names := "\x00.gnu_debuglink\x00.shstrtab\x00"
	head := map[int]int{32: 52, 64: 64}[bits]
	b := append([]byte("\x7fELF"), byte(bits/32), order.AppendUint16(nil, 0x201)[0], 1)
	b = append(b, make([]byte, 9)...)
	long := func(numbers ...int) {
		for _, n := range numbers {
			if bits == 64 {
				b = order.AppendUint64(b, uint64(n))
			} else {
				b = order.AppendUint32(b, uint32(n))
			}
		}
	}
	b = order.AppendUint32(order.AppendUint16(order.AppendUint16(b, 2), 62), 1) // a program
	long(0, 0, head+len(data)+len(link)+len(names))                             // where the sections are
	b = order.AppendUint32(b, 0)
	for _, n := range []uint16{uint16(head), 0, 0, uint16(16 + 6*bits/8), 3, 2} {
		b = order.AppendUint16(b, n)
	}
	b = append(append(append(b, data...), link...), names...)
	section := func(name, kind uint32, at, size int) {
		b = order.AppendUint32(order.AppendUint32(b, name), kind)
		long(0, 0, at, size)
		b = append(b, make([]byte, 8)...)
		long(0, 0)
	}
	section(0, 0, 0, 0)
	section(1, 1, head+len(data), len(link))
	section(16, 3, head+len(data)+len(link), len(names))
	return string(b)
}

// TestCompressedNames has a program with a table of names that is compressed, and very long if
// somebody makes it plain.
func TestCompressedNames(t *testing.T) {
	le := binary.LittleEndian
	const blocks, length = 512, 128 << 10
	names := le.AppendUint64(le.AppendUint64(le.AppendUint64(nil, 2 /* zstd */), blocks*length), 1)
	names = append(names, "\x28\xb5\x2f\xfd\x00\x58"...)
	for i := range blocks { // of one byte each, which is repeated
		head := le.AppendUint32(nil, length<<3|1<<1|uint32((i+1)/blocks))
		names = append(append(names, head[:3]...), 0)
	}
	b := []byte(elfFile(le, 64, "", ""))
	section := b[len(b)-64:]
	le.PutUint64(section[8:], uint64(elf.SHF_COMPRESSED))
	le.PutUint64(section[24:], uint64(len(b)))
	le.PutUint64(section[32:], uint64(len(names)))
	b = append(b, names...)
	var err error
	taken := testhelp.Allocated(func() { _, err = new(workshop).elf(bytes.NewReader(b), "x") })
	if err != nil || taken > 8<<20 {
		t.Errorf("%d bytes of memory for a file of %d: %v", taken, len(b), err)
	}
}

// TestManyChecksums has a zip file whose directory has one member many times.
func TestManyChecksums(t *testing.T) {
	const most = leastSummed / leastRead
	members := 2 * most
	b := []byte(stored(t, hash(1)))
	start, entry := zipDirectory(bytes.NewReader(b), int64(len(b)))
	end := b[int(start)+len(entry):]
	binary.LittleEndian.PutUint32(end[12:], uint32(members*len(entry)))
	b = slices.Concat(b[:start], bytes.Repeat(entry, members), end)
	w := &workshop{table: NewReplacer([]Replacement{{hash(1), hash(2)}}), unread: leastSummed}
	patches, err := w.zip(bytes.NewReader(b), int64(len(b)))
	if n := len(patches); err != nil || n == 0 || n > 3*most { // three for each
		t.Errorf("%d patches for %d members: %v", n, members, err)
	}
	if !slices.IsSortedFunc(patches, func(a, b patch) int { return cmp.Compare(a.offset, b.offset) }) {
		t.Error("the patches are not in order")
	}
}

// compiled is a compiled file of Python that has the hash of its source.
func compiled(source, data string) string {
	b := append([]byte("\xa7\r\r\n\x01\x00\x00\x00"), binary.LittleEndian.AppendUint64(nil, sipHash([2]int{1, 3}, 3495|'\r'<<16|'\n'<<24, []byte(source)))...)
	return string(b) + data
}

// stored is a zip file whose members are not compressed.
func stored(t testing.TB, members ...string) string {
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	for i, m := range members {
		w, err := z.CreateHeader(&zip.FileHeader{Name: fmt.Sprint(i), Method: zip.Store})
		must(t, err)
		_, err = w.Write([]byte(m))
		must(t, err)
	}
	must(t, z.Close())
	return b.String()
}

// files are what the tools make, in short, with the hashes of an item and of what it refers to.
func fixtures(s *testStore, item, ref string) map[string]string {
	debug := "debug information of /store/" + item + " and " + ref
	source := "PATH = '/store/" + ref + "'\n"
	return map[string]string{
		"bin/x": elfFile(binary.LittleEndian, 64, "/store/"+ref+"/lib", debug),
		"bin/y": elfFile(binary.BigEndian, 32, "/store/"+ref+"/lib", debug), "lib/debug" + s.dir + "/" + item + "/bin/x.debug": debug,
		"lib/x.py": source, "lib/__pycache__/x.cpython-311.pyc": compiled(source, "/store/"+ref),
		"share/x.jar": stored(s.t, "/store/"+item, "nothing", ref), "lib/x.go": "\x7fELF GOOF" + wide("/store/"+ref, 4, binary.LittleEndian),
		"lib/x.a": "!<arch>\nx.o/            0           0     0     644     44        `\n/store/" + ref,
	}
}

// TestFixtures has what the real programs make where those are not installed.
func TestFixtures(t *testing.T) {
	s := newTestStore(t)
	s.check(s.both("x-1.0", []string{"bash-5.1"}, func(item string, refs []string) map[string]string { return fixtures(s, item, refs[0]) }))
	// The debug link counts: without the repair it would be another item.
	old, want := s.both("y-1.0", []string{"bash-5.1"}, func(item string, refs []string) map[string]string { return fixtures(s, item, refs[0]) })
	debug := s.dir + "/" + old + "/lib/debug" + s.dir + "/" + old + "/bin"
	must(t, errors.Join(os.Chmod(debug, 0o755), os.Remove(debug+"/x.debug")))
	if c, _ := s.attempt(s.finder(), want); c != nil {
		t.Error("made without the debug file")
	}
	// Nobody reads a source over and over.
	_, want = s.both("z-1.0", []string{"bash-5.1"}, func(item string, refs []string) map[string]string {
		source := refs[0] + strings.Repeat("#", 1<<20)
		files := map[string]string{"lib/x.py": source}
		for i := range 200 {
			files[fmt.Sprintf("lib/x.%d.pyc", i)] = compiled(source, "")
		}
		return files
	})
	if c, _ := s.attempt(s.finder(), want); c != nil {
		t.Error("a source was read 200 times")
	}
}
