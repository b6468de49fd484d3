// SPDX-License-Identifier: GPL-3.0-or-later

package settings

import "testing"

func TestDefaultSocket(t *testing.T) {
	for _, v := range []struct {
		user      int
		directory string
		want      string
	}{
		{0, "/run/user/0", "/run/guix-substitute-eris/eris.sock"},
		{1000, "/run/user/1000", "/run/user/1000/eris.sock"},
		{1000, "", ""},
		{1000, "run", ""},
	} {
		got, err := DefaultSocket(v.user, v.directory)
		if got != v.want || (err != nil) != (v.want == "") {
			t.Errorf("user %d, %q: %q, %v; want %q", v.user, v.directory, got, err, v.want)
		}
	}
}
