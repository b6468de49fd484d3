// SPDX-License-Identifier: GPL-3.0-or-later

package confine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMain runs a confined process when TestProcess asks for one.
func TestMain(m *testing.M) {
	if directory := os.Getenv("CONFINE_TEST"); directory != "" {
		confined(directory)
		return
	}
	os.Exit(m.Run())
}

// confined prints what a confined process can do.
func confined(directory string) {
	in := func(name string) string { return filepath.Join(directory, name) }
	if err := Process(Paths{Write: []string{in("state"), in("gone")}, Read: []string{in("settings"), in("key")}}); err != nil {
		os.Stdout.WriteString("not confined: " + err.Error() + "\n")
	}
	read := func(name string) error { _, err := os.ReadFile(in(name)); return err }
	for _, do := range []struct {
		name string
		err  error
	}{
		{"read below settings", read("settings/a")},
		{"read the key", read("key")},
		{"write below state", os.WriteFile(in("state/a"), nil, 0o600)},
		{"rename between directories of state", errors.Join(os.Mkdir(in("state/d"), 0o700), os.Rename(in("state/a"), in("state/d/a")))},
		{"link below state", os.Link(in("state/d/a"), in("state/b"))},
		{"make a symbolic link", os.Symlink("x", in("state/c"))},
		{"remove below state", os.RemoveAll(in("state/d"))},
		{"read elsewhere", read("other/a")},
		{"write to settings", os.WriteFile(in("settings/a"), nil, 0o600)},
		{"write elsewhere", os.WriteFile(in("other/b"), nil, 0o600)},
		{"write by another way", os.WriteFile(in("state/link"), nil, 0o600)},
		{"remove elsewhere", os.Remove(in("other/a"))},
		{"make a device", unix.Mknod(in("state/fifo"), unix.S_IFIFO|0o600, 0)},
		{"start a program", exec.Command(os.Args[0]).Run()},
	} {
		result := "yes"
		if errors.Is(do.err, fs.ErrPermission) || errors.Is(do.err, unix.EXDEV) {
			result = "no"
		} else if do.err != nil {
			result = do.err.Error()
		}
		os.Stdout.WriteString(do.name + ": " + result + "\n")
	}
	if n, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0); n != 1 {
		os.Stdout.WriteString(fmt.Sprintln("may gain privileges", err))
	}
}

func TestProcess(t *testing.T) {
	if s := InForce(); !strings.HasPrefix(s, "files by Landlock") {
		t.Skip(s)
	}
	directory := t.TempDir()
	for _, name := range []string{"settings", "state", "other"} {
		if err := errors.Join(os.Mkdir(filepath.Join(directory, name), 0o700), os.WriteFile(filepath.Join(directory, name, "a"), nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.WriteFile(filepath.Join(directory, "key"), nil, 0o600), os.Symlink("../other/c", filepath.Join(directory, "state/link"))); err != nil {
		t.Fatal(err)
	}
	command := exec.Command(os.Args[0])
	command.Env = append(os.Environ(), "CONFINE_TEST="+directory)
	out, err := command.CombinedOutput()
	want := `read below settings: yes
read the key: yes
write below state: yes
rename between directories of state: yes
link below state: yes
make a symbolic link: yes
remove below state: yes
read elsewhere: no
write to settings: no
write elsewhere: no
write by another way: no
remove elsewhere: no
make a device: no
start a program: no
`
	if err != nil || string(out) != want {
		t.Errorf("got %v\n%s", err, out)
	}
}
