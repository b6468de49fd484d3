// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestWalkthrough runs what docs/walkthrough.md tells people to run.
func TestWalkthrough(t *testing.T) {
	for _, program := range []string{"bash", "curl"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("%s is not there", program)
		}
	}
	script, err := shellBlocks("walkthrough.md", "sh")
	must(t, err)
	c := newChain(t)
	must(t, os.Remove(c.directory+"/etc/substitute-eris.toml"))
	// Another server may be at the port that people are told to use.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	_, port, _ := net.SplitHostPort(l.Addr().String())
	l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-c", strings.ReplaceAll(script, ":8181", ":"+port))
	cmd.Dir, cmd.Env = c.directory, c.env
	// Servers that a step has left behind end with the group.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	log, err := os.Create(c.directory + "/output")
	must(t, err)
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	err = cmd.Run()
	if cmd.Process != nil {
		group := cmd.Process.Pid
		unix.Kill(-group, unix.SIGKILL)
		checkGone(t, group)
	}
	if err != nil {
		output, _ := os.ReadFile(log.Name())
		t.Errorf("%v\n%s", err, output)
	}
}
