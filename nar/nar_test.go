// SPDX-License-Identifier: GPL-3.0-or-later

package nar_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

var must = testhelp.Must

// strs concatenates strings in the encoding of the format.
func strs(ss ...string) string {
	var b strings.Builder
	for _, s := range ss {
		b.WriteString(le(uint64(len(s))) + s + strings.Repeat("\x00", -len(s)&7))
	}
	return b.String()
}

func le(n uint64) string { return string(binary.LittleEndian.AppendUint64(nil, n)) }

func entry(name, node string) string {
	return strs("entry", "(", "name", name, "node") + node + strs(")")
}

func archive(node string) string { return strs("nix-archive-1") + node }

func directory(entries ...string) string {
	return strs("(", "type", "directory") + strings.Join(entries, "") + strs(")")
}

func regular(contents string) string {
	return strs("(", "type", "regular", "contents", contents, ")")
}

func symlink(target string) string { return strs("(", "type", "symlink", "target", target, ")") }

// describe reads an archive into a form that is easy to compare.
func describe(nodes nar.Nodes) (string, error) {
	var b strings.Builder
	for {
		n, err := nodes.Next()
		if err == io.EOF {
			return b.String(), nil
		} else if err != nil {
			return b.String(), err
		}
		kind := [...]string{nar.Directory: "directory", nar.Regular: "regular", nar.Symlink: "symlink", nar.End: "end of directory"}[n.Kind]
		fmt.Fprintf(&b, "%s %q", kind, n.Name)
		switch n.Kind {
		case nar.Symlink:
			fmt.Fprintf(&b, " -> %q", n.Target)
		case nar.Regular:
			if n.Executable {
				b.WriteString(" executable")
			}
			var contents []byte
			for {
				c, err := nodes.Contents()
				if err == io.EOF {
					break
				} else if err != nil {
					return b.String(), err
				}
				contents = append(contents, c.Bytes...)
				c.Release()
			}
			if uint64(len(contents)) != n.Size {
				return b.String(), fmt.Errorf("%d bytes of contents instead of %d", len(contents), n.Size)
			}
			fmt.Fprintf(&b, " %q", contents)
		}
		b.WriteString("\n")
	}
}

func read(s string) (string, error) {
	return describe(nar.NewReader(nar.NewReadAhead(context.Background(), strings.NewReader(s), 2, 4096, 0)))
}

// The vectors are hashes of archives that Guix makes of small trees.
var vectors = []struct {
	name   string
	make   func(path string) error
	hash   string
	length int
}{
	{"empty file", func(path string) error { return os.WriteFile(path, nil, 0o644) }, "0ip26j2h11n1kgkz36rl4akv694yz65hr72q4kv4b3lxcbi65b3p", 112},
	{"file", func(path string) error { return os.WriteFile(path, []byte("hello\n"), 0o644) }, "04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw", 120},
	{"executable", func(path string) error { return os.WriteFile(path, []byte("hello\n"), 0o755) }, "1yhh619m3cy1mird7f0l7zsmiv9rayqn075zinda2g7rscwn0hv5", 152},
	{"data", func(path string) error { return os.WriteFile(path, []byte("Substitutable data."), 0o644) }, "06fywwgp9lzldhx12lr601wviw7kzrjf4gp007dn3rnwsj39ik1h", 136},
	{"symlink", func(path string) error { return os.Symlink("/gnu/store/x", path) }, "0v4j36dqmk9h70p8rc2x0j0j2nv4x89qy9s987mm67wknbmk44yc", 128},
	{"empty directory", func(path string) error { return os.Mkdir(path, 0o755) }, "0sjjj9z1dhilhpc8pq4154czrb79z9cm044jvn75kxcjv6v5l2m5", 96},
	{"byte order", func(path string) error {
		return errors.Join(os.Mkdir(path, 0o755), os.WriteFile(path+"/a", nil, 0o644), os.WriteFile(path+"/B", nil, 0o644),
			os.WriteFile(path+"/Z", nil, 0o644), os.Symlink("B", path+"/z"))
	}, "0sfn5r63k88w9ls4hivnvscg82bqg8a0w7955l6xlk4g96jnb2z3", 840},
}

func TestVectors(t *testing.T) {
	for _, v := range vectors {
		t.Run(v.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "item")
			must(t, v.make(path))
			var b bytes.Buffer
			n, err := nar.Write(&b, nar.NewTree(path))
			must(t, err)
			if n != int64(v.length) || b.Len() != v.length {
				t.Errorf("wrote %d bytes, said %d, want %d", b.Len(), n, v.length)
			}
			sum := sha256.Sum256(b.Bytes())
			if got := nixbase32.EncodeToString(sum[:]); got != v.hash {
				t.Errorf("hash %s, want %s", got, v.hash)
			}
			want, err := describe(nar.NewTree(path))
			must(t, err)
			if got, err := read(b.String()); err != nil || got != want {
				t.Errorf("read back:\n%s(error %v), want:\n%s", got, err, want)
			}
		})
	}
}

var sample = archive(directory(
	entry("empty", directory()),
	entry("file", regular("contents")),
	entry("link", symlink("file")),
	entry("program", strs("(", "type", "regular", "executable", "", "contents", "#!/bin/sh\n", ")")),
	entry("sub", directory(entry("a\xff", regular("")))),
))

const sampleNodes = `directory ""
directory "empty"
end of directory ""
regular "file" "contents"
symlink "link" -> "file"
regular "program" executable "#!/bin/sh\n"
directory "sub"
regular "a\xff" ""
end of directory ""
end of directory ""
`

// TestPieces reads an archive that comes in pieces of all kinds.
func TestPieces(t *testing.T) {
	readers := map[string]io.Reader{
		"byte by byte":     iotest.OneByteReader(strings.NewReader(sample)),
		"error with data":  iotest.DataErrReader(strings.NewReader(sample)),
		"half by half":     iotest.HalfReader(strings.NewReader(sample)),
		"all at once":      strings.NewReader(sample),
		"with empty reads": &emptyReads{strings.NewReader(sample), false},
	}
	for name, r := range readers {
		if got, err := describe(nar.NewReader(nar.NewReadAhead(t.Context(), r, 2, 4096, 0))); err != nil || got != sampleNodes {
			t.Errorf("%s: error %v, nodes:\n%s", name, err, got)
		}
	}
	for size := 1; size < 100; size++ {
		if got, err := describe(nar.NewReader(nar.NewReadAhead(t.Context(), strings.NewReader(sample), 2, size, 0))); err != nil || got != sampleNodes {
			t.Errorf("pieces of %d bytes: error %v, nodes:\n%s", size, err, got)
		}
		a := nar.NewReadAhead(t.Context(), strings.NewReader(sample), 3, size, 0)
		if got, err := describe(nar.NewReader(a)); err != nil || got != sampleNodes {
			t.Errorf("read ahead in pieces of %d bytes: error %v, nodes:\n%s", size, err, got)
		}
		a.Close()
	}
}

type emptyReads struct {
	r     io.Reader
	empty bool
}

func (e *emptyReads) Read(p []byte) (int, error) {
	e.empty = !e.empty
	if e.empty {
		return 0, nil
	}
	return e.r.Read(p)
}

// TestSkip checks that contents need not be read.
func TestSkip(t *testing.T) {
	r := nar.NewReader(nar.NewReadAhead(t.Context(), strings.NewReader(sample), 2, 16, 0))
	count, err := -1, error(nil)
	for ; err == nil; count++ {
		_, err = r.Next()
	}
	if err != io.EOF {
		t.Fatal(err)
	}
	if want := strings.Count(sampleNodes, "\n"); count != want {
		t.Errorf("%d nodes, want %d", count, want)
	}
}

func TestTruncated(t *testing.T) {
	for n := range len(sample) {
		if got, err := read(sample[:n]); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("%d of %d bytes: error %v, nodes:\n%s", n, len(sample), err, got)
		}
	}
}

// TestDepth reads as many levels as a path may have.
func TestDepth(t *testing.T) {
	node := directory("")
	for range nar.MaxDepth {
		node = directory(entry("d", node))
	}
	if _, err := read(archive(node)); err != nil {
		t.Error(err)
	}
}

func TestMalformed(t *testing.T) {
	deep := strings.Repeat("x", 255)
	node := regular("")
	for range 17 {
		node = directory(entry(deep, node))
	}
	nested := regular("")
	for range nar.MaxDepth + 1 {
		nested = directory(entry("d", nested))
	}
	tests := map[string]struct{ archive, message string }{
		"deep":                    {archive(nested), "is longer than 3800 bytes"},
		"empty name":              {archive(directory(entry("", regular("")))), "empty entry name"},
		"dot":                     {archive(directory(entry(".", regular("")))), `entry name "."`},
		"dot dot":                 {archive(directory(entry("..", regular("")))), `entry name ".."`},
		"path":                    {archive(directory(entry("../x", regular("")))), `entry name "../x" has the byte 0x2f`},
		"NUL in name":             {archive(directory(entry("a\x00b", regular("")))), "has the byte 0x00"},
		"long name":               {archive(directory(entry(strings.Repeat("x", 256), regular("")))), "string of 256 bytes"},
		"twice":                   {archive(directory(entry("a", symlink("/tmp")), entry("a", regular("")))), `entry "a" twice`},
		"order":                   {archive(directory(entry("b", regular("")), entry("a", regular("")))), `entry "a" after "b"`},
		"order by bytes":          {archive(directory(entry("a", regular("")), entry("B", regular("")))), `entry "B" after "a"`},
		"long path":               {archive(node), "path of entry"},
		"empty target":            {archive(symlink("")), "empty symbolic link target"},
		"NUL in target":           {archive(symlink("a\x00")), "NUL"},
		"long target":             {archive(symlink(strings.Repeat("x", 4096))), "string of 4096 bytes"},
		"unknown type":            {archive(strs("(", "type", "device", ")")), `unknown node type "device"`},
		"no contents":             {archive(strs("(", "type", "regular", ")")), `")" where contents are due`},
		"executable with value":   {archive(strs("(", "type", "regular", "executable", "x", "contents", "", ")")), `"x" where "" is due`},
		"padding of a name":       {archive(directory(strs("entry", "(", "name") + le(1) + "a1234567")), "padding is not zero"},
		"padding of contents":     {archive(strs("(", "type", "regular", "contents") + le(1) + "a\x00\x00\x00\x00\x00\x00\x01" + strs(")")), "padding is not zero"},
		"trailing bytes":          {archive(regular("")) + "\x00", "bytes after the end"},
		"second archive":          {archive(regular("")) + archive(regular("")), "bytes after the end"},
		"wrong magic":             {strs("nix-archive-2"), `it begins with "\r\x00`},
		"not an archive":          {"<html>404 not found</html>", `it begins with "<html>404 not found</htm"`},
		"huge string":             {strs("nix-archive-1") + le(1<<63), "string of 9223372036854775808 bytes"},
		"huge contents":           {archive(strs("(", "type", "regular", "contents") + le(1<<63)), "file of 9223372036854775808 bytes"},
		"length beyond 32 bits":   {archive(directory(strs("entry", "(", "name") + le(1<<32+1) + "a\x00\x00\x00\x00\x00\x00\x00")), "string of 4294967297 bytes"},
		"entry without node":      {archive(directory(strs("entry", "(", "name", "a", ")"))), `")" where "node" is due`},
		"end of an unopened node": {archive(strs("(", "type", "directory", ")", ")")), "bytes after the end"},
	}
	for name, test := range tests {
		_, err := read(test.archive)
		testhelp.WantError(t, name, err, test.message)
	}
	// Errors are final.
	r := nar.NewReader(nar.NewReadAhead(t.Context(), strings.NewReader("12345678"), 2, 8, 0))
	_, first := r.Next()
	if _, second := r.Next(); first == nil || second != first {
		t.Errorf("errors %v and %v", first, second)
	}
	if _, err := r.Contents(); err != first {
		t.Errorf("error %v of Contents, want %v", err, first)
	}
}

func TestReadAhead(t *testing.T) {
	const size = 1 << 10
	long := strings.NewReader(strings.Repeat("0123456789abcdef", 1<<10))
	a := nar.NewReadAhead(t.Context(), long, 2, size, 0)
	first, err := a.Next()
	must(t, err)
	_, err = a.Next()
	must(t, err)
	// Both buffers are in use: nothing more can be read.
	before := string(first.Bytes)
	a.Close()
	if string(first.Bytes) != before {
		t.Error("a chunk has changed after Close")
	}
	if read := 16<<10 - long.Len(); read > 2*size {
		t.Errorf("%d bytes were read into 2 buffers of %d", read, size)
	}

	ctx, cancel := context.WithCancel(context.Background())
	a = nar.NewReadAhead(ctx, strings.NewReader(strings.Repeat("x", 1<<20)), 2, size, 0)
	cancel()
	for range 1 << 10 {
		if _, err = a.Next(); err != nil {
			break
		}
	}
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v after cancellation", err)
	}
	a.Close()

	failure := errors.New("the disk is on fire")
	a = nar.NewReadAhead(t.Context(), io.MultiReader(strings.NewReader("ab"), iotest.ErrReader(failure)), 2, size, 0)
	defer a.Close()
	if c, err := a.Next(); err != nil || string(c.Bytes) != "ab" {
		t.Errorf("%q, error %v", c.Bytes, err)
	}
	for range 2 {
		if _, err := a.Next(); err != failure {
			t.Errorf("error %v, want %v", err, failure)
		}
	}
}

func TestTreeRefuses(t *testing.T) {
	d := t.TempDir()
	fifo := filepath.Join(d, "fifo")
	if err := exec.Command("mkfifo", fifo).Run(); err != nil {
		t.Skip("mkfifo does not work here")
	}
	_, err := nar.Write(io.Discard, nar.NewTree(d))
	testhelp.WantError(t, "a pipe", err, "neither a regular file")
	if _, err := nar.Write(io.Discard, nar.NewTree(filepath.Join(d, "absent"))); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v for nothing", err)
	}
}

func FuzzReader(f *testing.F) {
	f.Add([]byte(sample), uint8(7))
	f.Add([]byte(archive(regular("hi"))), uint8(255))
	f.Add([]byte(archive(symlink("x"))), uint8(1))
	f.Fuzz(func(t *testing.T, b []byte, size uint8) {
		r := nar.NewReader(nar.NewReadAhead(t.Context(), bytes.NewReader(b), 2, int(size)+1, 0))
		// An archive that is accepted is canonical: writing its nodes gives the same bytes.
		var out bytes.Buffer
		if _, err := nar.Write(&out, r); err == nil && !bytes.Equal(out.Bytes(), b) {
			t.Errorf("accepted %q, which is %q in canonical form", b, out.Bytes())
		}
	})
}

// TestShortArchive checks that hashing a short archive takes no memory for a long one: there may be
// thousands of them.
func TestShortArchive(t *testing.T) {
	const times = 100
	short := filepath.Join(t.TempDir(), "short")
	must(t, os.WriteFile(short, []byte("short"), 0o644))
	all := testhelp.Allocated(func() {
		for range times {
			h, tree := nar.NewHasher(t.Context()), nar.NewTree(short)
			must(t, h.Walk(tree, func(nar.Node) error { return h.Contents(nar.NewChunk([]byte("short"), nil)) }))
			h.Finish()
		}
	})
	if all/times > 16<<10 {
		t.Errorf("it took %d bytes", all/times)
	}
}

// empty is so many empty files.
type empty int

func (e *empty) Next() (nar.Node, error) {
	if *e--; *e < 0 {
		return nar.Node{}, io.EOF
	}
	return nar.Node{Kind: nar.Regular, Name: "name"}, nil
}

func (e *empty) Contents() (nar.Chunk, error) { return nar.Chunk{}, io.EOF }

// TestWalkMemory checks that hashing takes no memory for each node.
func TestWalkMemory(t *testing.T) {
	const most = 1000
	allocations := testing.AllocsPerRun(5, func() {
		h, nodes := nar.NewHasher(t.Context()), empty(most)
		must(t, h.Walk(&nodes, func(nar.Node) error { return nil }))
		h.Finish()
	})
	if allocations > most/2 {
		t.Errorf("%v allocations for %d nodes", allocations, most)
	}
}
