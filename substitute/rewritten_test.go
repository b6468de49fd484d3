// SPDX-License-Identifier: GPL-3.0-or-later

package substitute_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/reuse"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

// itemName is the name of an item in a store.
func itemName(i int, name string) string { return fmt.Sprintf("%032d-%s", i, name) }

// makeItem makes an item of one file that mentions another item, with more contents, and returns
// its narinfo and archive.
func makeItem(t *testing.T, store string, name, reference, more string) (*narinfo.Narinfo, []byte) {
	t.Helper()
	built := t.TempDir() + "/item"
	must(t, os.WriteFile(built, []byte("uses "+store+"/"+reference+more), 0o444))
	var archive bytes.Buffer
	if _, err := nar.Write(&archive, nar.NewTree(built)); err != nil {
		t.Fatal(err)
	}
	if _, err := restore.Restore(t.Context(), nar.NewTree(built), store+"/"+name, restore.Options{}); err != nil {
		t.Fatal(err)
	}
	return &narinfo.Narinfo{
		StorePath: store + "/" + name, NarDigest: sha256.Sum256(archive.Bytes()), NarSize: uint64(archive.Len()), NarSizeKnown: true,
		References: []string{reference},
	}, archive.Bytes()
}

// finderOf finds one older item in a store.
func finderOf(t *testing.T, store string, old *narinfo.Narinfo) *reuse.Finder {
	return reuse.New(reuse.Config{
		StoreDir: store, MissesFile: t.TempDir() + "/reuse",
		Database: func(_ context.Context, hashPart string) (*narinfo.Narinfo, error) {
			if hashPart != filepath.Base(old.StorePath)[:32] {
				return nil, fmt.Errorf("no item %s", hashPart)
			}
			return old, nil
		},
	})
}

// TestRewritten gets an item from an older one where that works, without a request for it, and from
// the server where it does not, without a warning, unless the old item is to blame.
func TestRewritten(t *testing.T) {
	for _, test := range []struct {
		name      string
		policy    substitute.Policy
		off       bool
		more      string // contents of the new item
		corrupt   bool
		rewritten bool
	}{
		{name: "rewritten", rewritten: true},
		{name: "also from blocks alone", policy: substitute.ERISOnly, rewritten: true},
		{name: "turned off", off: true},
		{name: "other contents", more: "!"},
		{name: "corrupt", corrupt: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			store := t.TempDir()
			old, _ := makeItem(t, store, itemName(1, "x"), itemName(2, "y"), ".")
			want, archive := makeItem(t, store, itemName(3, "x"), itemName(4, "y"), "."+test.more)
			old.NarSize = want.NarSize // the gate is no matter here
			must(t, restore.Remove(want.StorePath))
			if test.corrupt {
				must(t, os.Chmod(old.StorePath, 0o644))
				must(t, os.WriteFile(old.StorePath, []byte("uses "+store+"/"+itemName(2, "y")+"?"), 0o644))
			}
			key := acl.GenerateSigningKey()
			server := newTestServer(t)
			server.has(want.StorePath, signInfo(t, key, want))
			server.texts["/nar"] = string(archive)
			var finder *reuse.Finder
			if !test.off {
				finder = finderOf(t, store, old)
			}
			for attempt := range 2 {
				s, log := withLog(t, key, server.url)
				s.StoreDir, s.Policy, s.Reuse = store, test.policy, finder
				outcome := s.Substitute(t.Context(), want.StorePath, want.StorePath)
				if outcome.Status != substitute.Success {
					t.Fatalf("status %d:\n%s", outcome.Status, log)
				}
				checkRestored(t, want.StorePath, outcome.NarHash)
				requests := int64(2)
				if test.rewritten {
					requests = 1
				}
				if n := server.asked.Swap(0); n != requests {
					t.Errorf("%d requests instead of %d", n, requests)
				}
				tried := strings.Contains(log.String(), "file://"+old.StorePath)
				if tried != (!test.off && (attempt == 0 || test.rewritten)) {
					t.Errorf("attempt %d: the old item is tried: %t", attempt, tried)
				}
				if warned := strings.Contains(log.String(), filepath.Base(old.StorePath)+" is corrupt"); warned != (test.corrupt && attempt == 0) {
					t.Errorf("attempt %d: a warning about the old item: %t", attempt, warned)
				}
				if !test.corrupt {
					log.warned(t)
				}
			}
		})
	}
}
