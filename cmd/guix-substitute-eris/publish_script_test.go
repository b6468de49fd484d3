// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bufio"
	"io"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"sync"
	"syscall"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// publish VARIABLE [OPTION]... runs the command of that name until the end of the script, or until
// "! publish VARIABLE", and sets the variable to its URL. It must end with status 0 when it is told
// to.
func scriptPublish(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 1 {
		ts.Fatalf("usage: publish VARIABLE [OPTION]...")
	}
	key := ts.Getenv("WORK") + "/" + args[0]
	if neg {
		stop, ok := publishers.LoadAndDelete(key)
		if !ok {
			ts.Fatalf("there is no publisher %s", args[0])
		}
		ts.Check(stop.(func() error)())
		return
	}
	url, stop, err := startPublisher(ts.MkAbs("."), scriptEnvironment(ts), ts.Logf, args[1:])
	ts.Check(err)
	ts.Setenv(args[0], url)
	publishers.Store(key, stop)
	ts.Defer(func() {
		if stop, ok := publishers.LoadAndDelete(key); ok {
			ts.Check(stop.(func() error)())
		}
	})
}

// publishers has the functions that stop the publishers of all scripts.
var publishers sync.Map

// startPublisher runs the command publish and waits until it listens.
func startPublisher(directory string, env []string, logf func(string, ...any), args []string) (url string, stop func() error, err error) {
	urls, stop, err := startServer(directory, env, logf, 1, append([]string{"publish", "--listen=127.0.0.1:0"}, args...)...)
	if err != nil {
		return "", nil, err
	}
	return urls[0], stop, nil
}

// announced is what servers say when they listen.
var announced = regexp.MustCompile(`(publishing|serving) on (\S+)`)

// startServer runs a command and waits until it listens on so many URLs.
func startServer(directory string, env []string, logf func(string, ...any), count int, args ...string) (urls []string, stop func() error, err error) {
	program, err := exec.LookPath("guix-substitute-eris")
	if err != nil {
		return nil, nil, err
	}
	cmd := exec.Command(program, args...)
	cmd.Dir, cmd.Env = directory, env
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	log, err := cmd.StderrPipe()
	if err != nil {
		return nil, nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	var wait sync.WaitGroup
	lines := make(chan string)
	wait.Go(func() {
		defer close(lines)
		for s := bufio.NewScanner(log); s.Scan(); {
			lines <- s.Text()
		}
	})
	for line := range lines {
		logf("%s: %s", args[0], line)
		if match := announced.FindStringSubmatch(line); match != nil {
			urls = append(urls, match[2])
		}
		if len(urls) == count {
			break
		}
	}
	if len(urls) < count {
		cmd.Wait()
		return nil, nil, os.ErrProcessDone
	}
	wait.Go(func() {
		for line := range lines {
			logf("%s: %s", args[0], line)
		}
	})
	return urls, func() error {
		cmd.Process.Signal(unix.SIGTERM)
		wait.Wait() // all that it says has been read
		return cmd.Wait()
	}, nil
}

// fetch URL FILE gets a file over HTTP. "! fetch URL" wants status 404.
func scriptFetch(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 && !neg || neg && len(args) != 1 {
		ts.Fatalf("usage: fetch URL FILE")
	}
	response, err := http.Get(args[0])
	ts.Check(err)
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	ts.Check(err)
	if neg != (response.StatusCode == 404) || !neg && response.StatusCode != 200 {
		ts.Fatalf("%s: status %s", args[0], response.Status)
	}
	if !neg {
		ts.Check(os.WriteFile(ts.MkAbs(args[1]), body, 0o644))
	}
}
