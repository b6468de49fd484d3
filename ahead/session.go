// SPDX-License-Identifier: GPL-3.0-or-later

package ahead

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

// maxSession bounds a session file in bytes, and with it the items that are noted.
const maxSession = 2 << 20

// A Session is what the query helper of one daemon process writes down for the substitute helpers
// of the same process: which items the daemon has asked about one at a time, which is what it does
// before it substitutes them (Guix, nix/libstore/build.cc: SubstitutionGoal::tryNext). Both helpers
// are children of the daemon process that serves one client, and so know its name: the process and
// when it began.
//
// It is safe for concurrent use.
type Session struct {
	path   string
	counts *counts

	mu     sync.Mutex
	noted  map[string]bool
	length int // of what was noted, in bytes
	read   int // by New
}

// SessionOf returns the session of a daemon process, whose files are in the directory, which is
// made when something is noted. The error says that nothing is known of the process.
func SessionOf(directory string, process int) (*Session, error) {
	begun, err := startOf(process)
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("%d-%s", process, begun)
	return (&Session{path: filepath.Join(directory, name), counts: &counts{}}).Anew(), nil
}

// Anew returns the same session as if nothing had been read or noted yet. What is counted goes on.
func (s *Session) Anew() *Session {
	return &Session{path: s.path, counts: s.counts, noted: map[string]bool{}}
}

// startOf returns when a process began, in ticks since the machine did (proc_pid_stat(5), field
// 22): with it a process has a name that no other will have.
func startOf(process int) (string, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", process))
	if err != nil {
		return "", err
	}
	// The name of the program, in parentheses, may have spaces and parentheses in it.
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	const start = 22 - 3 // the first of these is the third
	if len(fields) <= start {
		return "", fmt.Errorf("/proc/%d/stat is not understood", process)
	}
	return string(fields[start]), nil
}

// Note writes an item down, once. Errors are those of the file system, and that the file is full.
func (s *Session) Note(item string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.noted[item] {
		return nil
	}
	if s.length+len(item)+1 > maxSession {
		return fmt.Errorf("%s: file is full", s.path)
	}
	f, err := s.open()
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteString(item + "\n"); err != nil {
		return err
	}
	s.noted[item] = true
	s.length += len(item) + 1
	return nil
}

func (s *Session) open() (*os.File, error) {
	const flags = os.O_WRONLY | os.O_APPEND | unix.O_NOFOLLOW | unix.O_NONBLOCK
	if len(s.noted) > 0 {
		return os.OpenFile(s.path, flags, 0)
	}
	if err := files.MakeDirectory(filepath.Dir(s.path)); err != nil {
		return nil, err
	}
	return os.OpenFile(s.path, flags|os.O_CREATE, 0o600)
}

// New returns the items that have been noted, by this or another process, since it was called
// before. That there is no file is no error.
func (s *Session) New() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	f, _, err := files.OpenState(s.path, os.O_RDONLY)
	if err != nil {
		return nil
	}
	defer f.Close()
	text, _ := io.ReadAll(io.NewSectionReader(f, int64(s.read), int64(maxSession-s.read)))
	// A last line without its end is not complete.
	end := bytes.LastIndexByte(text, '\n') + 1
	items := strings.Split(string(text[:end]), "\n")
	s.read += end
	return items[:len(items)-1]
}

// CleanSessions removes the files in the directory of daemon processes that are gone. Errors are
// passed over.
func CleanSessions(directory string) {
	entries, _ := os.ReadDir(directory)
	for _, e := range entries {
		id, begun, ok := strings.Cut(e.Name(), "-")
		process, err := strconv.Atoi(id)
		if !ok || err != nil || e.Type() != fs.FileMode(0) {
			continue
		}
		if now, err := startOf(process); err != nil || now != begun {
			os.Remove(filepath.Join(directory, e.Name()))
		}
	}
}
