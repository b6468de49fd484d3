// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"path/filepath"
	"slices"
	"testing"
)

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
