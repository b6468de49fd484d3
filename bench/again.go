// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/delta"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/reuse"
)

// These rows are about programs in C that were built twice, with other dependencies, by the real
// tools, and differ in more than hashes: in the checksum of a debug file that is not in the store,
// or in a build ID. They cannot be rewritten, but little of them has to be fetched.

// A builtAgain is such a program.
type builtAgain struct {
	*rebuilt
	it       *benchItem
	old      string // file name of the old item
	narinfo  *narinfo.Narinfo
	urls     []narinfo.URL
	urn      string
	delta    narinfo.Delta
	size     int64 // of the delta, in bytes
	zstdSize int64
}

// againRows gets each program by leaves, and by a delta, over a slow line.
func againRows(w *workshop) ([]contestant, error) {
	for _, program := range []string{"gcc", "objcopy", "strip"} {
		if _, err := look(program); err != nil {
			return []contestant{{"programs of C", func() (sample, error) { return sample{}, errAbsent }}}, nil
		}
	}
	var rows []contestant
	for _, size := range []string{"large", "small"} {
		for _, differs := range []string{"debug link", "build ID"} {
			b, err := w.buildAgain(size, differs)
			if err != nil {
				return nil, err
			}
			name := fmt.Sprintf("%s, nar of %.1f MB", differs, float64(b.narinfo.NarSize)/1e6)
			rows = append(rows,
				contestant{name + ", by leaves", func() (sample, error) { return b.run("eris-only") }},
				contestant{name + ", by a delta", func() (sample, error) { return b.run("http-only") }})
		}
	}
	return rows, nil
}

// buildAgain builds a program twice, publishes the second one, in each way, and puts the first one
// into a store.
func (w *workshop) buildAgain(size, differs string) (*builtAgain, error) {
	name := strings.ReplaceAll(size+" "+differs, " ", "-") + "-1.0"
	b := &builtAgain{rebuilt: newRebuilt(w, name), old: hashOf("old "+name) + "-" + name}
	db, oldRefs, newRefs, err := b.open()
	if err != nil {
		return nil, err
	}
	defer db.Close()
	renewed := hashOf("new "+name) + "-" + name
	b.it = &benchItem{name: name, path: b.store + "/" + renewed, tree: filepath.Join(w.directory, "trees", renewed)}
	functions := map[string]int{"large": 36000, "small": 1000}[size]
	for item, build := range map[string]struct{ tree, dependency string }{
		b.old: {b.store + "/" + b.old, oldRefs[0]}, renewed: {b.it.tree, newRefs[0]},
	} {
		if err := b.build(build.tree, item, build.dependency, differs, functions); err != nil {
			return nil, err
		}
	}
	if b.narinfo, b.urls, err = b.register(db, b.it, b.old, newRefs); err != nil {
		return nil, err
	}
	b.zstdSize = int64(b.urls[0].FileSize)
	b.paths = []string{b.it.path}
	store, err := w.store()
	if err != nil {
		return nil, err
	}
	urn, err := exec.Command(w.binary, "encode", "--item", "--store="+store, b.it.tree).Output()
	if err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	b.urn = strings.TrimSpace(string(urn))
	return b, b.writeDelta(oldRefs, newRefs)
}

// build builds the program from a directory that is the same each time. What does not mention an
// item is compiled once.
func (b *builtAgain) build(tree, item, dependency, differs string, functions int) error {
	source := filepath.Join(b.w.directory, fmt.Sprintf("source-%d", functions))
	headers := filepath.Join(b.store, dependency, "include")
	if err := errors.Join(os.MkdirAll(source, 0o755), os.MkdirAll(tree+"/bin", 0o755), os.MkdirAll(headers, 0o755),
		os.WriteFile(headers+"/dependency.h", []byte("static inline int twice(int x) { return 2 * x; }\n"), 0o644),
		os.WriteFile(source+"/main.c", fmt.Appendf(nil, `#include <stdio.h>
#include <dependency.h>
int f%d(int a, int b);
int f0(int a, int b) { return twice(a) + b + puts("%[2]s/%[3]s/lib") + puts("%[2]s/%[4]s/share"); }
int main(int c, char **v) { return f%[1]d(c, v[0][0]); }
`, functions-1, b.store, item, dependency), 0o644)); err != nil {
		return err
	}
	if _, err := os.Stat(source + "/functions.c"); err != nil {
		if err := os.WriteFile(source+"/functions.c", []byte(program(functions)), 0o644); err != nil {
			return err
		}
		if err := shell(source, "", "gcc -g -O0 -c functions.c"); err != nil {
			return err
		}
	}
	id, commands := "none", []string{"strip -o stripped program", "objcopy --only-keep-debug program program.debug", "objcopy --add-gnu-debuglink=program.debug stripped out"}
	if differs == "build ID" {
		id, commands = "sha1", []string{"strip -o out program"}
	}
	commands = append([]string{"gcc -g -O0 -Wl,--build-id=" + id + " -I" + headers + " -o program main.c functions.o"}, commands...)
	return shell(source, tree, append(commands, `install -m 555 out "$0/bin/program"`)...)
}

// shell runs commands in a directory, with one argument.
func shell(directory, argument string, commands ...string) error {
	cmd := exec.Command("sh", "-c", strings.Join(commands, " && "), argument)
	cmd.Dir = directory
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building: %w: %s", err, out)
	}
	return nil
}

// program is functions in C.
func program(functions int) string {
	r := rand.New(rand.NewPCG(uint64(functions), 1))
	var b strings.Builder
	b.WriteString("#include <stdio.h>\nint f0(int a, int b);\n")
	for i := 1; i < functions; i++ {
		fmt.Fprintf(&b, "int f%d(int a, int b) {\n", i)
		for range 3 + r.IntN(8) {
			switch r.IntN(4) {
			case 0:
				fmt.Fprintf(&b, "\ta = a * %d + (b ^ %d);\n", r.IntN(1000), r.Int32())
			case 1:
				fmt.Fprintf(&b, "\tif (a > %d) b += f%d(b, %d);\n", r.IntN(100), r.IntN(i), r.IntN(10))
			case 2:
				fmt.Fprintf(&b, "\tfor (int i = 0; i < b; i++) a += i << %d;\n", r.IntN(9))
			default:
				fmt.Fprintf(&b, "\tb -= printf(\"%s %%d\\n\", a);\n", message(r))
			}
		}
		b.WriteString("\treturn a - b;\n}\n")
	}
	return b.String()
}

// message is a text as programs have it.
func message(r *rand.Rand) string {
	list := strings.Fields("cannot open read write the file of a value is not valid for this option unknown error while in at line")
	var chosen []string
	for range 2 + r.IntN(6) {
		chosen = append(chosen, list[r.IntN(len(list))])
	}
	return strings.Join(chosen, " ")
}

// writeDelta puts a delta onto the server.
func (b *builtAgain) writeDelta(oldRefs, newRefs []string) error {
	name := "delta-" + b.it.name
	f, err := os.Create(filepath.Join(b.w.www(), name))
	if err != nil {
		return err
	}
	defer f.Close()
	b.size, err = delta.Write(context.Background(), f, b.it.tree, b.store+"/"+b.old, delta.WriteOptions{
		Replacements: reuse.Replacements(b.old, filepath.Base(b.it.path), oldRefs, newRefs), Scratch: b.w.directory,
	})
	b.delta = narinfo.Delta{Base: b.old, Size: uint64(b.size), URL: name}
	return err
}

// run gets the program by what the policy allows.
func (b *builtAgain) run(policy string) (sample, error) {
	if err := restore.Remove(b.it.path); err != nil {
		return sample{}, err
	}
	n := *b.narinfo
	n.ERIS = []narinfo.ERIS{{URN: b.urn}}
	if err := b.w.publishInfo(&n, b.urls); err != nil {
		return sample{}, err
	}
	if err := appendTo(filepath.Join(b.w.www(), filepath.Base(n.StorePath)[:reuse.HashLength]+".narinfo"), b.delta.Text()+"\n"); err != nil {
		return sample{}, err
	}
	line, url, blocks, err := b.w.lineFor(policy)
	if err != nil {
		return sample{}, err
	}
	defer line.Close()
	s, err := b.w.helper(helperRun{
		program: []string{b.w.binary}, mode: "substitute", arguments: []string{"--policy=" + policy}, url: url, store: b.store, fresh: true,
		options:  "deduplicate=yes",
		env:      []string{"GUIX_DATABASE_DIRECTORY=" + b.database, "ERIS_STORE_URL=" + blocks},
		requests: []string{"substitute " + b.it.path + " " + b.it.path},
	})
	made := ""
	if policy == "http-only" {
		made = fmt.Sprintf("delta of %.1f KB, ", float64(b.size)/1e3)
	}
	s.note = fmt.Sprintf("%s%.1f KB on the line, %.4f of the nar, %.4f of the nar by zstd (%.2f MB).", made, float64(passed(line))/1e3,
		float64(passed(line))/float64(n.NarSize), float64(passed(line))/float64(b.zstdSize), float64(b.zstdSize)/1e6)
	return s, err
}

// appendTo appends text to a file.
func appendTo(name, text string) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}
