// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

// These rows are what the daemon does: it asks about each item on its own, which is not timed, and
// then has one after the other substituted, in the order of their names.

// aheadRows compares the program as it is with the same that is not ahead of the daemon, and with
// the stock program, for n items of so many bytes behind a line with that round trip.
func aheadRows(n, size int, compression string, roundTrip time.Duration) func(w *workshop) ([]contestant, error) {
	return func(w *workshop) ([]contestant, error) {
		name := fmt.Sprintf("ahead-%d-%s", size, compression)
		paths, err := w.storeItems(name, n, size, compression)
		if err != nil {
			return nil, err
		}
		url := w.url
		if roundTrip > 0 {
			address, stop, err := delayed(strings.TrimPrefix(w.url, "http://"), roundTrip)
			if err != nil {
				return nil, err
			}
			w.closers = append(w.closers, stop)
			url = "http://" + address
		}
		row := func(program []string, configuration string) (sample, error) {
			return w.session(program, url, paths, configuration)
		}
		return []contestant{
			{"ours", func() (sample, error) { return row([]string{w.binary}, "") }},
			{"ours, one at a time", func() (sample, error) { return row([]string{w.binary}, "ahead-items = 0\n") }},
			{"stock guix substitute", func() (sample, error) {
				if guix := stock(); guix != nil {
					return row(guix, "")
				}
				return sample{}, errAbsent
			}},
		}, nil
	}
}

// storeDirectory is a store that helpers write to.
func (w *workshop) storeDirectory() string { return filepath.Join(w.directory, "store") }

// storeItems publishes items of that store, each a file of words. It returns their paths in the
// order in which the daemon asks for them.
func (w *workshop) storeItems(name string, n, size int, compression string) ([]string, error) {
	var paths []string
	for i := range n {
		sum := sha256.Sum256(fmt.Appendf(nil, "%s %d", name, i))
		hash := strings.NewReplacer("e", "g").Replace(fmt.Sprintf("%x", sum[:16]))
		it := &benchItem{name: fmt.Sprintf("%s-%04d", name, i), tree: filepath.Join(w.directory, "trees", hash)}
		it.path = filepath.Join(w.storeDirectory(), hash+"-"+it.name)
		if err := fillFiles([]int{size})(it.tree); err != nil {
			return nil, err
		}
		digest, length, err := w.nar(it, []string{compression})
		if err != nil {
			return nil, err
		}
		err = w.publish(it.path, digest, uint64(length), []narinfo.URL{{URL: "nar/" + compression + "/" + it.name, Compression: compression}})
		if err != nil {
			return nil, err
		}
		paths = append(paths, it.path)
	}
	return paths, nil
}

// session is what the daemon does for one client. The substitutions are timed.
func (w *workshop) session(program []string, url string, paths []string, configuration string) (sample, error) {
	if err := restore.Remove(w.storeDirectory()); err != nil {
		return sample{}, err
	}
	if err := os.Mkdir(w.storeDirectory(), 0o755); err != nil {
		return sample{}, err
	}
	file := filepath.Join(w.directory, "etc", "substitute-eris.toml")
	if err := os.WriteFile(file, []byte(configuration), 0o644); err != nil {
		return sample{}, err
	}
	defer os.Remove(file)
	run := helperRun{program: program, mode: "query", url: url, store: w.storeDirectory(), fresh: true}
	run.requests = []string{"info " + strings.Join(paths, " ")}
	for _, path := range paths {
		run.requests = append(run.requests, "info "+path)
	}
	if _, err := w.helper(run); err != nil {
		return sample{}, err
	}
	run.mode, run.fresh, run.requests = "substitute", false, nil
	for _, path := range paths {
		run.requests = append(run.requests, "substitute "+path+" "+path)
	}
	return w.helper(run)
}
