// SPDX-License-Identifier: GPL-3.0-or-later

package mirror

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestPublicFiles checks which files are used of those that a user of the machine names, whose
// files and rights others have.
func TestPublicFiles(t *testing.T) {
	d, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for at := d; at != "/" && at != os.TempDir(); at = filepath.Dir(at) {
		if err := os.Chmod(at, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	root := d + "/a mirror"
	for _, directory := range []string{root + "/nar", root + "/closed", d + "/else"} {
		if err := os.MkdirAll(directory, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, mode := range map[string]fs.FileMode{
		"a mirror/nar/public": 0o644, "a mirror/nar/group": 0o640, "a mirror/nar/owner": 0o600, "a mirror/closed/file": 0o644,
		"a mirror/nar/a+b": 0o604, "else/file": 0o644, "a mirror-2": 0o644,
	} {
		if err := errors.Join(os.WriteFile(d+"/"+name, []byte("contents"), 0o644), os.Chmod(d+"/"+name, mode)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(
		os.Chmod(root+"/closed", 0o750),
		os.Symlink("nar/public", root+"/link"),
		os.Symlink(d+"/else", root+"/directory"),
		os.Symlink(root, d+"/root"),
		unix.Mkfifo(root+"/pipe", 0o644),
	); err != nil {
		t.Fatal(err)
	}
	if f, err := openPublic(root, "nar/public"); err != nil {
		t.Skipf("not everybody may read what is in %s: %v", d, err)
	} else {
		f.Close()
	}
	c := NewClient(Options{PublicFiles: []string{"http://example.org", "file://" + d + "/a%20mirror/", "file:" + d + "/root"}})
	defer c.Close()
	for name, want := range map[string]bool{
		"a mirror/nar/public":          true,
		"a%20mirror/nar/public":        true,
		"a%20mirror//nar/./public":     true,
		"a%20mirror/nar/a%2Bb":         true,
		"root/nar/public":              true, // the link is what the user has named
		"a mirror/nar/absent":          false,
		"a mirror/nar/group":           false,
		"a mirror/nar/owner":           false,
		"a mirror/nar":                 false,
		"a mirror/closed/file":         false,
		"a mirror/link":                false,
		"a mirror/directory/file":      false,
		"a mirror/pipe":                false,
		"a mirror/../else/file":        false,
		"a mirror/nar/../../else/file": false,
		"a%20mirror/%2E%2E/else/file":  false,
		"a mirror-2":                   false,
		"else/file":                    false,
	} {
		n, err := c.OpenNar(t.Context(), "file://"+d+"/"+name)
		if !want {
			if !errors.Is(err, fs.ErrNotExist) || err.Error() != d+"/"+name+": there is no such file that everybody may read" {
				t.Errorf("%s: error %v", name, err)
			}
			continue
		}
		if err != nil {
			t.Error(err)
			continue
		}
		if b, err := io.ReadAll(n); err != nil || string(b) != "contents" {
			t.Errorf("%s: %q, error %v", name, b, err)
		}
		n.Close()
	}
	none := NewClient(Options{PublicFiles: []string{}})
	defer none.Close()
	if _, err := none.OpenNar(t.Context(), "file://"+root+"/nar/public"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that nobody has named: error %v", err)
	}
}
