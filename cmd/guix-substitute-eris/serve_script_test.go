// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bytes"
	"errors"
	"net"
	"os"
	"os/exec"
	"regexp"
	"sync"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

func init() { scriptCommands["blockstore"] = scriptBlockstore }

// blockServers has the block stores of all scripts, which run in parallel.
var blockServers sync.Map

// A blockServer is the program, run as "serve" under something that plays a
// service manager.
type blockServer struct {
	cmd    *exec.Cmd
	states *net.UnixConn
	ended  chan struct{}
	err    error // once ended is closed
}

// blockstore does something with a server of blocks:
//
//	blockstore start NAME [OPTION]...  starts it, waits until it is ready, and sets
//	                   NAME_UNIX, NAME_TCP, NAME_UDP and NAME_HTTP to its store
//	                   URLs, the last one of each kind; its log is the file NAME.log
//	blockstore stop NAME    ends it by SIGTERM; it must exit with status 0
//	blockstore kill NAME    ends it by SIGKILL
//	blockstore signal NAME SIGUSR1
//	blockstore await NAME REGEXP  waits until the log has a match
//
// It has the environment of the script. "! blockstore start" wants it to end
// without having been ready, with status 1.
func scriptBlockstore(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: blockstore start|stop|kill|signal|await NAME [ARGUMENT]...")
	}
	name := args[1]
	key := ts.Getenv("WORK") + "/" + name
	log := ts.MkAbs(name + ".log")
	if args[0] == "start" {
		s, err := startBlockServer(ts, name, log, args[2:])
		text, _ := os.ReadFile(log)
		ts.Logf("%s", text)
		if neg {
			var exit *exec.ExitError
			if err == nil {
				ts.Fatalf("it has started")
			} else if !errors.As(err, &exit) || exit.ExitCode() != 1 {
				ts.Fatalf("%v", err)
			}
			return
		}
		ts.Check(err)
		blockServers.Store(key, s)
		return
	}
	v, ok := blockServers.Load(key)
	if !ok {
		ts.Fatalf("there is no block store %s", name)
	}
	s := v.(*blockServer)
	switch args[0] {
	case "stop":
		s.cmd.Process.Signal(unix.SIGTERM)
		<-s.ended
		text, _ := os.ReadFile(log)
		ts.Logf("%s", text)
		ts.Check(s.err)
		if state := s.state(); state != "STOPPING=1" {
			ts.Fatalf("it told the service manager %q", state)
		}
	case "kill":
		s.cmd.Process.Kill()
		<-s.ended
	case "signal":
		signal := unix.SignalNum(args[2])
		if signal == 0 {
			ts.Fatalf("there is no signal %s", args[2])
		}
		ts.Check(s.cmd.Process.Signal(signal))
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

// serving are the lines that name what is listened on.
var serving = regexp.MustCompile(`(?m)^guix-substitute-eris: serving on ((coap\+unix|coap\+tcp|coap\+ws|coap|http)://\S+) `)

func startBlockServer(ts *testscript.TestScript, name, log string, args []string) (*blockServer, error) {
	program, err := exec.LookPath("guix-substitute-eris")
	if err != nil {
		return nil, err
	}
	f, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	// The path of the script's directory can be too long for a socket.
	directory, err := os.MkdirTemp("", "notify")
	if err != nil {
		return nil, err
	}
	ts.Defer(func() { os.RemoveAll(directory) })
	address := &net.UnixAddr{Name: directory + "/s", Net: "unixgram"}
	s := &blockServer{ended: make(chan struct{})}
	if s.states, err = net.ListenUnixgram("unixgram", address); err != nil {
		return nil, err
	}
	s.cmd = exec.Command(program, append([]string{"serve"}, args...)...)
	s.cmd.Dir = ts.MkAbs(".")
	s.cmd.Env = append(scriptEnvironment(ts), "NOTIFY_SOCKET="+address.Name)
	s.cmd.Stderr = f
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		s.states.Close()
		return nil, err
	}
	go func() {
		s.err = s.cmd.Wait()
		close(s.ended)
		s.states.SetReadDeadline(time.Now()) // what has come can still be read
	}()
	ts.Defer(func() {
		s.cmd.Process.Kill()
		<-s.ended
		s.states.Close()
	})
	if state := s.state(); state != "READY=1" {
		<-s.ended
		return nil, s.err
	}
	text, err := os.ReadFile(log)
	for _, match := range serving.FindAllSubmatch(text, -1) {
		kind := map[string]string{"coap+unix": "UNIX", "coap+tcp": "TCP", "coap+ws": "WS", "coap": "UDP", "http": "HTTP"}[string(match[2])]
		ts.Setenv(name+"_"+kind, string(match[1]))
	}
	return s, err
}

// state returns what the server next tells the service manager; "" if it has
// ended.
func (s *blockServer) state() string {
	var b [256]byte
	n, err := s.states.Read(b[:])
	if errors.Is(err, os.ErrDeadlineExceeded) {
		// The deadline hides what came before it.
		s.states.SetReadDeadline(time.Time{})
		raw, rawErr := s.states.SyscallConn()
		if rawErr != nil {
			return ""
		}
		rawErr = raw.Read(func(fd uintptr) bool {
			n, err = unix.Read(int(fd), b[:])
			return true
		})
		if rawErr != nil || err != nil {
			return ""
		}
	}
	return string(bytes.TrimSpace(b[:max(n, 0)]))
}
