// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestEncodeChanging checks that a file has no URN that changes while it is encoded, nor has a tree
// with such a file: the store changes it when it gets the first block.
func TestEncodeChanging(t *testing.T) {
	t.Parallel()
	const size = 48 << 20 // more than is on the way to a store
	overwrite := func(path string) error {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.WriteAt([]byte("changed"), size-100)
		return err
	}
	shrink := func(path string) error { return os.Truncate(path, size/2) }
	grow := func(path string) error { return os.Truncate(path, size+1) }
	for _, test := range []struct {
		name   string
		change func(path string) error
		encode []string // for DIRECTORY/file
	}{
		{"file shrinks", shrink, []string{"file"}},
		{"file grows", grow, []string{"file"}},
		{"file is overwritten", overwrite, []string{"file"}},
		{"standard input is overwritten", overwrite, []string{"-"}},
		{"item is overwritten", overwrite, []string{"--item", "file"}},
		{"tree shrinks", shrink, []string{"."}},
		{"tree grows", grow, []string{"."}},
	} {
		t.Run(test.name, func(t *testing.T) {
			directory := t.TempDir()
			path := filepath.Join(directory, "file")
			must(t, os.WriteFile(path, noise(1, size), 0o644))
			must(t, os.Chtimes(path, time.Time{}, time.Unix(1, 0)))
			var once sync.Once
			store := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				once.Do(func() {
					if err := test.change(path); err != nil {
						t.Error(err)
					}
				})
				w.WriteHeader(http.StatusCreated)
			}))
			defer store.Close()
			cmd := exec.Command(theProgram, append([]string{"encode", "--store=" + store.URL}, test.encode...)...)
			cmd.Dir = directory
			stdin, err := os.Open(path)
			must(t, err)
			cmd.Stdin = stdin
			var messages strings.Builder
			cmd.Stderr = &messages
			output, err := cmd.Output()
			if err == nil || len(output) > 0 || !strings.Contains(messages.String(), "while it was read") {
				t.Errorf("error %v, output %q, messages:\n%s", err, output, messages.String())
			}
		})
	}
}
