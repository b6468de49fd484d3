// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// groups are the rows of the table.
var groups = []group{
	{"start and 1 query, cached", startRows},
	{"300 narinfos, nothing cached", func(w *workshop) ([]contestant, error) { return narinfoRows(w, 300, w.url, true) }},
	{"300 narinfos, nothing cached, 50 ms away", func(w *workshop) ([]contestant, error) { return narinfoRows(w, 300, w.slowURL, true) }},
	{"10000 narinfos, cached", func(w *workshop) ([]contestant, error) { return narinfoRows(w, 10000, w.url, false) }},
	{"100 tiny items in one process", tinyRows},
	{"60 items of 30 KB as the daemon asks for them, 100 ms away", aheadRows(60, 30_000, "zstd", 100*time.Millisecond)},
	{"100 items of 1 MB as the daemon asks for them, lzip", aheadRows(100, 1_000_000, "lzip", 0)},
	{"100 items of 1 MB as the daemon asks for them, zstd", aheadRows(100, 1_000_000, "zstd", 0)},
	{"100 items of 3 KB as the daemon asks for them, zstd", aheadRows(100, 3_000, "zstd", 0)},
	{"20 rebuilt items of 8 MB as the daemon asks for them, 20 Mbit/s, 50 ms away", rebuiltRows},
	{"program of C, built again, that differs in a few bytes, 20 Mbit/s, 50 ms away", againRows},
	{"20 MB, blocks of the compressed nar and the nar, 20 Mbit/s, 50 ms away", narBlocksRows},
	{"deltas between versions of npm packages", deltaRows},
	{"large item in 11 files, zstd", func(w *workshop) ([]contestant, error) { return restoreRows(w, largeItem, "zstd") }},
	{"large item in 11 files, gzip", func(w *workshop) ([]contestant, error) { return restoreRows(w, largeItem, "gzip") }},
	{"large item in 11 files, lzip", func(w *workshop) ([]contestant, error) { return restoreRows(w, largeItem, "lzip") }},
	{"large item in 11 files, none", func(w *workshop) ([]contestant, error) { return restoreRows(w, largeItem, "none") }},
	{"large item in 9790 files, zstd", func(w *workshop) ([]contestant, error) { return restoreRows(w, manyItem, "zstd") }},
	{"large item in 9790 files, gzip", func(w *workshop) ([]contestant, error) { return restoreRows(w, manyItem, "gzip") }},
	{"large item in 9790 files, none", func(w *workshop) ([]contestant, error) { return restoreRows(w, manyItem, "none") }},
	{"5000 small files, zstd", func(w *workshop) ([]contestant, error) { return restoreRows(w, smallItem, "zstd") }},
	{"5000 small files, none", func(w *workshop) ([]contestant, error) { return restoreRows(w, smallItem, "none") }},
	{"large item in 11 files, blocks on a Unix socket", blocksRows(largePlainItem)},
	{"5000 small files, blocks on a Unix socket", smallBlocksRows(smallPlainItem)},
	{"blocks of 1 KiB on a Unix socket", getRows(eris.BlockSize1KiB)},
	{"blocks of 32 KiB on a Unix socket", getRows(eris.BlockSize32KiB)},
	{"encode, large item in 11 files", encodeRows},
}

func largeItem(w *workshop) (*benchItem, error) {
	return w.item("large-1.0", fillFiles(sizesOf(11, w.size)), "none", "zstd", "gzip", "lzip")
}

func manyItem(w *workshop) (*benchItem, error) {
	return w.item("many-1.0", fillFiles(sizesOf(9790, w.size)), "none", "zstd", "gzip")
}

func smallItem(w *workshop) (*benchItem, error) {
	return w.item("small-1.0", fillFiles(sizesOf(5000, 5000*1500)), "none", "zstd")
}

// Items that are published without compression are made sooner.

func largePlainItem(w *workshop) (*benchItem, error) {
	return w.item("large-plain-1.0", fillFiles(sizesOf(11, w.size)), "none")
}

func smallPlainItem(w *workshop) (*benchItem, error) {
	return w.item("small-plain-1.0", fillFiles(sizesOf(5000, 5000*1500)), "none")
}

// both returns a row of ours, and one of the stock program.
func (w *workshop) both(make func(program []string) (sample, error)) []contestant {
	rows := []contestant{{"ours", func() (sample, error) { return make([]string{w.binary}) }}}
	return append(rows, contestant{"stock guix substitute", func() (sample, error) {
		guix := stock()
		if guix == nil {
			return sample{}, errAbsent
		}
		return make(guix)
	}})
}

// narinfos makes n items that have a narinfo and no nar.
func (w *workshop) narinfos(n int) ([]string, error) {
	paths := make([]string, n)
	for i := range paths {
		paths[i] = fmt.Sprintf("/gnu/store/%032d-item", i)
		name := filepath.Join(w.www(), fmt.Sprintf("%032d.narinfo", i))
		if _, err := os.Stat(name); err == nil {
			continue
		}
		err := w.publish(paths[i], sha256.Sum256([]byte(paths[i])), 100, []narinfo.URL{{URL: "nar/x", Compression: "zstd"}})
		if err != nil {
			return nil, err
		}
	}
	return paths, nil
}

func startRows(w *workshop) ([]contestant, error) {
	paths, err := w.narinfos(1)
	if err != nil {
		return nil, err
	}
	return w.both(func(program []string) (sample, error) {
		return w.helper(helperRun{program: program, mode: "query", url: w.url, requests: []string{"have " + paths[0]}, firstOnly: true})
	}), nil
}

func narinfoRows(w *workshop, n int, url string, fresh bool) ([]contestant, error) {
	paths, err := w.narinfos(n)
	if err != nil {
		return nil, err
	}
	request := "have " + strings.Join(paths, " ")
	return w.both(func(program []string) (sample, error) {
		return w.helper(helperRun{program: program, mode: "query", url: url, requests: []string{request}, fresh: fresh})
	}), nil
}

func tinyRows(w *workshop) ([]contestant, error) {
	var items []*benchItem
	for i := range 100 {
		it, err := w.item(fmt.Sprintf("tiny-%d", i), func(tree string) error {
			return os.WriteFile(tree, fmt.Appendf(nil, "tiny %d\n", i), 0o644)
		}, "zstd")
		if err != nil {
			return nil, err
		}
		items = append(items, it)
	}
	return w.both(func(program []string) (sample, error) {
		d, err := w.destination()
		if err != nil {
			return sample{}, err
		}
		var requests []string
		for _, it := range items {
			requests = append(requests, "substitute "+it.path+" "+filepath.Join(d, it.name))
		}
		return w.helper(helperRun{program: program, mode: "substitute", url: w.url, requests: requests, fresh: true})
	}), nil
}

// restoreRows restores an item from one of its nars, with de-duplication.
func restoreRows(w *workshop, make func(*workshop) (*benchItem, error), compression string) ([]contestant, error) {
	it, err := make(w)
	if err != nil {
		return nil, err
	}
	// A narinfo that offers this compression alone.
	digest, size, err := w.digest(it)
	if err != nil {
		return nil, err
	}
	rows := w.both(func(program []string) (sample, error) {
		if err := w.publish(it.path, digest, uint64(size), []narinfo.URL{{URL: "nar/" + compression + "/" + it.name, Compression: compression}}); err != nil {
			return sample{}, err
		}
		d, err := w.destination()
		if err != nil {
			return sample{}, err
		}
		return w.helper(helperRun{
			program: program, mode: "substitute", url: w.url, fresh: true, options: "deduplicate=yes",
			env:      []string{"NIX_STORE_DIR=/gnu/store"},
			requests: []string{"substitute " + it.path + " " + filepath.Join(d, it.name)},
		})
	})
	return append(rows, rivals(w, it, compression)...), nil
}

// digest is the hash of an item's archive, which nar has computed before.
func (w *workshop) digest(it *benchItem) ([32]byte, int64, error) {
	hash, _, _ := strings.Cut(filepath.Base(it.path), "-")
	text, err := os.ReadFile(filepath.Join(w.www(), hash+".narinfo"))
	if err != nil {
		return [32]byte{}, 0, err
	}
	n, err := narinfo.Parse(text)
	if err != nil {
		return [32]byte{}, 0, err
	}
	return n.NarDigest, int64(n.NarSize), nil
}

// rivals are other programs that do a part of the work.
func rivals(w *workshop, it *benchItem, compression string) []contestant {
	nar := filepath.Join(w.www(), "nar", compression, it.name)
	program := func(name string, command func(path, destination string) *exec.Cmd) contestant {
		return contestant{name, func() (sample, error) {
			path, err := look(strings.Fields(name)[0])
			if strings.HasPrefix(name, "lzip") {
				path, err = lzip()
				if err != nil {
					err = errAbsent
				}
			}
			if err != nil {
				return sample{}, err
			}
			d, err := w.destination()
			if err != nil {
				return sample{}, err
			}
			return run(command(path, filepath.Join(d, "item")))
		}}
	}
	decompressor := func(name string) contestant {
		return program(name+" -d to /dev/null", func(path, _ string) *exec.Cmd {
			cmd := exec.Command(path, "-dc", nar)
			return cmd
		})
	}
	switch compression {
	case "zstd", "gzip", "lzip":
		return []contestant{decompressor(compression)}
	}
	return []contestant{
		program("nix-store --restore", func(path, destination string) *exec.Cmd {
			return exec.Command("sh", "-c", path+` --restore "$0" < "$1"`, destination, nar)
		}),
		program("cp -r", func(path, destination string) *exec.Cmd { return exec.Command(path, "-r", it.tree, destination) }),
		{"tar x", func() (sample, error) {
			path, err := look("tar")
			if err != nil {
				return sample{}, err
			}
			archive := filepath.Join(w.directory, it.name+".tar")
			if _, err := os.Stat(archive); err != nil {
				if out, err := exec.Command(path, "cf", archive, "-C", filepath.Dir(it.tree), filepath.Base(it.tree)).CombinedOutput(); err != nil {
					return sample{}, fmt.Errorf("%w: %s", err, out)
				}
			}
			d, err := w.destination()
			if err != nil {
				return sample{}, err
			}
			return run(exec.Command(path, "xf", archive, "-C", d))
		}},
		{"casync extract", func() (sample, error) {
			path, err := look("casync")
			if err != nil {
				return sample{}, err
			}
			index := filepath.Join(w.directory, it.name+".caidx")
			chunks := "--store=" + filepath.Join(w.directory, it.name+".castr")
			if _, err := os.Stat(index); err != nil {
				if out, err := exec.Command(path, "make", "--with=unix", chunks, index, it.tree).CombinedOutput(); err != nil {
					return sample{}, fmt.Errorf("%w: %s", err, out)
				}
			}
			d, err := w.destination()
			if err != nil {
				return sample{}, err
			}
			return run(exec.Command(path, "extract", "--with=unix", "--seed-output=no", chunks, index, filepath.Join(d, "item")))
		}},
	}
}
