// SPDX-License-Identifier: GPL-3.0-or-later

// Package confine takes from a process what it does not need, before it reads what strangers have
// made: most files, other programs, and what only an administrator needs of the kernel. All of it
// is best effort: a kernel that lacks something gives what it has.
package confine

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"unsafe"

	"github.com/landlock-lsm/go-landlock/landlock"
	"golang.org/x/sys/unix"
)

// Paths are the files that a confined process may use. What does not exist is left out.
type Paths struct {
	// Write are directories below which it may do everything, also rename and link.
	Write []string
	// Read are files and directories that it may read, and all that is below them.
	Read []string
}

// InForce says in words what [Process] can do on this machine.
func InForce() string {
	calls := "calls by seccomp"
	if _, ok := architectures[runtime.GOARCH]; !ok {
		calls = "calls not, for want of a filter for " + runtime.GOARCH
	} else if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, 0); errno != unix.EFAULT {
		calls = "calls not, for the kernel or a sandbox does not permit it" // which would miss the filter
	}
	version, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 || version < renaming {
		return "files are not confined, for the kernel has no Landlock that can do it; " + calls
	}
	return fmt.Sprintf("files by Landlock, version %d, %s", version, calls)
}

// renaming is the first version of Landlock that can allow renaming between directories.
const renaming = 2

// Process confines this process, with all of its threads, for good: it opens no other files than
// those named, starts no programs, gains no privileges, leaves no core, and is refused a list of
// calls that only administrators need. Files that are open stay open, and the network is as before.
//
// It returns an error that says what is not in force. A kernel without Landlock (Linux before 5.13)
// is no error; one that cannot allow renaming between directories (before 5.19) is treated alike.
func Process(p Paths) error {
	var rules []landlock.Rule
	for _, group := range []struct {
		paths     []string
		file, dir landlock.AccessFSSet
	}{
		{p.Write, writeFile, writeDirectory},
		{p.Read, readFile, readDirectory},
	} {
		for _, path := range group.paths {
			info, err := os.Stat(path)
			switch {
			case err != nil:
			case info.IsDir():
				rules = append(rules, landlock.PathAccess(group.dir, path).IgnoreIfMissing())
			default:
				rules = append(rules, landlock.PathAccess(group.file, path).IgnoreIfMissing())
			}
		}
	}
	var errs []error
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		errs = append(errs, fmt.Errorf("cores of the process may be kept: %w", err))
	}
	// Of the rights of the fifth version, which are all about files.
	if err := landlock.V5.BestEffort().RestrictPaths(rules...); err != nil {
		errs = append(errs, fmt.Errorf("files are not confined (Landlock): %w", err))
	}
	if err := refuseCalls(); err != nil {
		errs = append(errs, fmt.Errorf("calls are not confined (seccomp): %w", err))
	}
	return errors.Join(errs...)
}

// The rights of Landlock (linux/landlock.h). Nobody may make devices or start programs.
const (
	readFile       = landlock.AccessFSSet(unix.LANDLOCK_ACCESS_FS_READ_FILE)
	readDirectory  = readFile | unix.LANDLOCK_ACCESS_FS_READ_DIR
	writeFile      = readFile | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_TRUNCATE
	writeDirectory = writeFile | readDirectory | unix.LANDLOCK_ACCESS_FS_REFER |
		unix.LANDLOCK_ACCESS_FS_REMOVE_DIR | unix.LANDLOCK_ACCESS_FS_REMOVE_FILE | unix.LANDLOCK_ACCESS_FS_MAKE_DIR |
		unix.LANDLOCK_ACCESS_FS_MAKE_REG | unix.LANDLOCK_ACCESS_FS_MAKE_SYM
)

// refused are calls that nothing here makes. A list of what is allowed would have to follow each
// version of Go.
var refused = []uint32{
	unix.SYS_EXECVE, unix.SYS_EXECVEAT, unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV,
	unix.SYS_PIDFD_GETFD, unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_FSOPEN, unix.SYS_FSPICK, unix.SYS_OPEN_TREE,
	unix.SYS_MOVE_MOUNT, unix.SYS_MOUNT_SETATTR, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT, unix.SYS_SETNS, unix.SYS_UNSHARE,
	unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE, unix.SYS_KEXEC_LOAD, unix.SYS_REBOOT,
	unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_ACCT, unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_ADJTIMEX,
	unix.SYS_CLOCK_ADJTIME, unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME,
	unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD, unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY, unix.SYS_KEYCTL,
	unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_MKNODAT, unix.SYS_IO_URING_SETUP,
	// By the service of Guix 1.5 the daemon is not root, but may give all files away, and Landlock
	// does not look at that.
	unix.SYS_FCHOWN, unix.SYS_FCHOWNAT,
}

// architectures are the names that seccomp has for what Go calls otherwise (linux/audit.h), and the
// numbers of such calls that not every architecture has: mknod, umount, stime, clock_settime64,
// clock_adjtime64, ioperm, iopl, kexec_file_load, chown, lchown, chown32, fchown32 and lchown32, as
// far as it has them, in this order.
var architectures = map[string]struct {
	name  uint32
	calls []uint32
}{
	"386":     {unix.AUDIT_ARCH_I386, []uint32{14, 22, 25, 404, 405, 101, 110, 182, 16, 212, 207, 198}},
	"amd64":   {unix.AUDIT_ARCH_X86_64, []uint32{133, 173, 172, 320, 92, 94}},
	"arm":     {unix.AUDIT_ARCH_ARM, []uint32{14, 404, 405, 401, 182, 16, 212, 207, 198}},
	"arm64":   {unix.AUDIT_ARCH_AARCH64, []uint32{294}},
	"ppc64le": {unix.AUDIT_ARCH_PPC64LE, []uint32{14, 22, 25, 101, 110, 382, 181, 16}},
	"riscv64": {unix.AUDIT_ARCH_RISCV64, []uint32{294}},
}

// otherCalls are the numbers from which on x86-64 has calls of x32.
const otherCalls = 0x40000000

// refuseCalls has the kernel refuse some calls to all threads (seccomp(2)).
func refuseCalls() error {
	architecture, ok := architectures[runtime.GOARCH]
	if !ok {
		return errors.ErrUnsupported
	}
	// The fields of struct seccomp_data: the number of the call, and the architecture.
	const number, machine = 0, 4
	statement := func(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, K: k} }
	jump := func(code uint16, k uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_K | code, Jt: yes, Jf: no, K: k}
	}
	load := uint16(unix.BPF_LD | unix.BPF_W | unix.BPF_ABS)
	calls := slices.Concat(refused, architecture.calls)
	left := uint8(len(calls))
	program := []unix.SockFilter{
		statement(load, machine),
		jump(unix.BPF_JEQ, architecture.name, 0, left+2),
		statement(load, number),
		jump(unix.BPF_JGE, otherCalls, left+1, 0),
	}
	for i, call := range calls {
		program = append(program, jump(unix.BPF_JEQ, call, left-uint8(i), 0))
	}
	program = append(program,
		statement(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ALLOW),
		statement(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ERRNO|uint32(unix.EPERM)))
	filter := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	// An ordinary user needs that, too, in the same thread. Landlock has set it for all of them,
	// where there is Landlock.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	install := func(flags uintptr) (thread uintptr, errno unix.Errno) {
		thread, _, errno = unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&filter)))
		return thread, errno
	}
	// Linux before 5.16 takes a process with a filter for one that runs the code of strangers, and
	// makes it slower; before 4.17 it has no flag against that.
	thread, errno := install(unix.SECCOMP_FILTER_FLAG_TSYNC | unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW)
	if errno == unix.EINVAL {
		thread, errno = install(unix.SECCOMP_FILTER_FLAG_TSYNC)
	}
	if errno != 0 {
		return errno
	} else if thread != 0 {
		return fmt.Errorf("thread %d has a filter of its own", thread)
	}
	return nil
}
