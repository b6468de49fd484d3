// SPDX-License-Identifier: GPL-3.0-or-later

// Package setup puts the program in place on a machine, or in the directory tree of one, and takes
// that back: the commands "setup" and "use". [System.Install] and [System.Use] say what is to be
// done, as steps; [System.Do] does it and keeps a record of what was there before, by which
// [System.Undo] restores that.
package setup

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

// stateDirectory is where the record of what was done is.
const stateDirectory = "/var/lib/guix-substitute-eris/setup"

// maxFile bounds the length of a file that is changed, in bytes; the longest is the program.
const maxFile = 1 << 28

// A System is a machine, or the directory tree of one that does not run. It is not safe for
// concurrent use; several processes exclude each other by a lock in Do and Undo.
type System struct {
	root string // "/", or the directory that stands for it
	live bool   // its service manager is systemd, and runs

	directory string // of the record, while that is open
	lock      *os.File
	records   []record
	foreseen  map[string]string // what would be at file names, while undoing is only shown
}

// Open returns the machine that this process runs on, or the tree at root unless that is empty.
func Open(root string) (*System, error) {
	abs, err := filepath.Abs(cmp.Or(root, "/"))
	if err == nil {
		abs, err = filepath.EvalSymlinks(abs)
	}
	s := &System{root: abs}
	s.live = s.root == "/" && s.exists("/run/systemd/system")
	return s, err
}

// A Step is one thing to do: write a file or a symbolic link, or run a command.
type Step struct {
	// Path is the absolute file name on the system, or empty; Text is what it is to have, or Link
	// where it leads. Mode is that of a new file; that of an old one stays.
	Path, Link string
	Text       []byte
	Mode       fs.FileMode
	// Keep says that the file stays when all is undone.
	Keep bool
	// Command is run if Path is empty; Undo takes back what it did. Either may be empty.
	Command, Undo []string

	was *string // the state of the path for which it was planned; nil is any
}

// String says in a line for people what is done; nothing if only the undoing does something.
func (s Step) String() string {
	switch {
	case s.Link != "":
		return "link " + s.Path + " to " + s.Link
	case s.Path != "":
		return "write " + s.Path
	case len(s.Command) > 0:
		return "run " + strings.Join(s.Command, " ")
	}
	return ""
}

// A record is what is known of one step that was done, or was about to be: it is written before.
type record struct {
	Path  string   `json:"path,omitempty"`
	After string   `json:"after,omitempty"` // the state of the path then; nothing if it stays
	Copy  string   `json:"copy,omitempty"`  // the path of what was there before, if anything was
	Undo  []string `json:"undo,omitempty"`
}

// at returns where a path of the system is. Links of a tree do not lead out of it.
func (s *System) at(path string) (string, error) {
	name := filepath.Join(s.root, path)
	for parent := filepath.Dir(name); s.root != "/"; parent = filepath.Dir(parent) {
		real, err := filepath.EvalSymlinks(parent)
		if errors.Is(err, fs.ErrNotExist) && parent != s.root {
			continue
		}
		if err == nil && real != s.root && !strings.HasPrefix(real, s.root+"/") {
			err = fmt.Errorf("%s leads out of %s", parent, s.root)
		}
		return name, err
	}
	return name, nil
}

func (s *System) exists(path string) bool {
	_, err := os.Stat(filepath.Join(s.root, path))
	return err == nil
}

// read returns the contents of a regular file of the system; a link in its place is an error.
func (s *System) read(path string) ([]byte, error) {
	name, err := s.at(path)
	if err != nil {
		return nil, err
	}
	if info, err := os.Lstat(name); err == nil && !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file, so that somebody else cares for it; nothing is changed", name)
	}
	return files.ReadRegular(name, maxFile)
}

const recordName = "record.json"

// open opens the record, and locks it until close.
func (s *System) open() (err error) {
	name, err := s.at(filepath.Join(stateDirectory, recordName))
	if err == nil {
		s.directory = filepath.Dir(name)
		err = files.MakeDirectory(s.directory)
	}
	if err != nil {
		return err
	}
	if s.lock, err = files.Lock(filepath.Join(s.directory, "lock"), 0); err != nil {
		return err
	}
	s.records = nil
	text, err := files.ReadState(filepath.Join(s.directory, recordName), maxFile)
	if err == nil {
		err = json.Unmarshal(text, &s.records)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.lock.Close()
		return fmt.Errorf("the record of earlier changes: %w", err)
	}
	return nil
}

func (s *System) save(records []record) error {
	text, err := json.MarshalIndent(records, "", "  ")
	if err != nil {
		return err
	}
	return write(filepath.Join(s.directory, recordName), 0o600, append(text, '\n'))
}

func (s *System) add(r record) error {
	s.records = append(s.records, r)
	return s.save(s.records)
}

// write is done with the record locked, so that what is written has a name that [System.Undo]
// knows.
func write(name string, mode fs.FileMode, text []byte) error {
	return files.Write(name, mode, files.Options{Sync: true, Locked: true}, text)
}

func unfinished(name string) string {
	return filepath.Join(filepath.Dir(name), files.TemporaryPrefix+filepath.Base(name))
}

// now returns what there is at a path of the system.
func (s *System) now(path string) (string, error) {
	name, err := s.at(path)
	if err != nil {
		return "", err
	}
	return state(name)
}

// planned notes what there is where steps write: until they are done, somebody else may write
// there, while a question is open for example.
func (s *System) planned(steps []Step) ([]Step, error) {
	for n, step := range steps {
		if step.Path == "" {
			continue
		}
		was, err := s.now(step.Path)
		if err != nil {
			return nil, err
		}
		steps[n].was = &was
	}
	return steps, nil
}

// Do does the steps in order, and says each before. What fails ends it; what was done before that
// can be undone.
func (s *System) Do(steps []Step, say func(format string, a ...any)) error {
	if err := s.open(); err != nil {
		return err
	}
	defer s.lock.Close()
	for _, step := range steps {
		if step.String() != "" {
			say("%v", step)
		}
		if err := s.do(step); err != nil {
			return fmt.Errorf("cannot %v: %w", step, err)
		}
	}
	return nil
}

func (s *System) do(step Step) error {
	if step.Path != "" {
		return s.put(step)
	}
	if len(step.Undo) > 0 {
		if err := s.add(record{Undo: step.Undo}); err != nil {
			return err
		}
	}
	return run(step.Command)
}

// run runs a command. The error says what a service of ours that does not start has said, and else
// what the command has.
func run(command []string) error {
	if len(command) == 0 {
		return nil
	}
	begun := time.Now().Unix()
	output, err := exec.Command(command[0], command[1:]...).CombinedOutput()
	if err == nil {
		return nil
	}
	said, _ := exec.Command("journalctl", "--identifier=guix-substitute-eris", fmt.Sprintf("--since=@%d", begun), "--output=cat").Output()
	if _, reason, ok := bytes.Cut(said, []byte("error: ")); ok {
		return fmt.Errorf("%.1000s", bytes.TrimSpace(bytes.SplitN(reason, []byte("\n"), 2)[0]))
	}
	return fmt.Errorf("%w: %.1000s", err, bytes.TrimSpace(output))
}

func (s *System) put(step Step) error {
	if now, err := s.now(step.Path); err == nil && step.was != nil && now != *step.was {
		return errors.New("it was changed meanwhile")
	}
	name, err := s.at(step.Path)
	if err == nil {
		err = s.makeParents(step.Path)
	}
	if err != nil {
		return err
	}
	r := record{Path: step.Path}
	before, err := os.Lstat(name)
	if !step.Keep {
		r.After = stateOf(step.Text, step.Link)
		if err == nil {
			r.Copy, err = s.keep(step.Path)
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := s.add(r); err != nil {
		return err
	}
	if step.Link != "" {
		temporary := unfinished(name)
		os.Remove(temporary)
		if err := os.Symlink(step.Link, temporary); err != nil {
			return err
		}
		return os.Rename(temporary, name)
	}
	if before == nil || !before.Mode().IsRegular() {
		return write(name, step.Mode, step.Text)
	}
	if err := write(name, before.Mode().Perm(), step.Text); err != nil {
		return err
	}
	if owner := before.Sys().(*syscall.Stat_t); int(owner.Uid) != os.Geteuid() || int(owner.Gid) != os.Getegid() {
		return os.Lchown(name, int(owner.Uid), int(owner.Gid))
	}
	return nil
}

// keep gives what is at a path a second name beside it, with which it outlives that it is replaced.
func (s *System) keep(path string) (string, error) {
	for n := 1; ; n++ {
		second := fmt.Sprintf("%s.before-guix-substitute-eris-%d", path, n)
		err := os.Link(filepath.Join(s.root, path), filepath.Join(s.root, second))
		if !errors.Is(err, fs.ErrExist) {
			return second, err
		}
	}
}

// makeParents makes the directories above a path, and records each.
func (s *System) makeParents(path string) error {
	parent := filepath.Dir(path)
	if parent == "/" || s.exists(parent) {
		return nil
	}
	if err := s.makeParents(parent); err != nil {
		return err
	}
	if err := s.add(record{Path: parent, After: directoryState}); err != nil {
		return err
	}
	return os.Mkdir(filepath.Join(s.root, parent), 0o755)
}

const directoryState = "directory"

// stateOf identifies what a file has, or where a link leads.
func stateOf(text []byte, link string) string {
	if link != "" {
		return "link " + link
	}
	return fmt.Sprintf("sha256 %x", sha256.Sum256(text))
}

// state returns what is at a file name: nothing is empty.
func state(name string) (string, error) {
	info, err := os.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", nil
	case err != nil:
		return "", err
	case info.IsDir():
		return directoryState, nil
	case info.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(name)
		return stateOf(nil, target), err
	}
	text, err := files.ReadRegular(name, maxFile)
	return stateOf(text, ""), err
}

// Undo restores what was there before all that Do has done, the last thing first, and says each.
// What somebody has changed since stays as it is, which is said; undone is whether nothing did.
// Directories that Do has made are removed if they are empty then. With dry, it only says what it
// would do, and undone is whether there is nothing to undo.
func (s *System) Undo(dry bool, say func(format string, a ...any)) (undone bool, err error) {
	if _, err := os.Lstat(filepath.Join(s.root, stateDirectory)); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return true, nil
		}
		return false, err
	}
	if err := s.open(); err != nil {
		return false, err
	}
	defer s.lock.Close()
	if dry && len(s.records) == 0 {
		return true, nil
	}
	would := ""
	if s.foreseen = nil; dry {
		would, s.foreseen = "would ", map[string]string{}
	}
	var left []record
	told := map[string]bool{}
	for n := len(s.records) - 1; n >= 0; n-- {
		what, act, err := s.undo(s.records[n])
		if err == nil && what != "" {
			say("%s%s", would, what)
		}
		if err == nil && act != nil && !dry {
			err = act()
		}
		if err != nil {
			if !told[err.Error()] {
				say("not undone: %v", err)
			}
			told[err.Error()] = true
			left = append([]record{s.records[n]}, left...)
		}
		if dry {
			continue
		}
		if name, err := s.at(s.records[n].Path); err == nil && name != s.root {
			os.Remove(unfinished(name)) // which a process that was killed has left
		}
		if err := s.save(append(s.records[:n:n], left...)); err != nil {
			return false, err
		}
	}
	if len(left) > 0 || dry {
		return false, nil
	}
	err = os.RemoveAll(s.directory)
	os.Remove(filepath.Dir(s.directory)) // unless something else is there
	return true, err
}

// undo returns what undoes a step, and says it; either may be nothing.
func (s *System) undo(r record) (what string, act func() error, err error) {
	if r.Path == "" && !s.live {
		return "", nil, fmt.Errorf("%q is not run, for the system does not run", strings.Join(r.Undo, " "))
	} else if r.Path == "" && slices.Contains(r.Undo, apparmorParser) && !s.profileLoaded() {
		return "", nil, nil // it would be from now on
	} else if r.Path == "" {
		return "run " + strings.Join(r.Undo, " "), func() error { return run(r.Undo) }, nil
	}
	// The record of a tree that somebody else has made may have anything.
	name, err := s.at(r.Path)
	if err != nil {
		return "", nil, err
	}
	if r.After == "" {
		return "", nil, nil
	}
	second, before := "", ""
	if r.Copy != "" {
		if second, err = s.at(r.Copy); err == nil {
			before, err = state(second)
		}
		if err != nil || before == "" {
			return "", nil, err // it was restored, and the process ended then
		}
	}
	now, ok := s.foreseen[name]
	if !ok {
		now, err = state(name)
	}
	switch {
	case err != nil:
		return "", nil, err
	case r.After == directoryState:
		return "", func() error { os.Remove(name); return nil }, nil // others may have put something there
	case now != r.After && now != before:
		return "", nil, fmt.Errorf("%s was changed since; it is left as it is", r.Path)
	}
	if s.foreseen != nil {
		s.foreseen[name] = before
	}
	switch {
	case r.Copy != "" && now != r.After: // both are names of the same file
		return "", func() error { return os.Remove(second) }, nil
	case r.Copy != "":
		return "restore " + r.Path, func() error { return os.Rename(second, name) }, nil
	case now == "":
		return "", nil, nil
	}
	return "remove " + r.Path, func() error { return os.Remove(name) }, nil
}
