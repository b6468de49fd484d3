// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"
)

func TestPlainText(t *testing.T) {
	const ref = "block DXOLDXOLDXOLDXOLDXOLDXOLDXOLDXOLDXOLDXOLDXOLDXOLDXOL"
	for text, want := range map[string]string{
		"encoding ./nonexist: lstat ./nonexist: no such file or directory":     "encoding ./nonexist: no such file or directory",
		"coap+tcp://h:1: connecting: dial tcp 127.0.0.1:1: connect: it failed": "coap+tcp://h:1: connecting: 127.0.0.1:1: it failed",
		"getting " + ref + ": file:blocks: " + ref + ": block not found":       "getting " + ref + ": file:blocks: block not found",
		"file:blocks: " + ref + ": the directory is gone":                      "file:blocks: the directory is gone",
		"read capability: not upper-case Base32":                               "read capability: not upper-case Base32",
		"write /dev/stdout: no space left on device":                           "/dev/stdout: no space left on device",
		"listen tcp 127.0.0.1:80: bind: address already in use":                "127.0.0.1:80: another program listens there",
		"x: context canceled\ny: context deadline exceeded":                    "x: interrupted\n  y: no answer in time",
		"": "",
	} {
		if got := plainText(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

func TestHint(t *testing.T) {
	for _, v := range []struct {
		err  error
		want string
	}{
		{&fs.PathError{Op: "open", Path: "/x", Err: syscall.EACCES}, "as a user who may"},
		{&fs.PathError{Op: "open", Path: "/x", Err: syscall.EROFS}, "as a user who may"},
		{fmt.Errorf("x: %w", syscall.ENOSPC), "make room"},
		{fmt.Errorf("x: %w", os.ErrDeadlineExceeded), "can the machine be reached"},
		{errors.New("something else"), ""},
	} {
		if got := hint(v.err); !strings.Contains(got, v.want) || (got == "") != (v.want == "") {
			t.Errorf("%v: %q", v.err, got)
		}
	}
}

func TestUnknown(t *testing.T) {
	known := []string{"encode", "decode", "--store", "--substitute-urls", "policy", "doctor"}
	for name, want := range map[string]string{
		"encdoe": "encode", "dcode": "decode", "--stor": "--store", "--substitute-url": "--substitute-urls",
		"polcy": "policy", "doct": "doctor", "build": "", "gc": "", "": "", strings.Repeat("x", 1000): "",
	} {
		text := unknown("thing", name, known)
		if _, meant, _ := strings.Cut(text, "did you mean "); strings.Trim(meant, `"?`) != want {
			t.Errorf("%.20s: %.100s, want %s", name, text, want)
		}
	}
}

// TestPage has texts of strangers and of all lengths.
func TestPage(t *testing.T) {
	for _, unicode := range []bool{true, false} {
		p := &page{columns: 40, unicode: unicode}
		p.say(5, good, "%s and %s", strings.Repeat("http://example.org/", 9), "\x1b[2J\u202e é\xff\u0085 word word word word word word")
		p.line(0, "")
		p.heading(strings.Repeat("x", 41))
		for line := range strings.Lines(p.String()) {
			line = strings.TrimSuffix(line, "\n")
			if utf8.RuneCountInString(line) > 40 || !utf8.ValidString(line) || strings.ContainsAny(line, "\x1b\u202e\u0085") || !unicode && strings.Contains(line, "é") {
				t.Errorf("%v: %q", unicode, line)
			}
		}
	}
}

func TestClock(t *testing.T) {
	for at, ok := range map[time.Time]bool{time.Unix(0, 0): false, time.Now(): true} {
		var d doctor
		d.examineClock(at)
		if len(d.findings) != 1 || d.findings[0].OK != ok {
			t.Errorf("%v: %+v", at, d.findings)
		}
	}
}

func TestCredentials(t *testing.T) {
	file := t.TempDir() + "/file"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	own, ownGroup := os.Getuid(), os.Getgid()
	for _, v := range []struct {
		mode fs.FileMode
		who  credentials
		may  bool
	}{
		{0o600, credentials{uid: 0}, true},
		{0o600, credentials{uid: own + 1}, false},
		{0o602, credentials{uid: own + 1}, true},
		{0o620, credentials{uid: own + 1, groups: []int{ownGroup}}, true},
		{0o602, credentials{uid: own + 1, groups: []int{ownGroup}}, false},
		{0o000, credentials{uid: 0}, true},
	} {
		if err := os.Chmod(file, v.mode); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		if got := v.who.may(info, 2); got != v.may {
			t.Errorf("%v %+v: %v", v.mode, v.who, got)
		}
	}
}
