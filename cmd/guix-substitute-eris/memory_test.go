// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/delta"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/lzip"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/reuse"
)

// A largeItem is an item of a file of 2 GiB and of many small ones. Its archive is head, block many
// times, and tail.
type largeItem struct {
	head, block, tail []byte
	blocks            int
}

func makeLargeItem() *largeItem {
	const size, blocks = 2 << 30, 32
	item := &largeItem{blocks: blocks}
	// Matches near enough for every method, so that compressors take no time; windows are filled
	// all the same.
	random := sha256.Sum256(nil)
	var part []byte
	for len(part) < 16<<10 {
		part = append(part, random[:]...)
		random = sha256.Sum256(random[:])
	}
	item.block = bytes.Repeat(part, size/blocks/len(part))

	var framer nar.Framer
	item.head = framer.AppendNode(item.head, nar.Node{Kind: nar.Directory})
	item.head = framer.AppendNode(item.head, nar.Node{Kind: nar.Regular, Name: "a", Size: size})
	item.tail = framer.AppendContentsEnd(item.tail)
	for i := range 3000 {
		contents := part[i : 9000+i]
		item.tail = framer.AppendNode(item.tail, nar.Node{Kind: nar.Regular, Name: fmt.Sprintf("b%04d", i), Size: 9000})
		item.tail = framer.AppendContentsEnd(append(item.tail, contents...))
	}
	item.tail = framer.AppendNode(item.tail, nar.Node{Kind: nar.End})
	return item
}

// pieces are what the archive is made of.
func (item *largeItem) pieces() net.Buffers {
	return slices.Concat([][]byte{item.head}, slices.Repeat([][]byte{item.block}, item.blocks), [][]byte{item.tail})
}

// WriteTo writes the archive.
func (item *largeItem) WriteTo(w io.Writer) (int64, error) {
	pieces := item.pieces()
	return pieces.WriteTo(w)
}

// largeMethods write an item compressed in the ways that servers have.
var largeMethods = map[string]func(w io.Writer, item *largeItem) error{
	"none": func(w io.Writer, item *largeItem) error {
		_, err := item.WriteTo(w)
		return err
	},
	"gzip": func(w io.Writer, item *largeItem) error {
		z, err := gzip.NewWriterLevel(w, 1)
		_, err2 := item.WriteTo(z)
		return errors.Join(err, err2, z.Close())
	},
	"zstd": func(w io.Writer, item *largeItem) error { // with the window of level 19
		z, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(8<<20))
		_, err2 := item.WriteTo(z)
		return errors.Join(err, err2, z.Close())
	},
	// A member for each piece, like those of plzip -9; that of the block is made once.
	"lzip": func(w io.Writer, item *largeItem) error {
		members := map[*byte][]byte{}
		for _, piece := range item.pieces() {
			if members[&piece[0]] == nil {
				var member bytes.Buffer
				z, err := lzip.NewWriter(&member, 9)
				if err == nil {
					_, err = z.Write(piece)
					err = errors.Join(err, z.Close())
				}
				if err != nil {
					return err
				}
				members[&piece[0]] = member.Bytes()
			}
			if _, err := w.Write(members[&piece[0]]); err != nil {
				return err
			}
		}
		return nil
	},
}

// mostMemory returns the most memory that a process has had at a time, in bytes.
func mostMemory(pid int) (int, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	m := regexp.MustCompile(`(?m)^VmHWM:\s+(\d+) kB$`).FindSubmatch(status)
	if m == nil {
		return 0, fmt.Errorf("no VmHWM in %q", status)
	}
	n, err := strconv.Atoi(string(m[1]))
	return n << 10, err
}

// TestLargeItemMemory restores an item of more than 2 GiB from each compression, as the daemon has
// it done, and with de-duplication. The process must do with less than 64 MiB.
func TestLargeItemMemory(t *testing.T) {
	if os.Getenv("ERIS_BIG_TESTS") == "" {
		t.Skip("set ERIS_BIG_TESTS for an item of 2 GiB")
	}
	t.Parallel()
	directory := t.TempDir()
	item := makeLargeItem()
	h := sha256.New()
	size, err := item.WriteTo(h)
	must(t, err)
	hash := hashText([sha256.Size]byte(h.Sum(nil)))
	store := filepath.Join(directory, "store")
	must(t, os.Mkdir(store, 0o755))
	t.Cleanup(func() {
		must(t, restore.Remove(store))
	})
	name := store + "/" + strings.Repeat("a", 32) + "-large"
	for compression, write := range largeMethods {
		t.Run(compression, func(t *testing.T) {
			var failed error
			serve := func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/nar" {
					failed = write(w, item)
					return
				}
				fmt.Fprintf(w, "StorePath: %s\nNarHash: %s\nNarSize: %d\nReferences: \nURL: nar\nCompression: %s\n",
					name, hash, size, compression)
			}
			checkMemory(t, directory, name, fmt.Sprintf("success %s %d\n", hash, size), serve)
			if failed != nil {
				t.Error(failed)
			}
			must(t, restore.Remove(name))
			must(t, restore.Remove(store+"/.links"))
		})
	}
}

// checkMemory has an item restored from a server, as the daemon has it done, to its place in the
// store, which is in directory. The process must do with less than 64 MiB. It returns what the
// process has said.
func checkMemory(t *testing.T, directory, name, want string, serve http.HandlerFunc, env ...string) (log string) {
	t.Helper()
	const most = 64 << 20
	server := httptest.NewServer(serve)
	defer server.Close()
	d, err := startDaemonHelper(buildProgram(t), "substitute", append(env,
		"NIX_STORE_DIR="+filepath.Dir(name),
		"GUIX_STATE_DIRECTORY="+directory+"/var",
		"GUIX_CONFIGURATION_DIRECTORY="+directory+"/etc",
		"GUIX_ALLOW_UNAUTHENTICATED_SUBSTITUTES=yes",
		"_NIX_OPTIONS=discover=false\nsubstitute-urls="+server.URL+"\ndeduplicate=yes",
	), false)
	must(t, err)
	// The pipe of requests stays open while memory is looked at.
	reply, err := d.ask("substitute " + name + " " + name + "\n")
	used, err2 := mostMemory(d.cmd.Process.Pid)
	if err := errors.Join(err, err2, d.close()); err != nil || reply != want {
		t.Errorf("reply %q, error %v; log: %s", reply, err, d.log.String())
	}
	t.Logf("%.1f MiB of memory", float64(used)/(1<<20))
	if used >= most {
		t.Errorf("%d bytes of memory are more than %d", used, most)
	}
	return d.log.String()
}

// TestLargeItemFromBase makes an item of more than 2 GiB of an older one, which the daemon knows:
// by rewriting it, by a delta, with dictionaries as long as they may be, and with blocks of what
// differs.
func TestLargeItemFromBase(t *testing.T) {
	if os.Getenv("ERIS_BIG_TESTS") == "" {
		t.Skip("set ERIS_BIG_TESTS for an item of 2 GiB")
	}
	t.Parallel()
	contents := makeLargeItem().block[:40<<20]
	directory := t.TempDir()
	store, trees := directory+"/store", directory+"/trees"
	base, item := strings.Repeat("a", 32)+"-foo", strings.Repeat("b", 32)+"-foo"
	makeTree := func(t *testing.T, name string, changed []byte) {
		tree := trees + "/" + name
		writeFiles(t, tree, map[string][]byte{"changed": changed, "hashes": append([]byte(name), contents...), "large": nil})
		must(t, os.Truncate(tree+"/large", 2<<30))
	}
	makeTree(t, base, contents)
	must(t, os.Mkdir(store, 0o755))
	t.Cleanup(func() {
		must(t, restore.Remove(store))
	})
	old, err := restore.Restore(t.Context(), nar.NewTree(trees+"/"+base), store+"/"+base, restore.Options{})
	must(t, err)
	writeFiles(t, directory+"/etc", map[string]string{"substitute-eris.toml": "verbose = true\n"})
	db, err := newDatabase(directory + "/var/db/db.sqlite")
	must(t, err)
	defer db.Close()
	_, err = db.Exec(insertItem, store+"/"+base, fmt.Sprintf("sha256:%x", old.NarHash), old.NarSize)
	must(t, err)
	for name, changed := range map[string][]byte{
		"rewritten": contents, "delta": append([]byte("inserted"), contents...), "blocks": append([]byte("differs"), contents[7:]...),
	} {
		t.Run(name, func(t *testing.T) {
			makeTree(t, item, changed)
			sum, size, err := nar.HashTree(t.Context(), trees+"/"+item)
			must(t, err)
			hash := hashText(sum)
			info := fmt.Sprintf("StorePath: %s/%s\nNarHash: %s\nNarSize: %d\nReferences: \nURL: nar\nCompression: none\n", store, item, hash, size)
			var made bytes.Buffer
			var env []string
			switch name {
			case "delta":
				length, err := delta.Write(t.Context(), &made, trees+"/"+item, store+"/"+base, delta.WriteOptions{
					Replacements: []reuse.Replacement{{Old: base[:32], New: item[:32]}},
				})
				must(t, err)
				info += fmt.Sprintf("Delta: %s %d delta\n", base, length)
			case "blocks":
				urn, err := exec.Command(buildProgram(t), "encode", "--item", "--store=file:"+directory+"/blocks", trees+"/"+item).Output()
				must(t, err)
				info += "ERIS: " + string(urn)
				env = []string{"ERIS_STORE_URL=file:" + directory + "/blocks"}
			}
			log := checkMemory(t, directory, store+"/"+item, fmt.Sprintf("success %s %d\n", hash, size), func(w http.ResponseWriter, r *http.Request) {
				switch r.URL.Path {
				case "/delta":
					w.Write(made.Bytes())
				case "/" + item[:32] + ".narinfo":
					io.WriteString(w, info)
				default: // the nar, too
					http.NotFound(w, r)
				}
			}, env...)
			way := map[string]string{"rewritten": "file://" + store + "/" + base, "delta": "a delta from", "blocks": "the rest in an older item"}[name]
			failed := strings.Count(log, "going on with another way")
			if !strings.Contains(log, way) || failed > 1 || failed > 0 && name == "rewritten" {
				t.Errorf("it has come in another way:\n%s", log)
			}
			must(t, errors.Join(restore.Remove(store+"/"+item), restore.Remove(store+"/.links"), os.RemoveAll(directory+"/var/substitute")))
		})
	}
}

// TestDeltasMemory has a publisher make deltas of some items, one after the other. It must do with
// the memory for one.
func TestDeltasMemory(t *testing.T) {
	if os.Getenv("ERIS_BIG_TESTS") == "" {
		t.Skip("set ERIS_BIG_TESTS for tests that look at memory")
	}
	t.Parallel()
	directory := t.TempDir()
	const items = 8
	var manifest strings.Builder
	for version := range 2 {
		for i := range items {
			name := fmt.Sprintf("%032d-item%c-1.%d", 2*i+version, 'a'+i, version)
			writeFiles(t, directory+"/items", map[string][]byte{name: append(noise(uint64(i), 1<<20), byte(version))})
			fmt.Fprintf(&manifest, "StorePath: /gnu/store/%s\nReferences: \n\n", name)
		}
		time.Sleep(100 * time.Millisecond) // so that the clock of the file system tells them apart
	}
	writeFiles(t, directory, map[string]string{"manifest": manifest.String()})
	publisher, err := startPublish(directory, directory+"/log", os.Environ(),
		"--root=items", "--manifest=manifest", "--private-key=none", "--deltas=1MiB", "--cache=cache")
	must(t, err)
	defer publisher.end()
	for i := range items {
		url := fmt.Sprintf("%s/%032d.narinfo", publisher.urls["HTTP"], 2*i+1)
		eventually(t, "no delta: "+url, func() bool {
			response, err := http.Get(url)
			must(t, err)
			defer response.Body.Close()
			text, err := io.ReadAll(response.Body)
			must(t, err)
			return bytes.Contains(text, []byte("\nDelta: "))
		})
	}
	memory, err := mostMemory(publisher.cmd.Process.Pid)
	if err != nil || memory > 192<<20 {
		t.Errorf("%d MiB, error %v", memory>>20, err)
	}
}
