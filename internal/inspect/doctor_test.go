// SPDX-License-Identifier: GPL-3.0-or-later

package inspect

import (
	"io/fs"
	"maps"
	"os"
	"strings"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
)

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
	testhelp.Must(t, os.WriteFile(file, nil, 0o600))
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
		testhelp.Must(t, os.Chmod(file, v.mode))
		info, err := os.Stat(file)
		testhelp.Must(t, err)
		if got := v.who.may(info, 2); got != v.may {
			t.Errorf("%v %+v: %v", v.mode, v.who, got)
		}
	}
}

// The service of Guix System gives the servers as an argument of their own.
func TestDaemonOptions(t *testing.T) {
	for arguments, want := range map[string]protocol.Options{
		"guix-daemon\x00--substitute-urls=http://a http://b\x00--discover=no\x00":                                {"substitute-urls": "http://a http://b", "discover": "false"},
		"guix-daemon\x00--discover\x00--substitute-urls\x00http://a http://b\x00":                                {"substitute-urls": "http://a http://b", "discover": "true"},
		"guix-daemon\x00--substitute-urls=\x00http://a\x00":                                                      {"substitute-urls": ""},
		"guix-daemon\x00--substitute-urls":                                                                       {"substitute-urls": ""},
		"guix-daemon\x00--substitute-urls=http://a\x00--discover\x00--substitute-urls=http://b\x00--discover=no": {"substitute-urls": "http://b", "discover": "false"},
		"": {},
	} {
		d := daemonProcess{arguments: strings.Split(arguments, "\x00")}
		if got := d.options(); !maps.Equal(got, want) {
			t.Errorf("%q: %q, want %q", arguments, got, want)
		}
	}
}
