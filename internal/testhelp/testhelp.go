// SPDX-License-Identifier: GPL-3.0-or-later

// Package testhelp has what the tests of many packages need.
package testhelp

import (
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Must ends the test if there is an error.
func Must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// WantError fails the test unless err says what, or is none if that is empty.
func WantError(tb testing.TB, name string, err error, what string) {
	tb.Helper()
	if what == "" && err != nil || what != "" && (err == nil || !strings.Contains(err.Error(), what)) {
		tb.Errorf("%s: error %v, want %q", name, err, what)
	}
}

// Allocated returns how many bytes of memory all that runs meanwhile has allocated, freed or not.
func Allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// FreeAddress returns an address of loopback where nobody listens, by TCP or UDP, nor will: its
// host is one of sixteen million, and its port not one that the system gives to those who ask for
// any. It is for servers that start again at the same address, or are told where to listen, and for
// what nobody is to answer.
func FreeAddress() string {
	for range 1000 {
		address := fmt.Sprintf("127.%d.%d.%d:%d", rand.IntN(256), rand.IntN(256), 1+rand.IntN(254), 10000+rand.IntN(20000))
		stream, err := net.Listen("tcp", address)
		if err != nil {
			continue
		}
		datagram, err := net.ListenPacket("udp", address)
		stream.Close()
		if err != nil {
			continue
		}
		datagram.Close()
		return address
	}
	panic("no address is free")
}

// Certificate returns a certificate, with its key, that servers may use whose clients do not look
// who has signed it.
func Certificate() tls.Certificate {
	server := httptest.NewTLSServer(nil)
	server.Close()
	return server.TLS.Certificates[0]
}

// WithoutCalls runs f as subtests in processes of their own, one for each of the errors, where
// system calls fail by it, as by an old kernel, by a file system, or in a sandbox. The programs
// that f starts are concerned as well.
func WithoutCalls(t *testing.T, calls []uint32, errors []unix.Errno, f func(t *testing.T)) {
	for _, err := range errors {
		t.Run(unix.ErrnoName(err), func(t *testing.T) {
			const variable = "TESTHELP_WITHOUT_CALLS"
			if os.Getenv(variable) != "" {
				refuse(t, calls, err)
				f(t)
				return
			}
			if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, 0); errno != unix.EFAULT {
				t.Skip("no seccomp: ", errno) // which would miss the filter
			}
			again := exec.Command(os.Args[0], "-test.run=^"+strings.ReplaceAll(t.Name(), "/", "$/^")+"$", "-test.v")
			again.Env = append(os.Environ(), variable+"=1")
			if out, err := again.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}

// refuse has calls fail in all threads of this process, for good.
func refuse(t *testing.T, calls []uint32, err unix.Errno) {
	program := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}} // the number of the call
	for _, call := range calls {
		program = append(program,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: call, Jf: 1},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(err)})
	}
	program = append(program, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
	filter := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	// Only root may do without that, which is of this thread and goes to the others with the filter.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	Must(t, unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
	_, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&filter)))
	if errno != 0 {
		t.Fatal("seccomp: ", errno)
	}
}
