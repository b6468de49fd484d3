// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// publish VARIABLE [OPTION]... runs the command of that name until the end of the script, or until
// "! publish VARIABLE", and sets the variable to its URL. It must end with status 0 when it is told
// to.
func scriptPublish(ts *testscript.TestScript, neg bool, args []string) {
	key := ts.Getenv("WORK") + "/" + args[0]
	stop := func() (running bool) {
		p, running := processes.LoadAndDelete(key)
		if running {
			ts.Check(p.(*process).stop())
		}
		return running
	}
	if neg {
		if !stop() {
			ts.Fatalf("there is no publisher %s", args[0])
		}
		return
	}
	p, err := startPublish(ts.MkAbs("."), ts.MkAbs(args[0]+".log"), scriptEnvironment(ts), args[1:]...)
	ts.Check(err)
	ts.Setenv(args[0], p.urls["HTTP"])
	processes.Store(key, p)
	ts.Defer(func() { stop() })
}

// startPublish starts a publisher: see startProcess.
func startPublish(directory, log string, env []string, args ...string) (*process, error) {
	return startProcess(directory, log, env, append([]string{"publish", "--listen=127.0.0.1:0"}, args...))
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
