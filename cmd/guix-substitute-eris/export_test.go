// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"os"
	"path/filepath"
	"testing"
)

// /proc is mounted on every machine.
func TestCheckMounted(t *testing.T) {
	parent, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	for _, name := range []string{"empty", "used/empty", "used/full/directory"} {
		must(t, os.MkdirAll(filepath.Join(parent, name), 0o755))
	}
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink(parent, link))
	parents := []string{"/nonexistent/media", parent, "/proc"}
	for directory, want := range map[string]bool{
		parent + "/stick":          false,
		parent + "/stick/below/it": false,
		parent + "/empty":          false,
		parent + "/empty/below":    false,
		parent + "/used/empty":     false,
		parent + "/used/full":      true,
		link + "/stick":            false,
		"/nonexistent/media/stick": false,
		"/nonexistent/other":       true,
		parent + "-2/stick":        true,
		"/proc/stick":              true,
		"/proc/self/fd/stick":      true,
	} {
		if err := checkMounted(directory, parents); (err == nil) != want {
			t.Errorf("%s: %v", directory, err)
		}
	}
}
