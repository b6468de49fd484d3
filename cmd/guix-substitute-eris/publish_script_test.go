// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bufio"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// publish VARIABLE [OPTION]... runs the command of that name until the end of the script, or until
// "! publish VARIABLE", and sets the variable to its URL. It must end with status 0 when it is told
// to.
func scriptPublish(ts *testscript.TestScript, neg bool, args []string) {
	key := ts.Getenv("WORK") + "/" + args[0]
	if neg {
		p, ok := publishers.LoadAndDelete(key)
		if !ok {
			ts.Fatalf("there is no publisher %s", args[0])
		}
		ts.Check(p.(*publisher).stop())
		return
	}
	// The log of a script is not for other goroutines.
	unread := func(string, ...any) {}
	p, err := startPublisher(ts.MkAbs("."), scriptEnvironment(ts), unread, args[1:])
	ts.Check(err)
	ts.Setenv(args[0], p.url)
	publishers.Store(key, p)
	ts.Defer(func() {
		if p, ok := publishers.LoadAndDelete(key); ok {
			ts.Check(p.(*publisher).stop())
		}
	})
}

// publishers has the publishers of all scripts.
var publishers sync.Map

// published is what a publisher says when it listens.
var published = regexp.MustCompile(`publishing on (\S+)`)

// A publisher is the program, run as "publish".
type publisher struct {
	cmd *exec.Cmd
	url string
	log sync.WaitGroup
}

// startPublisher runs the command publish and waits until it listens.
func startPublisher(directory string, env []string, logf func(string, ...any), args []string) (*publisher, error) {
	cmd := exec.Command(theProgram, append([]string{"publish", "--listen=127.0.0.1:0"}, args...)...)
	cmd.Dir, cmd.Env = directory, env
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	log, err := cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &publisher{cmd: cmd}
	urls := make(chan string, 1)
	p.log.Go(func() {
		defer close(urls)
		for s := bufio.NewScanner(log); s.Scan(); {
			logf("publish: %s", s.Text())
			if match := published.FindStringSubmatch(s.Text()); match != nil {
				urls <- match[1] // it says so once
			}
		}
	})
	var ok bool
	if p.url, ok = <-urls; !ok {
		return nil, errors.Join(os.ErrProcessDone, cmd.Wait())
	}
	return p, nil
}

// stop ends the publisher by SIGTERM.
func (p *publisher) stop() error {
	p.cmd.Process.Signal(unix.SIGTERM)
	p.log.Wait() // all that it says has been read
	return p.cmd.Wait()
}

// kill ends the publisher by SIGKILL.
func (p *publisher) kill() {
	p.cmd.Process.Kill()
	p.log.Wait()
	p.cmd.Wait()
}

// fetch URL FILE [TEXT] gets a file over HTTP; with a text, until it has that, within two
// minutes. "! fetch URL" wants status 404.
func scriptFetch(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 && len(args) != 3 && !neg || neg && len(args) != 1 {
		ts.Fatalf("usage: fetch URL FILE [TEXT]")
	}
	if len(args) == 3 {
		for range 1200 {
			scriptFetch(ts, false, args[:2])
			if strings.Contains(ts.ReadFile(args[1]), args[2]) {
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		ts.Fatalf("%s does not get %q", args[0], args[2])
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
