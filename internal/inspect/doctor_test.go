// SPDX-License-Identifier: GPL-3.0-or-later

package inspect

import (
	"io/fs"
	"os"
	"testing"
	"time"
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
