// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bufio"
	"bytes"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// demoCommandIn is the demonstration with a directory for temporary files that has nothing else in
// it, in a process group of its own.
func demoCommandIn(t *testing.T, args ...string) (cmd *exec.Cmd, temporary string) {
	t.Helper()
	// A short name, for the socket.
	temporary, err := os.MkdirTemp("/tmp", "demo")
	must(t, err)
	t.Cleanup(func() {
		makeWritable(temporary)
		os.RemoveAll(temporary)
	})
	cmd = exec.Command(theProgram, append([]string{"demo"}, args...)...)
	cmd.Env = append(os.Environ(), "TMPDIR="+temporary, "ERIS_STORE_URL=coap://127.0.0.1:1", "GUIX_CONFIGURATION_DIRECTORY=/nonexistent")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	return cmd, temporary
}

// checkGone checks that no process of a group is left. It may take a moment until those are gone
// whose parent was killed.
func checkGone(t *testing.T, group int) {
	t.Helper()
	for begin := time.Now(); unix.Kill(-group, 0) == nil; time.Sleep(10 * time.Millisecond) {
		if time.Since(begin) > 30*time.Second {
			unix.Kill(-group, unix.SIGKILL)
			t.Fatal("processes are left")
		}
	}
}

func checkEmpty(t *testing.T, directory string) {
	t.Helper()
	if left, err := os.ReadDir(directory); err != nil || len(left) > 0 {
		t.Errorf("%v is left, error %v", left, err)
	}
}

// TestDemo runs the demonstration as a visitor does: without anything of his own, and with a tree
// of his own.
func TestDemo(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	own := t.TempDir() + "/My Tree é"
	must(t, os.MkdirAll(own+"/empty", 0o755))
	must(t, os.WriteFile(own+"/file", bytes.Repeat([]byte("x"), 100000), 0o755))
	for _, test := range []struct {
		name       string
		args, want []string
	}{
		{"generated", nil, []string{"-generated-1.0\n     from urn:eris:B4"}},
		{"own", []string{own, own + "/file"}, []string{"-My-Tree--\n     from urn:eris:B4", "-file\n     from urn:eris:B"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			cmd, temporary := demoCommandIn(t, test.args...)
			cmd.Dir = t.TempDir()
			output, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, output)
			}
			for _, want := range append(test.want, "     from http://127.0.0.1:", "\n   | ERIS: urn:eris:B", "All items have come back both ways") {
				if !strings.Contains(string(output), want) {
					t.Errorf("%q is not in the output:\n%s", want, output)
				}
			}
			checkEmpty(t, temporary)
			checkGone(t, cmd.Process.Pid)
		})
	}
}

// TestDemoFails checks that nothing stays when the demonstration cannot go on.
func TestDemoFails(t *testing.T) {
	cmd, temporary := demoCommandIn(t, "/nonexistent/path")
	output, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(output), "/nonexistent/path") {
		t.Errorf("error %v\n%s", err, output)
	}
	checkEmpty(t, temporary)
}

// TestDemoEnds ends the demonstration in the middle.
func TestDemoEnds(t *testing.T) {
	for _, signal := range []os.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGTERM, unix.SIGKILL} {
		t.Run(signal.String(), func(t *testing.T) {
			t.Parallel()
			cmd, temporary := demoCommandIn(t)
			out, err := cmd.StdoutPipe()
			must(t, err)
			must(t, cmd.Start())
			for s := bufio.NewScanner(out); s.Scan(); {
				if strings.HasPrefix(s.Text(), "3. ") { // both servers are running
					cmd.Process.Signal(signal)
				}
			}
			if err := cmd.Wait(); err == nil {
				t.Error("it has ended well")
			}
			checkGone(t, cmd.Process.Pid)
			if signal != unix.SIGKILL {
				checkEmpty(t, temporary)
			}
		})
	}
}
