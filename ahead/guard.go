// SPDX-License-Identifier: GPL-3.0-or-later

package ahead

import (
	"bufio"
	"encoding/json"
	"io"
	"math"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/sourcestate"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

// Guard starts a process that removes what the helpers of the session leave in the store when this
// one ends: the daemon kills its helpers, with all processes of their group, when it needs them no
// more and when a client goes away (Guix, nix/libutil/util.cc: Agent::~Agent, Pid::kill). The
// process is this program, and is to call [CleanAfter]; its arguments are those given, the store
// and the name of the session. If it cannot be started, that is no error: the next helper removes
// what is left.
//
// It is for the start, before anything that strangers have made is read: the process is as free as
// this one.
func (s *Session) Guard(store string, arguments ...string) {
	// What the daemon has left open by mistake is not for the guard, which may live longer.
	unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	guard := exec.Command("/proc/self/exe", append(arguments, store, filepath.Base(s.path))...)
	guard.Args[0] = os.Args[0]
	guard.Dir = "/"
	guard.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	input, err := guard.StdinPipe()
	pipe, ok := input.(syscall.Conn)
	if err == nil && ok && guard.Start() == nil {
		s.counts.guard = pipe
	}
}

// counts are what one helper has staged, and used of that and of what other helpers of the session
// have staged, of which the guard is told. There is one Ahead at a time, whose lock is held.
type counts struct {
	sourcestate.Ahead
	guard syscall.Conn // nil if there is none
}

// add counts an item, and does not wait.
func (c *counts) add(items, bytes *int64, item substitute.Item) {
	*items++
	*bytes += int64(item.NarSize)
	if c.guard == nil {
		return
	}
	line, _ := json.Marshal(c.Ahead) // which has no error
	line = append(line, '\n')
	if raw, err := c.guard.SyscallConn(); err == nil {
		raw.Write(func(fd uintptr) bool {
			unix.Write(int(fd), line) // what does not fit, the next line says
			return true
		})
	}
}

// CleanAfter waits for the end of the input, whose other end is with a helper, and then, for all
// helpers of the session to end; what they have left in the store is removed. It returns what that
// helper has told last. Signals that end the service of the daemon do not end this: it is over
// soon.
func CleanAfter(input io.Reader, store, session string) (last sourcestate.Ahead) {
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGTERM)
	for lines := bufio.NewScanner(input); lines.Scan(); {
		var counts sourcestate.Ahead
		if json.Unmarshal(lines.Bytes(), &counts) == nil {
			last = counts
		}
	}
	io.Copy(io.Discard, input) // if there was a line that is none of ours
	clean(store, session, 0)
	return last
}
