// SPDX-License-Identifier: GPL-3.0-or-later

package confine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
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
	if flags, err := strconv.Atoi(os.Getenv("CONFINE_TEST_REFUSE")); err == nil {
		refuseFlags(uint32(flags))
	}
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
		{"give a file to somebody", os.Chown(in("state/b"), os.Getuid(), os.Getgid())},
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
	for _, call := range architectures[runtime.GOARCH].calls {
		if _, _, errno := unix.RawSyscall(uintptr(call), 0, 0, 0); errno != unix.EPERM {
			os.Stdout.WriteString(fmt.Sprintln("may make the call", call, errno))
		}
	}
	if n, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0); n != 1 {
		os.Stdout.WriteString(fmt.Sprintln("may gain privileges", err))
	}
}

// refuseFlags has the kernel refuse filters of the given flags, as one does that does not know
// them.
func refuseFlags(flags uint32) {
	const load, equal, end = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_RET | unix.BPF_K
	program := []unix.SockFilter{
		{Code: load, K: 0}, // the number of the call
		{Code: equal, K: unix.SYS_SECCOMP, Jf: 3},
		{Code: load, K: 24}, // the second argument
		{Code: equal, K: flags, Jf: 1},
		{Code: end, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EINVAL)},
		{Code: end, K: unix.SECCOMP_RET_ALLOW},
	}
	filter := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	_, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&filter)))
	if err != nil || errno != 0 {
		fmt.Println("not refused:", err, errno)
	}
}

// What is said to be in force is so where a kernel or a sandbox has no seccomp either.
func TestInForce(t *testing.T) {
	if s := InForce(); !strings.HasSuffix(s, "calls by seccomp") {
		t.Skip(s)
	}
	testhelp.WithoutCalls(t, []uint32{unix.SYS_SECCOMP}, []unix.Errno{unix.ENOSYS, unix.EPERM}, func(t *testing.T) {
		if s := InForce(); !strings.HasSuffix(s, "does not permit it") {
			t.Error(s)
		}
	})
}

func TestProcess(t *testing.T) {
	if s := InForce(); !strings.HasPrefix(s, "files by Landlock") {
		t.Skip(s)
	}
	directory := t.TempDir()
	for _, name := range []string{"settings", "state", "other"} {
		testhelp.Must(t, errors.Join(os.Mkdir(filepath.Join(directory, name), 0o700), os.WriteFile(filepath.Join(directory, name, "a"), nil, 0o600)))
	}
	testhelp.Must(t, errors.Join(os.WriteFile(filepath.Join(directory, "key"), nil, 0o600), os.Symlink("../other/c", filepath.Join(directory, "state/link"))))
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
give a file to somebody: no
start a program: no
`
	// Speculation stays as it is where the kernel can be asked for that, and only there.
	withFlag, without := unix.SECCOMP_FILTER_FLAG_TSYNC|unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW, unix.SECCOMP_FILTER_FLAG_TSYNC
	for _, refused := range []string{"", strconv.Itoa(without), strconv.Itoa(withFlag)} {
		testhelp.Must(t, errors.Join(os.WriteFile(filepath.Join(directory, "state/a"), nil, 0o600), os.RemoveAll(filepath.Join(directory, "state/b")), os.RemoveAll(filepath.Join(directory, "state/c"))))
		command := exec.Command(os.Args[0])
		command.Env = append(os.Environ(), "CONFINE_TEST="+directory, "CONFINE_TEST_REFUSE="+refused)
		out, err := command.CombinedOutput()
		if err != nil || string(out) != want {
			t.Errorf("kernel refuses flags %q: got %v\n%s", refused, err, out)
		}
	}
}

// TestArchitectures compares the numbers of calls that not every architecture has with those of
// package unix.
func TestArchitectures(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", "{{.Dir}}", "golang.org/x/sys/unix").Output()
	if err != nil {
		t.Skip("no go:", err)
	}
	for name, a := range architectures {
		text, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(out)), "zsysnum_linux_"+name+".go"))
		if err != nil {
			t.Fatal(err)
		}
		var want []uint32
		for _, call := range []string{"MKNOD", "UMOUNT", "STIME", "CLOCK_SETTIME64", "CLOCK_ADJTIME64", "IOPERM", "IOPL", "KEXEC_FILE_LOAD", "CHOWN", "LCHOWN", "CHOWN32", "FCHOWN32", "LCHOWN32"} {
			if m := regexp.MustCompile(`\bSYS_` + call + ` += (\d+)`).FindSubmatch(text); m != nil {
				n, _ := strconv.Atoi(string(m[1]))
				want = append(want, uint32(n))
			}
		}
		if !slices.Equal(a.calls, want) {
			t.Errorf("%s: the calls are %v, want %v", name, a.calls, want)
		}
	}
}
