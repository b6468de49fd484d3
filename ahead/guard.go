// SPDX-License-Identifier: GPL-3.0-or-later

package ahead

import (
	"io"
	"math"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// Guard starts a process that removes what the helpers of the session leave in the store when this
// one is killed: the daemon does that to its helpers, with all processes of their group, when it
// needs them no more and when a client goes away (Guix, nix/libutil/util.cc: Agent::~Agent,
// Pid::kill). The process is this program, and is to call [CleanAfter]; its arguments are those
// given, the store and the name of the session. What is returned ends it at once, and is to be
// called at the end, when this process has removed what it has left. If it cannot be started, that
// is no error: the next helper removes what is left.
//
// It is for the start, before anything that strangers have made is read: the process is as free as
// this one.
func (s *Session) Guard(store string, arguments ...string) (dismiss func()) {
	// What the daemon has left open by mistake is not for the guard, which may live longer.
	unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	guard := exec.Command("/proc/self/exe", append(arguments, store, filepath.Base(s.path))...)
	guard.Args[0] = os.Args[0]
	guard.Dir = "/"
	guard.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if _, err := guard.StdinPipe(); err != nil || guard.Start() != nil {
		return func() {}
	}
	return func() {
		// It would wait for other helpers of the session, and the daemon for the end of this one.
		guard.Process.Kill()
		guard.Wait() // however it ends
	}
}

// CleanAfter waits for the end of the input, whose other end is with a helper, and then, for all
// helpers of the session to end; what they have left in the store is removed. Signals that end the
// service of the daemon do not end this: it is over soon.
func CleanAfter(input io.Reader, store, session string) {
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGTERM)
	io.Copy(io.Discard, input)
	cleanStage(store, session)
}
