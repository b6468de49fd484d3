// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bytes"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	_ "modernc.org/sqlite" // the driver of the daemon's database

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/bench/lines/link"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

// These rows are about items that were built again with other dependencies, and are in the store as
// they were before: the daemon asks for all of them, behind a slow line.

const (
	rebuiltItems = 20
	rebuiltSize  = 8 << 20 // of each, in bytes
	rebuiltFiles = 30
	// lineRate (bytes per second) and lineTime (a round trip) are those of the line.
	lineRate = 20e6 / 8
	lineTime = 50 * time.Millisecond
)

// A rebuilt is a store in which there are the old items, and what is published of the new ones.
type rebuilt struct {
	w               *workshop
	store, database string
	old, paths      []string // of the old and of the new items
	size, nars      int64    // of the archives of the new ones, in bytes, and of the compressed nars
}

// hashOf is a hash part that is not a real one.
func hashOf(name string) string {
	sum := sha256.Sum256([]byte(name))
	return strings.NewReplacer("e", "g").Replace(fmt.Sprintf("%x", sum[:16]))
}

// rebuiltRows compares old items that are rewritten, and such that are of no use, with the nars.
func rebuiltRows(w *workshop) ([]contestant, error) {
	r := newRebuilt(w, "rebuilt")
	if err := r.make(); err != nil {
		return nil, err
	}
	return []contestant{
		{"ours, of the old items", func() (sample, error) { return r.run("", false) }},
		{"ours, from nars by zstd", func() (sample, error) { return r.run("reuse = false\n", false) }},
		{"ours, from nars after old items that are of no use", func() (sample, error) { return r.run("", true) }},
	}, nil
}

// dependencies are the names of what each item refers to.
var dependencies = []string{"glibc-2.39", "gcc-14.3.0-lib", "bash-minimal-5.2.37"}

func newRebuilt(w *workshop, name string) *rebuilt {
	return &rebuilt{w: w, store: filepath.Join(w.directory, name, "store"), database: filepath.Join(w.directory, name, "db")}
}

// open makes the store and the database, which has the old dependencies.
func (r *rebuilt) open() (db *sql.DB, oldRefs, newRefs []string, err error) {
	if err := errors.Join(os.MkdirAll(r.store, 0o755), os.MkdirAll(r.database, 0o755)); err != nil {
		return nil, nil, nil, err
	}
	if db, err = sql.Open("sqlite", filepath.Join(r.database, "db.sqlite")); err != nil {
		return nil, nil, nil, err
	}
	_, err = db.Exec(`CREATE TABLE ValidPaths (id integer primary key, path text unique, hash text, deriver text, narSize integer);
		CREATE TABLE Refs (referrer integer, reference integer)`)
	for _, name := range dependencies {
		oldRefs, newRefs = append(oldRefs, hashOf("old "+name)+"-"+name), append(newRefs, hashOf("new "+name)+"-"+name)
		if err == nil {
			_, err = db.Exec("INSERT INTO ValidPaths (path, hash, narSize) VALUES (?, ?, 1)",
				r.store+"/"+oldRefs[len(oldRefs)-1], "sha256:"+strings.Repeat("0", 64))
		}
	}
	return db, oldRefs, newRefs, err
}

func (r *rebuilt) make() error {
	db, oldRefs, newRefs, err := r.open()
	if err != nil {
		return err
	}
	defer db.Close()
	data := archive(rebuiltItems * rebuiltSize)
	for i := range rebuiltItems {
		name := fmt.Sprintf("rebuilt-%02d-1.0", i)
		old, renewed := hashOf("old "+name)+"-"+name, hashOf("new "+name)+"-"+name
		if err := r.item(db, old, renewed, oldRefs, newRefs, data[i*rebuiltSize:][:rebuiltSize]); err != nil {
			return err
		}
		r.old, r.paths = append(r.old, r.store+"/"+old), append(r.paths, r.store+"/"+renewed)
	}
	return nil
}

// item makes an item twice: the old one in the store and the database, the other one for the
// server.
func (r *rebuilt) item(db *sql.DB, old, renewed string, oldRefs, newRefs []string, data []byte) error {
	replace := []string{old[:32], renewed[:32]}
	for i := range oldRefs {
		replace = append(replace, oldRefs[i][:32], newRefs[i][:32])
	}
	replacer := strings.NewReplacer(replace...)
	it := &benchItem{name: renewed[33:], path: r.store + "/" + renewed, tree: filepath.Join(r.w.directory, "trees", renewed)}
	for i, size := range sizesOf(rebuiltFiles, len(data)) {
		contents := bytes.Clone(data[:size])
		data = data[size:]
		if i%3 == 0 && size > 4096 {
			for j, ref := range append([]string{old}, oldRefs...) {
				copy(contents[size/(j+2):], r.store+"/"+ref+"/lib\x00")
			}
		}
		file := fmt.Sprintf("lib/file-%02d", i)
		for tree, text := range map[string][]byte{r.store + "/" + old: contents, it.tree: []byte(replacer.Replace(string(contents)))} {
			name := filepath.Join(tree, file)
			if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
				return err
			}
			if err := os.WriteFile(name, text, 0o444); err != nil {
				return err
			}
		}
	}
	n, urls, err := r.register(db, it, old, newRefs)
	if err != nil {
		return err
	}
	return r.w.publishInfo(n, urls)
}

// register makes what has been built for the first time an item that the daemon knows, compresses
// the nar of what was built again, and returns what is to be published of that.
func (r *rebuilt) register(db *sql.DB, it *benchItem, old string, newRefs []string) (*narinfo.Narinfo, []narinfo.URL, error) {
	if err := canonical(r.store + "/" + old); err != nil {
		return nil, nil, err
	}
	oldDigest, oldSize, err := r.w.nar(&benchItem{tree: r.store + "/" + old}, nil)
	if err != nil {
		return nil, nil, err
	}
	done, err := db.Exec("INSERT INTO ValidPaths (path, hash, narSize) VALUES (?, ?, ?)", r.store+"/"+old, fmt.Sprintf("sha256:%x", oldDigest), oldSize)
	if err != nil {
		return nil, nil, err
	}
	id, err := done.LastInsertId()
	if err != nil {
		return nil, nil, err
	}
	if _, err := db.Exec("INSERT INTO Refs SELECT ?, id FROM ValidPaths WHERE id <= ? OR id = ?", id, len(newRefs), id); err != nil {
		return nil, nil, err
	}
	digest, size, err := r.w.nar(it, []string{"zstd"})
	if err != nil {
		return nil, nil, err
	}
	info, err := os.Stat(filepath.Join(r.w.www(), "nar", "zstd", it.name))
	if err != nil {
		return nil, nil, err
	}
	r.size, r.nars = r.size+size, r.nars+info.Size()
	return &narinfo.Narinfo{
			StorePath: it.path, NarDigest: digest, NarSize: uint64(size), NarSizeKnown: true,
			References: append([]string{filepath.Base(it.path)}, newRefs...),
		},
		[]narinfo.URL{{URL: "nar/zstd/" + it.name, Compression: "zstd", FileSize: uint64(info.Size()), SizeKnown: true}}, nil
}

// canonical makes a tree one of a store.
func canonical(tree string) error {
	return filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			err = os.Chmod(path, 0o555)
		}
		return errors.Join(err, os.Chtimes(path, time.Unix(1, 0), time.Unix(1, 0)))
	})
}

// spoil changes a byte of each old item, or changes it back: it is still the one in the database,
// but the new one cannot be made of it.
func (r *rebuilt) spoil() error {
	for _, old := range r.old {
		name := filepath.Join(old, "lib", "file-00")
		text, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		text[0] ^= 1
		if err := errors.Join(os.Chmod(name, 0o644), os.WriteFile(name, text, 0o644), os.Chmod(name, 0o444), os.Chtimes(name, time.Unix(1, 0), time.Unix(1, 0))); err != nil {
			return err
		}
	}
	return nil
}

// run substitutes the new items as the daemon does. Those that are left from a run before are
// removed.
func (r *rebuilt) run(configuration string, spoilt bool) (sample, error) {
	for _, path := range r.paths {
		if err := restore.Remove(path); err != nil {
			return sample{}, err
		}
	}
	if spoilt {
		if err := r.spoil(); err != nil {
			return sample{}, err
		}
		defer r.spoil()
	}
	line, err := slowLine(r.w.url)
	if err != nil {
		return sample{}, err
	}
	defer line.Close()
	file := filepath.Join(r.w.directory, "etc", "substitute-eris.toml")
	if err := os.WriteFile(file, []byte(configuration), 0o644); err != nil {
		return sample{}, err
	}
	defer os.Remove(file)
	h := helperRun{program: []string{r.w.binary}, mode: "query", url: "http://" + line.Addr(), store: r.store, fresh: true,
		options: "deduplicate=yes", env: []string{"GUIX_DATABASE_DIRECTORY=" + r.database}}
	h.requests = []string{"info " + strings.Join(r.paths, " ")}
	for _, path := range r.paths {
		h.requests = append(h.requests, "info "+path)
	}
	if _, err := r.w.helper(h); err != nil {
		return sample{}, err
	}
	h.mode, h.fresh, h.requests = "substitute", false, nil
	for _, path := range r.paths {
		h.requests = append(h.requests, "substitute "+path+" "+path)
	}
	before := passed(line)
	s, err := r.w.helper(h)
	bytes := passed(line) - before
	s.note = fmt.Sprintf("%.3f MB on the line, %.4f of the nars; %.2f s user per GB;", float64(bytes)/1e6, float64(bytes)/float64(r.nars), s.user.Seconds()/(float64(r.size)/1e9))
	return s, err
}

// slowLine is a line to a server on loopback.
func slowLine(url string) (*link.Link, error) {
	_, address, _ := strings.Cut(url, "://")
	up, down := link.Symmetric(lineTime, lineRate)
	return link.New("tcp", "", address, up, down)
}

// lineFor is a slow line to what a policy gets an item from: the block store, or the substitute
// server. It returns the URLs by which a helper reaches both, the other one without that line.
func (w *workshop) lineFor(policy string) (line *link.Link, url, blocks string, err error) {
	if policy == "eris-only" {
		if line, err = slowLine(w.storeTCP); err == nil {
			url, blocks = w.url, "coap+tcp://"+line.Addr()
		}
	} else if line, err = slowLine(w.url); err == nil {
		url = "http://" + line.Addr()
	}
	return line, url, blocks, err
}

// passed is how many bytes have been on a line, in both directions.
func passed(line *link.Link) int64 {
	up, down := line.Bytes()
	return up + down
}

// narBlocksRows gets an item from the blocks of its compressed nar, and from the nar, over the same
// line, by helpers that know nothing of either.
func narBlocksRows(w *workshop) ([]contestant, error) {
	it, err := w.item("nar-blocks-1.0", fillFiles(sizesOf(30, 20_000_000)), "zstd")
	if err != nil {
		return nil, err
	}
	store, err := w.store()
	if err != nil {
		return nil, err
	}
	file := filepath.Join(w.www(), "nar", "zstd", it.name)
	info, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	urn, err := exec.Command(w.binary, "encode", "--store="+store, file).Output()
	if err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	digest, size, err := w.digest(it)
	if err != nil {
		return nil, err
	}
	err = w.publishInfo(&narinfo.Narinfo{
		StorePath: it.path, NarDigest: digest, NarSize: uint64(size),
		ERIS: []narinfo.ERIS{{URN: strings.TrimSpace(string(urn)), Form: "nar.zstd", Size: uint64(info.Size())}},
	}, []narinfo.URL{{URL: "nar/zstd/" + it.name, Compression: "zstd", FileSize: uint64(info.Size()), SizeKnown: true}})
	if err != nil {
		return nil, err
	}
	row := func(policy string) (sample, error) {
		line, url, blocks, err := w.lineFor(policy)
		if err != nil {
			return sample{}, err
		}
		defer line.Close()
		d, err := w.destination()
		if err != nil {
			return sample{}, err
		}
		s, err := w.helper(helperRun{
			program: []string{w.binary}, mode: "substitute", arguments: []string{"--policy=" + policy}, url: url, fresh: true,
			env:      []string{"NIX_STORE_DIR=/gnu/store", "ERIS_STORE_URL=" + blocks},
			requests: []string{"substitute " + it.path + " " + filepath.Join(d, it.name)},
		})
		s.note = fmt.Sprintf("%.4f of the nar on the line, in both directions;", float64(passed(line))/float64(info.Size()))
		return s, err
	}
	return []contestant{
		{"ours, from blocks of the nar by zstd, nothing kept", func() (sample, error) { return row("eris-only") }},
		{"ours, from the nar by zstd", func() (sample, error) { return row("http-only") }},
	}, nil
}
