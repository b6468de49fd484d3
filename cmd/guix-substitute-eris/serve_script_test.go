// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
)

func init() {
	scriptCommands["blockstore"] = withUsage("start|stop|kill|signal|await NAME [ARGUMENT]...", scriptBlockstore)
}

// processes has the servers of all scripts, which run in parallel.
var processes sync.Map

// A process is the program, run as "serve" or "publish" under something that plays a service
// manager.
type process struct {
	cmd       *exec.Cmd
	urls      map[string]string // UNIX, TCP, TLS, WS, UDP, HTTP: the last one of each kind
	directory string            // of the socket for states
	states    *net.UnixConn
	ended     chan struct{}
	err       error // once ended is closed
}

// blockstore does something with a server of blocks:
//
//	blockstore start NAME [OPTION]...  starts it, waits until it is ready, and sets
//	                   NAME_UNIX, NAME_TCP, NAME_TLS, NAME_UDP and NAME_HTTP to its store
//	                   URLs, the last one of each kind, NAME_STATUS to where its status is; its log is the file NAME.log
//	blockstore stop NAME    ends it by SIGTERM; it must exit with status 0
//	blockstore kill NAME    ends it by SIGKILL
//	blockstore signal NAME SIGUSR1
//	blockstore await NAME REGEXP  waits until the log has a match
//
// It has the environment of the script. "! blockstore start" wants it to end without having been
// ready, with status 1 or 2.
func scriptBlockstore(ts *testscript.TestScript, neg bool, args []string) {
	name := args[1]
	key := ts.Getenv("WORK") + "/" + name
	log := ts.MkAbs(name + ".log")
	if args[0] == "start" {
		s, err := startServe(ts.MkAbs("."), log, scriptEnvironment(ts), args[2:]...)
		text, _ := os.ReadFile(log)
		ts.Logf("%s", text)
		if neg {
			var exit *exec.ExitError
			if err == nil {
				ts.Fatalf("it has started")
			} else if !errors.As(err, &exit) || exit.ExitCode() != int(message.Failed) && exit.ExitCode() != int(message.BadUsage) {
				ts.Fatalf("%v", err)
			}
			return
		}
		ts.Check(err)
		ts.Defer(s.end)
		for kind, url := range s.urls {
			ts.Setenv(name+"_"+kind, url)
		}
		processes.Store(key, s)
		return
	}
	v, ok := processes.Load(key)
	if !ok {
		ts.Fatalf("there is no block store %s", name)
	}
	s := v.(*process)
	switch args[0] {
	case "stop":
		ts.Check(s.stop())
	case "kill":
		s.kill()
	case "await":
		pattern, err := regexp.Compile("(?m)" + args[2])
		ts.Check(err)
		for begin := time.Now(); ; time.Sleep(5 * time.Millisecond) {
			text, err := os.ReadFile(log)
			ts.Check(err)
			if pattern.Match(text) {
				return
			}
			if time.Since(begin) > time.Minute {
				ts.Fatalf("the log has no match: %s", text)
			}
		}
	default:
		ts.Fatalf("blockstore %s is not known", args[0])
	}
}

// servingLine is a line that names what is listened on.
var servingLine = regexp.MustCompile(`(?m)^guix-substitute-eris: (?:serving|publishing) on ((coap\+unix|coap\+tcp|coaps\+tcp|coap\+ws|coap|http)://\S+)`)

// statusLine names where the status is shown.
var statusLine = regexp.MustCompile(`(?m)^guix-substitute-eris: status at (\S+)$`)

// startServe starts a block store: see startProcess.
func startServe(directory, log string, env []string, args ...string) (*process, error) {
	return startProcess(directory, log, env, append([]string{"serve"}, args...))
}

// startProcess starts the program in a directory, with its log in a file, and waits until it is
// ready. If it ends instead, the error is an [exec.ExitError].
func startProcess(directory, log string, env, args []string) (_ *process, err error) {
	f, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	s := &process{ended: make(chan struct{}), urls: map[string]string{}}
	// Paths in the directory can be too long for a socket.
	if s.directory, err = os.MkdirTemp("", "notify"); err != nil {
		return nil, err
	}
	address := &net.UnixAddr{Name: s.directory + "/s", Net: "unixgram"}
	if s.states, err = net.ListenUnixgram("unixgram", address); err != nil {
		return nil, err
	}
	// Whoever the server runs as may tell, as with a real service manager.
	if err := errors.Join(os.Chmod(s.directory, 0o755), os.Chmod(address.Name, 0o777)); err != nil {
		return nil, err
	}
	s.cmd = exec.Command(theProgram, args...)
	s.cmd.Dir = directory
	s.cmd.Env = append(slices.Clip(env), "NOTIFY_SOCKET="+address.Name)
	s.cmd.Stderr = f
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		close(s.ended)
		s.end()
		return nil, err
	}
	go func() {
		s.err = s.cmd.Wait()
		close(s.ended)
		s.states.WriteToUnix([]byte("ended"), address) // behind what it has told
	}()
	if s.state() != "READY=1" {
		<-s.ended
		s.end()
		return nil, s.err
	}
	text, err := os.ReadFile(log)
	for _, match := range servingLine.FindAllSubmatch(text, -1) {
		kind := map[string]string{"coap+unix": "UNIX", "coap+tcp": "TCP", "coaps+tcp": "TLS", "coap+ws": "WS", "coap": "UDP", "http": "HTTP"}[string(match[2])]
		s.urls[kind] = string(match[1])
	}
	if match := statusLine.FindSubmatch(text); match != nil {
		s.urls["STATUS"] = string(match[1])
	}
	return s, err
}

// kill ends the server by SIGKILL.
func (s *process) kill() {
	s.cmd.Process.Kill()
	<-s.ended
}

// end is for when the server is not needed any more, whatever it does.
func (s *process) end() {
	if s.cmd.Process != nil {
		s.kill()
	}
	s.states.Close()
	os.RemoveAll(s.directory)
}

// stop ends the server by SIGTERM, and checks that it does so in good order.
func (s *process) stop() error {
	defer s.end()
	s.cmd.Process.Signal(unix.SIGTERM)
	<-s.ended
	if s.err != nil {
		return s.err
	}
	if state := s.state(); state != "STOPPING=1" && s.cmd.Args[1] == "serve" { // the other one may be too soon over
		return fmt.Errorf("it told the service manager %q", state)
	}
	return nil
}

// state returns what the server next tells the service manager, or "ended".
func (s *process) state() string {
	var b [256]byte
	n, _ := s.states.Read(b[:])
	return strings.TrimSpace(string(b[:n]))
}
