// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/rogpeppe/go-internal/txtar"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/sourcestate"
)

// transcript FILE runs the commands of a file, whose lines begin with "$ ", by the shell, and
// compares what they say, on standard output and standard error, with what follows them there. An
// exit status other than 0 follows as "[STATUS]". What differs from run to run is replaced: ports,
// times, speeds, keys and read capabilities. With ERIS_UPDATE_GOLDEN in the environment, the file
// in the script is rewritten.
func scriptTranscript(ts *testscript.TestScript, neg bool, args []string) {
	want := ts.ReadFile(args[0])
	var got strings.Builder
	for line := range strings.Lines(want) {
		command, ok := strings.CutPrefix(line, "$ ")
		if !ok {
			continue
		}
		got.WriteString(line)
		cmd := exec.Command("sh", "-c", command)
		cmd.Dir, cmd.Env = ts.MkAbs("."), append(scriptEnvironment(ts), "WORK="+ts.Getenv("WORK"))
		out, err := cmd.CombinedOutput()
		text := sameEachTime(string(out), ts.Getenv("WORK"))
		if text != "" && !strings.HasSuffix(text, "\n") {
			text += "\n"
		}
		got.WriteString(text)
		if err != nil {
			got.WriteString("[" + strconv.Itoa(cmd.ProcessState.ExitCode()) + "]\n")
		}
	}
	if got.String() == want {
		return
	}
	if os.Getenv("ERIS_UPDATE_GOLDEN") != "" {
		updateScript(ts, args[0], got.String())
		return
	}
	lines, first := strings.SplitAfter(got.String(), "\n"), 0
	for _, line := range strings.SplitAfter(want, "\n") {
		if first == len(lines) || line != lines[first] {
			break
		}
		first++
	}
	ts.Fatalf("the transcript is:\n%s\nit differs from here on:\n%s", got.String(), strings.Join(lines[first:min(first+5, len(lines))], ""))
}

// shellBlocks returns what a document of the project tells people to run, in blocks with a mark.
func shellBlocks(document, mark string) (string, error) {
	text, err := os.ReadFile("../../docs/" + document)
	script := "set -eu\n"
	for i, part := range strings.Split(string(text), "\n```") {
		if block, ok := strings.CutPrefix(part, mark+"\n"); ok && i%2 == 1 {
			script += block + "\n"
		}
	}
	return script, err
}

// document FILE runs what a document tells people to run; document FILE MARK SCRIPT writes that
// which is marked as "sh MARK" to a file.
func scriptDocument(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) == 3 {
		script, err := shellBlocks(args[0], "sh "+args[1])
		ts.Check(err)
		ts.Check(os.WriteFile(ts.MkAbs(args[2]), []byte(script), 0o666))
		return
	}
	script, err := shellBlocks(args[0], "sh")
	ts.Check(err)
	cmd := exec.Command("sh", "-xc", script)
	cmd.Dir, cmd.Env = ts.MkAbs("."), scriptEnvironment(ts)
	out, err := cmd.CombinedOutput()
	ts.Logf("%s", out)
	ts.Check(err)
}

// measured FILE URL BYTES DURATION notes in a file of the cache how fast a source was.
func scriptMeasured(ts *testscript.TestScript, neg bool, args []string) {
	n, err := strconv.ParseInt(args[2], 10, 64)
	ts.Check(err)
	took, err := time.ParseDuration(args[3])
	ts.Check(err)
	state := sourcestate.Open(ts.MkAbs(args[0]))
	state.Measured(args[1], n, took, time.Millisecond)
	ts.Check(state.Save())
}

// updateScript replaces a file of a script.
func updateScript(ts *testscript.TestScript, file, text string) {
	name := "testdata/script/" + ts.Name() + ".txt"
	archive, err := txtar.ParseFile(name)
	ts.Check(err)
	for i := range archive.Files {
		if archive.Files[i].Name == file {
			archive.Files[i].Data = []byte(text)
		}
	}
	ts.Check(os.WriteFile(name, txtar.Format(archive), 0o644))
}

// sameEachTime replaces what differs from run to run.
func sameEachTime(text, work string) string {
	text = strings.ReplaceAll(text, work, "$WORK")
	if host, err := os.Hostname(); err == nil && host != "" {
		text = regexp.MustCompile(`(signed by|trust) `+regexp.QuoteMeta(host)+`\b`).ReplaceAllString(text, "$1 HOST")
	}
	for _, r := range [][2]string{
		{`127\.\d+\.\d+\.\d+:\d{4,5}`, "127.0.0.1:PORT"},
		{`\b\d+ ms\b|\b\d+\.\d s\b`, "TIME"},
		{`\b\d+\.\d MB/s\b`, "SPEED"},
		{`\b\d+\.\d [MG]B free\b`, "MUCH free"},
		{`#[0-9A-F]{16}…`, "#KEY…"},
		{`urn:eris:[A-Z2-7]{10,}(…[A-Z2-7]{4})?`, "urn:eris:URN"},
		{`\bblock [A-Z2-7]{52}`, "block REFERENCE"},
		{`sha256:[0-9a-z]{52}`, "sha256:HASH"},
		{`\d{4}-\d\d-\d\d \d\d:\d\d(:\d\d)?`, "DATE"},
		{`version: guix-substitute-eris .*`, "version: VERSION"},
		{`helpers confine themselves: .*`, "helpers confine themselves"},
		{`\S+/bin/guix-substitute-eris( ixmr)?\b`, "PROGRAM"},
		{`for the group \w+`, "for the group GID"},
		{`process \d+, user \w+`, "process PID, user UID"},
	} {
		text = regexp.MustCompile(r[0]).ReplaceAllString(text, r[1])
	}
	return text
}
