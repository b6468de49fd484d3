// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/delta"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/reuse"
)

// These rows are about deltas between versions of real packages, of npm, which are fetched when the
// rows are run, and of a program that was built twice.

// npmPairs are the packages, and their versions, the earlier one first.
var npmPairs = [][3]string{
	{"typescript", "5.2.2", "5.3.2"},
	{"typescript", "5.3.2", "5.3.3"},
	{"react-dom", "18.2.0", "18.3.1"},
	{"react-dom", "18.3.1", "19.0.0"},
	{"webpack", "5.88.0", "5.90.0"},
	{"webpack", "5.90.0", "5.90.1"},
	{"next", "13.5.6", "14.1.0"},
	{"next", "14.1.0", "14.1.1"},
	{"@esbuild/linux-x64", "0.20.0", "0.20.1"},
	{"esbuild-wasm", "0.20.0", "0.20.1"},
	{"@swc/core-linux-x64-gnu", "1.3.106", "1.3.107"},
	{"three", "0.160.0", "0.160.1"},
}

// A deltaPair is a new version and the one before it.
type deltaPair struct {
	name          string
	base, tree    string
	nar, zstd     int64 // lengths in bytes, of the archive and of the same compressed by zstd -3
	digest        [sha256.Size]byte
	replacements  []reuse.Replacement
	file          string // the delta
	delta, useful int64  // its length; what it may have to be kept by a publisher
	written       sample // the last time
}

// deltaRows writes and reads a delta of each pair. The rows of a pair, and of all together, tell
// how large deltas are.
func deltaRows(w *workshop) ([]contestant, error) {
	var pairs []*deltaPair
	for _, p := range npmPairs {
		pair, err := w.npmPair(p[0], p[1], p[2])
		if errors.Is(err, errAbsent) {
			fmt.Fprintf(os.Stderr, "bench: %s: %v\n", p[0], err)
			return []contestant{{"deltas of npm packages", func() (sample, error) { return sample{}, errAbsent }}}, nil
		} else if err != nil {
			return nil, err
		}
		pairs = append(pairs, pair)
	}
	pair, err := w.goPair()
	if err != nil {
		return nil, err
	}
	var rows []contestant
	for _, p := range append(slices.Clone(pairs), pair) {
		rows = append(rows, contestant{p.name, func() (s sample, err error) {
			p.written, err = measured(p.write)
			p.written.note = p.note()
			return p.written, err
		}})
	}
	return append(rows, contestant{"all packages, written", func() (s sample, err error) {
		all := deltaPair{}
		for _, p := range pairs {
			s.wall, s.user, s.sys = s.wall+p.written.wall, s.user+p.written.user, s.sys+p.written.sys
			all.nar, all.zstd, all.delta = all.nar+p.nar, all.zstd+p.zstd, all.delta+p.fetched()
		}
		s.note = all.note()
		return s, nil
	}}, contestant{"all packages, read and hashed", func() (sample, error) {
		return measured(func() error {
			for _, p := range pairs {
				if err := p.read(); err != nil {
					return fmt.Errorf("%s: %w", p.name, err)
				}
			}
			return nil
		})
	}}), nil
}

// fetched is how many bytes are fetched: of the delta, or of the whole if the delta is not kept.
func (p *deltaPair) fetched() int64 {
	if p.delta > p.useful {
		return p.zstd
	}
	return p.delta
}

func (p *deltaPair) note() string {
	kept := ""
	if p.delta > p.useful && p.useful > 0 {
		kept = ", not kept"
	}
	return fmt.Sprintf("nar %.1f MB, zstd -3 %.3f MB, delta %.3f MB, %.3f of zstd%s.", float64(p.nar)/1e6, float64(p.zstd)/1e6,
		float64(p.delta)/1e6, float64(p.delta)/float64(p.zstd), kept)
}

// goPair builds a program of Go twice with other store items in it. The old one cannot be
// rewritten, as it has an ID of all that it was built of.
func (w *workshop) goPair() (*deltaPair, error) {
	var trees, items []string
	for _, set := range []string{"old", "new"} {
		item := hashOf(set+" dependency") + "-dependency-1.0"
		tree := filepath.Join(w.directory, "trees", "go-"+set)
		source := filepath.Join(w.directory, "go-program")
		if err := errors.Join(os.MkdirAll(tree, 0o755), os.MkdirAll(source, 0o755)); err != nil {
			return nil, err
		}
		text := fmt.Sprintf("package main\n\nimport \"net/http\"\n\nfunc main() { http.Handle(%q, nil) }\n", "/gnu/store/"+item)
		if err := os.WriteFile(filepath.Join(source, "main.go"), []byte(text), 0o644); err != nil {
			return nil, err
		}
		cmd := exec.Command("go", "build", "-trimpath", "-o", filepath.Join(tree, "program"), "main.go")
		cmd.Dir, cmd.Env = source, append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
		if out, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("building: %w: %s", err, out)
		}
		trees, items = append(trees, tree), append(items, item)
	}
	p := &deltaPair{
		name: "program of Go, built again", base: trees[0], tree: trees[1],
		replacements: reuse.Replacements(hashOf("old program")+"-program", hashOf("new program")+"-program", items[:1], items[1:]),
	}
	return p, p.measure()
}

// npmPair fetches two versions of a package.
func (w *workshop) npmPair(name, old, renewed string) (*deltaPair, error) {
	base, err := w.npmTree(name, old)
	if err != nil {
		return nil, err
	}
	tree, err := w.npmTree(name, renewed)
	if err != nil {
		return nil, err
	}
	p := &deltaPair{name: fmt.Sprintf("%s %s (%s)", name, renewed, old), base: base, tree: tree}
	return p, p.measure()
}

// measure finds out what there is without a delta.
func (p *deltaPair) measure() error {
	p.file = p.tree + ".delta"
	zstd, err := look("zstd")
	if err != nil {
		return err
	}
	cmd := exec.Command(zstd, "-3", "-q", "-c")
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	var size lengthOf
	cmd.Stdout = &size
	if err := cmd.Start(); err != nil {
		return err
	}
	h := sha256.New()
	p.nar, err = nar.Write(io.MultiWriter(h, in), nar.NewTree(p.tree))
	err = errors.Join(err, in.Close(), cmd.Wait())
	h.Sum(p.digest[:0])
	p.zstd, p.useful = int64(size), int64(size)/2
	return err
}

// npmTree fetches a version of a package, once. The error is errAbsent if npm cannot.
func (w *workshop) npmTree(name, version string) (string, error) {
	npm, err := look("npm")
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256([]byte(name + "@" + version))
	tree := filepath.Join(w.directory, "trees", fmt.Sprintf("npm-%x", sum[:8]))
	if _, err := os.Stat(tree); err == nil {
		return tree, nil
	}
	if err := os.MkdirAll(tree, 0o755); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, npm, "pack", "--silent", "--pack-destination", tree, name+"@"+version)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: npm pack %s@%s: %w: %.500s", errAbsent, name, version, err, out)
	}
	archives, err := filepath.Glob(tree + "/*.tgz")
	if err != nil || len(archives) != 1 {
		return "", fmt.Errorf("npm pack has made %q, error %w", archives, err)
	}
	if out, err := exec.Command("tar", "-xzf", archives[0], "-C", tree).CombinedOutput(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", archives[0], err, out)
	}
	return tree, os.Remove(archives[0])
}

// write writes the delta.
func (p *deltaPair) write() (err error) {
	f, err := os.Create(p.file)
	if err != nil {
		return err
	}
	defer f.Close()
	p.delta, err = delta.Write(context.Background(), f, p.tree, p.base, delta.WriteOptions{Replacements: p.replacements, Scratch: filepath.Dir(p.file)})
	return err
}

// read makes the new version of the old one and the delta.
func (p *deltaPair) read() error {
	f, err := os.Open(p.file)
	if err != nil {
		return err
	}
	defer f.Close()
	r, err := delta.NewReader(context.Background(), f, p.base, delta.ReadOptions{MaxSize: uint64(p.nar)})
	if err != nil {
		return err
	}
	defer r.Close()
	h := sha256.New()
	if _, err := nar.Write(h, r); err != nil {
		return err
	}
	if [sha256.Size]byte(h.Sum(nil)) != p.digest {
		return errors.New("what the delta makes is something else")
	}
	return nil
}

// measured measures what this process does.
func measured(do func() error) (sample, error) {
	var before, after unix.Rusage
	begin := time.Now()
	err := unix.Getrusage(unix.RUSAGE_SELF, &before)
	if err == nil {
		err = do()
	}
	wall := time.Since(begin)
	err = errors.Join(err, unix.Getrusage(unix.RUSAGE_SELF, &after))
	return sample{
		wall: wall,
		user: time.Duration(after.Utime.Nano() - before.Utime.Nano()),
		sys:  time.Duration(after.Stime.Nano() - before.Stime.Nano()),
	}, err
}

// lengthOf counts what is written to it.
type lengthOf int64

// Write implements io.Writer.
func (n *lengthOf) Write(p []byte) (int, error) {
	*n += lengthOf(len(p))
	return len(p), nil
}
