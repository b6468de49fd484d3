// SPDX-License-Identifier: GPL-3.0-or-later

package reuse

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// These tests build things twice with the real programs, with other hashes in the names of
// dependencies, and make the second of the first.

// cBuild builds a program and libraries with debug information, which goes into another output.
func cBuild(s *testStore) func(item string, refs []string) {
	return func(item string, refs []string) {
		dependency := s.dir + "/" + refs[0]
		if err := errors.Join(os.MkdirAll(dependency+"/include", 0o755),
			os.WriteFile(dependency+"/include/libc.h", []byte("static inline int twice(int x) { return 2 * x; }\n"), 0o644)); err != nil {
			s.t.Fatal(err)
		}
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

// TestOthers has what cannot be made by replacing.
func TestOthers(t *testing.T) {
	for _, test := range []struct {
		program string
		build   func(s *testStore, dir, out string)
		reason  error
	}{
		{"gzip", func(s *testStore, dir, out string) {
			s.run(dir, "gzip", "-n", "page.1")
			s.run(dir, "cp", "page.1.gz", out)
		}, errWrong},
		{"go", func(s *testStore, dir, out string) {
			s.run(dir, "mkdir", "-p", out+"/bin")
			s.run(dir, "env", "CGO_ENABLED=0", "GOFLAGS=", "go", "build", "-o", out+"/bin/x", "main.go")
		}, errGo},
	} {
		t.Run(test.program, func(t *testing.T) {
			needs(t, test.program)
			s := newTestStore(t)
			old, want := s.twice("x-1.0", []string{"y-1.0"}, func(item string, refs []string) {
				path := s.dir + "/" + refs[0]
				test.build(s, s.workDir(map[string]string{
					"page.1": strings.Repeat(path+"\n", 3), "main.go": fmt.Sprintf("package main\nfunc main() { println(%q) }\n", path),
				}), s.dir+"/"+item)
			})
			want.NarSizeKnown = false // a gzip may have another length
			s.misses(old, want, test.reason)
		})
	}
}
