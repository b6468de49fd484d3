// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

// TestFindItem names items in the ways in which people do.
func TestFindItem(t *testing.T) {
	directory, err := filepath.EvalSymlinks(t.TempDir())
	testhelp.Must(t, err)
	store := directory + "/store"
	hello, profile := store+"/"+strings.Repeat("a", 32)+"-hello", store+"/"+strings.Repeat("b", 32)+"-profile"
	absent := store + "/" + strings.Repeat("c", 32) + "-absent"
	err = errors.Join(os.MkdirAll(hello+"/bin", 0o755), os.WriteFile(hello+"/bin/hello", nil, 0o755), os.MkdirAll(profile+"/bin", 0o755),
		os.Symlink(hello+"/bin/hello", profile+"/bin/hello"), os.Symlink("../bin", profile+"/sbin"), os.Symlink(hello+"/bin", profile+"/libexec"),
		os.Symlink("profile-1-link", directory+"/profile"), os.Symlink(profile, directory+"/profile-1-link"),
		os.Symlink(absent+"/x", directory+"/dangling"), os.Symlink("loop", directory+"/loop"))
	testhelp.Must(t, err)
	t.Chdir(directory)
	s := &Settings{Store: store}
	for text, want := range map[string]string{
		hello: hello, hello + "/": hello, hello + "/bin/hello": hello, absent: absent, filepath.Base(absent): absent,
		strings.Repeat("a", 32): hello, "store/" + filepath.Base(hello): hello, store + "/../store/" + filepath.Base(hello): hello,
		"profile": profile, "profile/": profile, "profile-1-link": profile, directory + "/profile/bin": profile, profile + "/bin/hello": profile,
		"profile/bin/hello": hello, "profile/libexec/hello": hello, "profile/libexec": hello, "dangling": absent,
		"": "", ".": "", "/": "", store: "", store + "/.links": "", "nothing": "", "loop": "", "loop/x": "", "profile/nothing": profile,
	} {
		got, err := s.FindItem(t.Context(), nil, text)
		if got != want && err == nil || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v; want %q", text, got, err, want)
		}
	}
}

// TestUsedFiles checks that a helper may not read everything, nor where it happens to be started:
// in the root directory, by most daemons.
func TestUsedFiles(t *testing.T) {
	t.Setenv("SSL_CERT_FILE", "")
	s := Settings{URLs: "http://127.0.0.1:1"}
	used := s.usedFiles("/gnu/store/x")
	for _, path := range slices.Concat(used.Read, used.Write) {
		if path == "/" || path != "" && !filepath.IsAbs(path) {
			t.Errorf("may use %q", path)
		}
	}
	s.URLs = "file:///media/stick"
	if read := s.usedFiles("").Read; !slices.Contains(read, "/") {
		t.Errorf("links of a stick may not be followed: %q", read)
	}
}
