// SPDX-License-Identifier: GPL-3.0-or-later

package settings

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

// TestDefaults checks that the table of settings has all of them, each once, with a comment before
// and an empty line after it, as the manual wants it, and no others.
func TestDefaults(t *testing.T) {
	var shown []string
	for entry := range strings.SplitSeq(strings.TrimSpace(Defaults), "\n\n") {
		lines := strings.Split(entry, "\n")
		name, _, ok := strings.Cut(strings.TrimPrefix(lines[len(lines)-1], "#"), " = ")
		if !ok || len(lines) < 2 || slices.ContainsFunc(lines[:len(lines)-1], func(l string) bool { return !strings.HasPrefix(l, "# ") }) {
			t.Errorf("not a comment and a setting:\n%s", entry)
		}
		shown = append(shown, name)
	}
	said := File{}
	if _, err := toml.Decode(Defaults, &said); err != nil || fmt.Sprint(said) != fmt.Sprint(Default()) {
		t.Errorf("defaults are %v, and the table has %v, %v", Default(), said, err)
	}
	known := settingNames()
	slices.Sort(shown)
	slices.Sort(known)
	if !slices.Equal(shown, known) {
		t.Errorf("settings are %q, and the table has %q", known, shown)
	}
}

// TestExample checks the example of the document about the configuration.
func TestExample(t *testing.T) {
	text, err := os.ReadFile("../../docs/configuration.md")
	testhelp.Must(t, err)
	_, after, _ := strings.Cut(string(text), "    substitute-urls = ")
	example, _, _ := strings.Cut(after, "\n\n")
	var c File
	meta, err := toml.Decode("substitute-urls = "+example, &c)
	if err != nil || len(meta.Keys()) < 5 || len(meta.Undecoded()) > 0 {
		t.Errorf("%v: settings %v, of which there are none named %v", err, meta.Keys(), meta.Undecoded())
	}
}

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
