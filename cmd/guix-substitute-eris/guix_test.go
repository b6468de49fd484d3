// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// buildProgram builds the program as it is shipped, or takes the one that ERIS_PROGRAM names. What
// testscript runs in its place knows by its name what it is, so that it cannot be called otherwise.
func buildProgram(t *testing.T) string {
	t.Helper()
	if program := os.Getenv("ERIS_PROGRAM"); program != "" {
		return program
	}
	compiler, err := exec.LookPath("go")
	if err != nil {
		t.Skip("the program cannot be built: go is not in PATH")
	}
	program := t.TempDir() + "/guix-substitute-eris"
	build := exec.Command(compiler, "build", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return program
}

// TestHandedToGuix checks that the real guix gets everything as the daemon has given it, argv[0]
// and descriptors included.
func TestHandedToGuix(t *testing.T) {
	t.Parallel()
	program := buildProgram(t)
	shell, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("bash is not installed")
	}
	d := t.TempDir()
	script := d + "/script"
	err = os.WriteFile(script, []byte(`tr '\0' '\n' < /proc/$$/cmdline
pwd
echo from 4 >&4
cat <&5
`), 0o644)
	must(t, err)
	four, err := os.Create(d + "/four")
	must(t, err)
	defer four.Close()
	for _, flag := range []bool{false, true} {
		five, w, err := os.Pipe()
		must(t, err)
		io.WriteString(w, "from 5\n")
		w.Close()
		cmd := &exec.Cmd{
			Path: program,
			// This is how it names the program for "perform-download" and "discover".
			Args:       []string{"guix", script, "", "two words", "--query"},
			Env:        []string{"GUIX_SUBSTITUTE_ERIS_GUIX=" + shell, "X=\xff"},
			Dir:        d,
			ExtraFiles: []*os.File{four, four, five},
		}
		if flag {
			cmd.Args = slices.Insert(cmd.Args, 1, "--guix="+shell)
			cmd.Env[0] = "GUIX_SUBSTITUTE_ERIS_GUIX=/nowhere"
		}
		out, err := cmd.Output()
		five.Close()
		want := "guix\n" + script + "\n\ntwo words\n--query\n" + d + "\nfrom 5\n"
		if err != nil || string(out) != want {
			t.Errorf("with --guix %v: %q, error %v; want %q", flag, out, err, want)
		}
		cmd = &exec.Cmd{Path: program, Args: []string{"guix", d + "/environment"}, Env: cmd.Env}
		if flag {
			cmd.Args = slices.Insert(cmd.Args, 1, "--guix="+shell)
		}
		must(t, os.WriteFile(d+"/environment", []byte(`cat /proc/$$/environ`), 0o644))
		out, err = cmd.Output()
		if want := strings.Join(cmd.Env, "\x00") + "\x00GUIX_SUBSTITUTE_ERIS_HANDED=" + shell + "\x00"; err != nil || string(out) != want {
			t.Errorf("environment %q, error %v; want %q", out, err, want)
		}
	}
	if b, err := os.ReadFile(d + "/four"); err != nil || string(b) != "from 4\nfrom 4\n" {
		t.Errorf("descriptor 4 got %q, error %v", b, err)
	}
}

// TestExtension runs the extension as guix does: with the program, and where the program cannot be
// run.
func TestExtension(t *testing.T) {
	t.Parallel()
	guile, err := exec.LookPath("guile")
	if err != nil {
		t.Skip("guile is not installed")
	}
	d := t.TempDir()
	must(t, os.MkdirAll(d+"/guix/scripts", 0o755))
	err = os.WriteFile(d+"/guix/scripts/substitute.scm", []byte(`(define-module (guix scripts substitute)
  #:export (guix-substitute))
(define (guix-substitute . arguments)
  (format #t "Guix's own: ~s~%" arguments))
`), 0o644)
	must(t, err)
	etc, err := filepath.Abs("../../etc/daemon")
	must(t, err)
	run := func(program string) (out, log, replies string) {
		r, w, err := os.Pipe()
		must(t, err)
		defer r.Close()
		var stderr bytes.Buffer
		cmd := exec.Command(guile, "--no-auto-compile", "-L", etc, "-L", d, "-c",
			`((module-ref (resolve-interface '(guix extensions substitute)) 'guix-substitute) "--query")`)
		cmd.Env = []string{"GUIX_SUBSTITUTE_ERIS=" + program, "GUIX_STATE_DIRECTORY=" + d, "HOME=" + d, "_NIX_OPTIONS=discover=false\nsubstitute-urls="}
		cmd.Stdin = strings.NewReader("have /gnu/store/" + strings.Repeat("a", 32) + "-x \n")
		cmd.Stderr = &stderr
		cmd.ExtraFiles = []*os.File{w, w}
		b, err := cmd.Output()
		w.Close()
		if err != nil {
			t.Errorf("%v: %s", err, stderr.String())
		}
		answer, err := io.ReadAll(r)
		must(t, err)
		return string(b), stderr.String(), string(answer)
	}
	if out, log, replies := run(buildProgram(t)); out != "" || replies != "\n" {
		t.Errorf("%q, reply %q, log %s", out, replies, log)
	}
	notProgram := d + "/text"
	must(t, os.WriteFile(notProgram, []byte("\x7fELF but no more"), 0o755))
	for program, why := range map[string]string{"/nowhere/at/all": "No such file", etc: "Permission denied", notProgram: "Exec format"} {
		out, log, replies := run(program)
		if out != "Guix's own: (\"--query\")\n" || replies != "" || !strings.Contains(log, why) {
			t.Errorf("%s: %q, reply %q, log %s", program, out, replies, log)
		}
	}
}
