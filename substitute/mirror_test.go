// SPDX-License-Identifier: GPL-3.0-or-later

package substitute_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

const guixMirror = "../testdata/guix-mirror"

// Items are restored under the umask that the commands set.
func init() { unix.Umask(0o022) }

// mirrorItems returns the names and store items of the mirror.
func mirrorItems(t testing.TB) map[string]string {
	f, err := os.Open(guixMirror + "/items.txt")
	must(t, err)
	defer f.Close()
	items := map[string]string{}
	for s := bufio.NewScanner(f); s.Scan(); {
		name, item, _ := strings.Cut(s.Text(), " ")
		items[name] = item
	}
	return items
}

func mirrorKeys(t testing.TB) *acl.ACL {
	t.Helper()
	text, err := os.ReadFile(guixMirror + "/acl")
	must(t, err)
	keys, err := acl.ParseACL(text)
	must(t, err)
	return keys
}

// TestGuixMirror restores all that a real "guix publish" has made, from each of its compressions
// alone.
func TestGuixMirror(t *testing.T) {
	nixStore, err := exec.LookPath("nix-store")
	if err != nil {
		t.Log("nix-store is not installed; it does not check the trees")
	}
	for _, compression := range []string{"gzip", "lzip", "zstd", "none"} {
		t.Run(compression, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *testNetwork) {
				var nars []string
				url := n.serve(func(w http.ResponseWriter, r *http.Request) {
					rest, isNar := strings.CutPrefix(r.URL.Path, "/nar/")
					if !isNar {
						http.ServeFile(w, r, guixMirror+"/all"+r.URL.Path)
						return
					}
					kind := "none"
					if k, _, ok := strings.Cut(rest, "/"); ok {
						kind = k
					}
					if kind != compression {
						http.NotFound(w, r)
						return
					}
					nars = append(nars, rest)
					http.ServeFile(w, r, guixMirror+r.URL.Path)
				})
				store := t.TempDir()
				s, _ := n.with(acl.GenerateSigningKey(), url)
				s.SetKeys(mirrorKeys(t))
				for name, item := range mirrorItems(t) {
					nars = nil
					destination := filepath.Join(store, filepath.Base(item))
					if name == "many" && compression != "zstd" {
						continue // for its size
					}
					outcome := s.Substitute(context.Background(), item, destination)
					if outcome.Status != substitute.Success {
						t.Errorf("%s: %+v", item, outcome)
						continue
					}
					if len(nars) != 1 {
						t.Errorf("%s: nars %q were fetched", item, nars)
					}
					checkRestored(t, destination, outcome.NarHash)
					if nixStore == "" {
						continue
					}
					dump, err := exec.Command(nixStore, "--dump", destination).Output()
					must(t, err)
					sum := sha256.Sum256(dump)
					if got := "sha256:" + nixbase32.EncodeToString(sum[:]); got != outcome.NarHash || uint64(len(dump)) != outcome.NarSize {
						t.Errorf("%s: nix-store sees %s, %d bytes; want %s, %d", item, got, len(dump), outcome.NarHash, outcome.NarSize)
					}
				}
				must(t, restore.Remove(store))
			})
		})
	}
}

// checkRestored checks that a tree has a hash, and the modes, times and links that it must have.
func checkRestored(t *testing.T, root, narHash string) {
	t.Helper()
	h := sha256.New()
	if _, err := nar.Write(h, nar.NewTree(root)); err != nil {
		t.Error(err)
		return
	}
	if got := "sha256:" + nixbase32.EncodeToString(h.Sum(nil)); got != narHash {
		t.Errorf("%s has the hash %s, want %s", root, got, narHash)
	}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		mode := st.Mode & 0o7777
		good := true
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			good = mode == 0o555
		case unix.S_IFREG:
			good = (mode == 0o444 || mode == 0o555) && st.Nlink == 1
		}
		if !good || st.Mtim != (unix.Timespec{Sec: 1}) || st.Atim.Sec == 0 {
			t.Errorf("%s: mode %o, %d names, modification time %v", path, st.Mode, st.Nlink, st.Mtim)
		}
		return nil
	})
	must(t, err)
}

// TestGuixMirrorInfo checks what the daemon is told about the items.
func TestGuixMirrorInfo(t *testing.T) {
	directory, err := filepath.Abs(guixMirror + "/all")
	must(t, err)
	s, _ := withLog(t, acl.GenerateSigningKey(), "file://"+directory)
	s.SetKeys(mirrorKeys(t))
	items := mirrorItems(t)
	paths := slices.Sorted(maps.Values(items))
	records := s.Info(context.Background(), paths)
	if len(records) != len(items) {
		t.Fatalf("%d of %d items are available", len(records), len(items))
	}
	for _, r := range records {
		hash, err := narinfo.HashPart("/gnu/store", r.Path)
		must(t, err)
		text, err := os.ReadFile(directory + "/" + hash + ".narinfo")
		must(t, err)
		n, err := narinfo.Parse(text)
		must(t, err)
		if r.NarSize != n.NarSize || len(r.References) != len(n.References) || r.DownloadSize == 0 {
			t.Errorf("record %+v", r)
		}
	}
	have := s.Have(context.Background(), paths)
	if !slices.Equal(have, paths) {
		t.Errorf("available: %q", have)
	}
	// Without the key nothing is available.
	s.SetKeys(nil)
	available(t, s, paths, 0)
}
