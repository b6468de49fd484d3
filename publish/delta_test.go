// SPDX-License-Identifier: GPL-3.0-or-later

package publish_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
)

// versions is a store of items that were made one after the other. Each file is noise that begins
// otherwise, or, where the name is "other", other noise.
func versions(t *testing.T, names ...string) (directory string, items publish.Manifest) {
	t.Helper()
	directory = t.TempDir()
	var text strings.Builder
	for i, name := range names {
		contents := append([]byte(name), noise(0, 100<<10)...)
		if strings.HasPrefix(name, "other") {
			contents = noise(byte(i)+1, 100<<10)
		}
		item := fmt.Sprintf("%032d-%s", i, name)
		must(t, os.WriteFile(directory+"/"+item, contents, 0o644))
		fmt.Fprintf(&text, "StorePath: /gnu/store/%s\nReferences: \n\n", item)
		time.Sleep(20 * time.Millisecond) // the clock of the file system may be that coarse
	}
	return directory, manifest(t, text.String())
}

// completed is what is known of an item, with its hash.
func completed(t *testing.T, directory string, items publish.Manifest, i int) *narinfo.Narinfo {
	t.Helper()
	n := *items[fmt.Sprintf("%032d", i)]
	var err error
	if n.NarDigest, n.NarSize, err = nar.HashTree(t.Context(), directory+"/"+filepath.Base(n.StorePath)); err != nil {
		t.Fatal(err)
	}
	n.NarSizeKnown = true
	return &n
}

// known returns the deltas of an item once they are complete.
func known(t *testing.T, d *publish.Deltas, n *narinfo.Narinfo) []narinfo.Delta {
	t.Helper()
	for range 6000 {
		if list, complete := d.Known(n); complete {
			return list
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("the deltas are not made")
	return nil
}

// TestDeltas makes deltas from older versions of the same item, and keeps them.
func TestDeltas(t *testing.T) {
	directory, items := versions(t, "x-1", "x-1-lib", "y-1", "x-2", "x-2.1-3", "x", "x-5", "other-1", "other-2", "x-6-lib")
	store := newMemoryStore()
	kept := t.TempDir() + "/deltas"
	options := publish.DeltaOptions{Directory: kept, MaxBytes: 1 << 20, StoreDir: "/gnu/store", Root: directory, Items: items, Store: store, Log: logger(t)}
	d := publish.NewDeltas(options)
	defer func() { d.Close() }()
	bases := func(i int) string {
		var names []string
		for _, l := range known(t, d, completed(t, directory, items, i)) {
			names = append(names, fmt.Sprintf("%s %t", l.Base[33:], strings.HasPrefix(l.URL, "urn:eris:")))
			if l.Size == 0 || l.Size > 1000 {
				t.Errorf("%d bytes", l.Size)
			}
		}
		return strings.Join(names, ", ")
	}
	for i, want := range map[int]string{
		0: "", 2: "", 3: "x-1 true, x-1 false", 4: "x-2 true, x-2 false, x-1 true, x-1 false",
		6: "x true, x false, x-2.1-3 true, x-2.1-3 false, x-2 true, x-2 false", 8: "", 9: "x-1-lib true, x-1-lib false",
	} {
		if got := bases(i); got != want {
			t.Errorf("%d: %s, want %s", i, got, want)
		}
	}

	// It can be had.
	file := kept + "/00000000000000000000000000000000-00000000000000000000000000000003.delta"
	text, err := os.ReadFile(file)
	must(t, err)
	n := completed(t, directory, items, 3)
	h2 := server(t, publish.ServerOptions{Root: directory, Items: items, Deltas: d})
	if status, header, body := request(t, "GET", h2.URL+"/delta/00000000000000000000000000000000/00000000000000000000000000000003"); status != 200 || body != string(text) || header.Get("Etag") == "" {
		t.Errorf("status %d, %d bytes, %v", status, len(body), header)
	}

	// Another process knows it, even if no files are left, or another store is in use, but not of
	// an item that has changed.
	d.Close()
	must(t, os.Remove(file))
	d = publish.NewDeltas(options)
	if list, complete := d.Known(n); !complete || len(list) != 1 || !strings.HasPrefix(list[0].URL, "urn:") {
		t.Errorf("%v, complete: %t", list, complete)
	}
	d.Close()
	options.Store = nil
	d = publish.NewDeltas(options)
	if list, complete := d.Known(n); !complete || len(list) != 0 {
		t.Errorf("%v, complete: %t", list, complete)
	}
	n.NarDigest[0]++
	if _, complete := d.Known(n); complete {
		t.Error("an item with other contents has the deltas of this one")
	}
	// A record that is damaged counts as none. Nothing makes another one meanwhile.
	d.Close()
	n.NarDigest[0]--
	for _, damaged := range []string{`[{"base": "x", "size": 1}]`, `[{"size": 1}]`, `1`} {
		must(t, os.WriteFile(kept+"/00000000000000000000000000000003.json", fmt.Appendf(nil, `{"narHash": "%x", "deltas": %s}`, n.NarDigest, damaged), 0o600))
		if list, complete := d.Known(n); complete || list != nil {
			t.Errorf("%s: %v, complete: %t", damaged, list, complete)
		}
	}
	small := *n
	small.NarSize = 1000
	if list, complete := d.Known(&small); !complete || list != nil {
		t.Errorf("%v, complete: %t", list, complete)
	}
}

// TestDeltasBounded keeps no more than it may, and nothing that is left half-made.
func TestDeltasBounded(t *testing.T) {
	directory, items := versions(t, "x-1", "x-2", "x-3", "x-4")
	kept := t.TempDir() + "/deltas"
	left := kept + "/.new-" + strings.Repeat("A", 26)
	must(t, errors.Join(os.Mkdir(kept, 0o755), os.WriteFile(left, nil, 0o600), os.Chtimes(left, time.Time{}, time.Now().Add(-25*time.Hour))))
	d := publish.NewDeltas(publish.DeltaOptions{Directory: kept, MaxBytes: 400, StoreDir: "/gnu/store", Root: directory, Items: items, Log: logger(t)})
	defer d.Close()
	for i := 1; i < 4; i++ {
		known(t, d, completed(t, directory, items, i))
	}
	sum := int64(0)
	err := filepath.WalkDir(kept, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		if !strings.HasSuffix(path, ".json") && !strings.HasSuffix(path, ".delta") {
			t.Errorf("%s is left", path)
		}
		info, err := e.Info()
		if strings.HasSuffix(path, ".delta") {
			sum += info.Size()
		}
		return err
	})
	if err != nil || sum == 0 || sum > 400 {
		t.Errorf("%d bytes, error %v", sum, err)
	}
}

// TestDeltaStoreFails offers a delta as a file if its blocks cannot be stored.
func TestDeltaStoreFails(t *testing.T) {
	directory, items := versions(t, "x-1", "x-2")
	store := newMemoryStore()
	store.fail = fs.ErrPermission
	d := publish.NewDeltas(publish.DeltaOptions{
		Directory: t.TempDir() + "/deltas", MaxBytes: 1 << 20, StoreDir: "/gnu/store", Root: directory, Items: items, Store: store, Log: logger(t),
	})
	defer d.Close()
	if list := known(t, d, completed(t, directory, items, 1)); len(list) != 1 || !strings.HasPrefix(list[0].URL, "delta/") {
		t.Errorf("%v", list)
	}
}
