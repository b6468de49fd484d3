// SPDX-License-Identifier: GPL-3.0-or-later

package ahead

import (
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/sourcestate"
)

func TestSession(t *testing.T) {
	directory := filepath.Join(t.TempDir(), "state", "sessions")
	query, err := SessionOf(directory, os.Getpid())
	must(t, err)
	substitute, err := SessionOf(directory, os.Getpid())
	must(t, err)
	if items := substitute.New(); len(items) != 0 {
		t.Errorf("items before any were noted: %v", items)
	}
	want := []string{"/gnu/store/a", "/gnu/store/b"}
	for _, item := range []string{want[0], want[0], want[1], want[0]} {
		must(t, query.Note(item))
	}
	if items := substitute.New(); !slices.Equal(items, want) {
		t.Errorf("items are %v", items)
	}
	info, err := os.Stat(query.path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode is %v, %v", info.Mode(), err)
	}
	// A line that is being written is not read.
	f, err := os.OpenFile(query.path, os.O_WRONLY|os.O_APPEND, 0)
	must(t, err)
	f.WriteString("/gnu/store/half")
	if items := substitute.New(); len(items) != 0 {
		t.Errorf("items are %v", items)
	}
	f.WriteString("-and-more\n/gnu/store/c\n")
	f.Close()
	if items, want := substitute.New(), []string{"/gnu/store/half-and-more", "/gnu/store/c"}; !slices.Equal(items, want) {
		t.Errorf("items are %v", items)
	}
	if items := substitute.New(); len(items) != 0 {
		t.Errorf("items are %v", items)
	}
	if err := query.Note(strings.Repeat("x", maxSession)); err == nil {
		t.Error("the file has no bound")
	}
}

func TestSessionsOfOthers(t *testing.T) {
	directory := filepath.Join(t.TempDir(), "sessions")
	s, err := SessionOf(directory, os.Getpid())
	must(t, err)
	must(t, s.Note("/gnu/store/a"))
	if _, err := SessionOf(directory, 1<<30); err == nil {
		t.Error("a process that does not exist has a session")
	}
	// Its number was that of another process before.
	other := filepath.Join(directory, strings.Split(filepath.Base(s.path), "-")[0]+"-1")
	gone := filepath.Join(directory, "1073741824-17")
	strange := filepath.Join(directory, "strange")
	for _, file := range []string{other, gone, strange} {
		must(t, os.WriteFile(file, []byte("/gnu/store/x\n"), 0o600))
	}
	CleanSessions(directory)
	for file, want := range map[string]bool{s.path: true, other: false, gone: false, strange: true} {
		if _, err := os.Lstat(file); (err == nil) != want {
			t.Errorf("%s is there: %v", file, err == nil)
		}
	}
	CleanSessions(filepath.Join(directory, "none"))

	// A link in its place is not followed, neither for reading nor for writing.
	target := filepath.Join(t.TempDir(), "target")
	must(t, os.WriteFile(target, []byte("/gnu/store/x\n"), 0o600))
	must(t, os.Remove(s.path))
	must(t, os.Symlink(target, s.path))
	if items := s.New(); len(items) != 0 {
		t.Errorf("items through a link: %v", items)
	}
	if err := s.Note("/gnu/store/b"); err == nil {
		t.Error("noted through a link")
	}
	if text, _ := os.ReadFile(target); string(text) != "/gnu/store/x\n" {
		t.Errorf("the target is %q", text)
	}
}

// What counts is the last line that is whole; what else comes is passed over, however long.
func TestCleanAfterCounts(t *testing.T) {
	defer signal.Reset()
	want := sourcestate.Ahead{Staged: 3, StagedBytes: 300, Used: 2, UsedBytes: 200}
	line := `{"staged":3,"staged_bytes":300,"used":2,"used_bytes":200}` + "\n"
	for _, input := range []string{
		`{"staged":1}` + "\n" + line, line + `{"staged":4` + "\n\n[5]\n", line + strings.Repeat("x", 1<<20),
	} {
		if got := CleanAfter(strings.NewReader(input), t.TempDir(), "1-1"); got != want {
			t.Errorf("%.40q: %+v", input, got)
		}
	}
	if got := CleanAfter(strings.NewReader(""), t.TempDir(), "1-1"); got != (sourcestate.Ahead{}) {
		t.Errorf("nothing counts %+v", got)
	}
}
