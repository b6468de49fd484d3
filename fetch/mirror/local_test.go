// SPDX-License-Identifier: GPL-3.0-or-later

package mirror_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
)

// TestPublicFiles checks which files are used of those that a user of the machine names, whose
// files and rights others have.
func TestPublicFiles(t *testing.T) {
	d, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	for _, at := range []string{d, filepath.Dir(d)} { // further ones are not ours
		must(t, os.Chmod(at, 0o755))
	}
	root := d + "/a mirror"
	for _, directory := range []string{root + "/nar", root + "/closed", d + "/else"} {
		must(t, os.MkdirAll(directory, 0o755))
	}
	for name, mode := range map[string]fs.FileMode{
		"a mirror/nar/public": 0o644, "a mirror/nar/group": 0o640, "a mirror/nar/owner": 0o600, "a mirror/closed/file": 0o644,
		"a mirror/nar/a+b": 0o604, "else/file": 0o644, "a mirror-2": 0o644,
	} {
		must(t, errors.Join(os.WriteFile(d+"/"+name, []byte("contents"), 0o644), os.Chmod(d+"/"+name, mode)))
	}
	must(t, errors.Join(
		os.Chmod(root+"/closed", 0o750),
		os.Symlink("nar/public", root+"/link"),
		os.Symlink(d+"/else", root+"/directory"),
		os.Symlink(root, d+"/root"),
		unix.Mkfifo(root+"/pipe", 0o644),
	))
	c := client(t, mirror.Options{PublicFiles: []string{"http://example.org", "file://" + d + "/a%20mirror/", "file:" + d + "/root"}})
	if _, err := read(t, c, "file://"+root+"/nar/public"); err != nil {
		t.Skipf("not everybody may read what is in %s: %v", d, err)
	}
	for name, want := range map[string]bool{
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
		text, err := read(t, c, "file://"+d+"/"+name)
		if want && (err != nil || text != "contents") {
			t.Errorf("%s: %q, error %v", name, text, err)
		}
		if !want && (!errors.Is(err, fs.ErrNotExist) || err.Error() != d+"/"+name+": there is no such file that everybody may read") {
			t.Errorf("%s: error %v", name, err)
		}
	}
	none := client(t, mirror.Options{PublicFiles: []string{}})
	if _, err := none.OpenNar(t.Context(), "file://"+root+"/nar/public", false); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that nobody has named: error %v", err)
	}
}
