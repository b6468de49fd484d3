// SPDX-License-Identifier: GPL-3.0-or-later

package narinfo_test

import (
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

func TestCheckStoreName(t *testing.T) {
	hash := "0123456789abcdfghijklmnpqrsvwxyz"
	for _, tt := range []struct {
		name, in, want string // want is what the error says, empty if there is none
	}{
		{"plain", hash + "-hello-2.12", ""},
		{"every kind of character", hash + "-aZ09+-._?=", ""},
		{"shortest", hash + "-x", ""},
		{"longest", hash + "-" + strings.Repeat("x", 222), ""},
		{"too long", hash + "-" + strings.Repeat("x", 223), "longer than 255"},
		{"empty", "", "too short"},
		{"no name", hash + "-", "too short"},
		{"only a hash", hash, "too short"},
		{"no hyphen", hash + "_x", "no hyphen"},
		{"leading period", hash + "-.x", "period"},
		{"letter that is no digit", "e" + hash[1:] + "-x", "'e' at offset 0"},
		{"upper-case hash", strings.ToUpper(hash) + "-x", "'A'"},
		{"slash", hash + "-x/y", "0x2f"},
		{"blank", hash + "-x y", "0x20"},
		{"NUL", hash + "-x\x00", "0x00"},
		{"not ASCII", hash + "-é", "0xc3"},
		{"tilde", hash + "-x~", "0x7e"},
	} {
		err := narinfo.CheckStoreName(tt.in)
		if tt.want == "" && err != nil {
			t.Errorf("%s: %v", tt.name, err)
		} else if tt.want != "" {
			wantError(t, err, tt.want)
		}
	}
}

func TestCheckStorePath(t *testing.T) {
	base := strings.Repeat("a", 32) + "-x"
	for _, tt := range []struct {
		name, store, path string
		ok                bool
	}{
		{"plain", "/gnu/store", "/gnu/store/" + base, true},
		{"another store", "/tmp/a b", "/tmp/a b/" + base, true},
		{"in the wrong store", "/gnu/store", "/nix/store/" + base, false},
		{"below an item", "/gnu/store", "/gnu/store/" + base + "/" + base, false},
		{"two slashes", "/gnu/store", "/gnu/store//" + base, false},
		{"through a parent", "/gnu/store", "/gnu/store/../store/" + base, false},
		{"no directory", "/gnu/store", base, false},
		{"only the store", "/gnu/store", "/gnu/store", false},
		{"slash at the end", "/gnu/store", "/gnu/store/" + base + "/", false},
		{"empty", "/gnu/store", "", false},
		{"prefix of the store", "/gnu/store", "/gnu/store" + base, false},
	} {
		hash, err := narinfo.HashPart(tt.store, tt.path)
		if (err == nil) != tt.ok || tt.ok && hash != strings.Repeat("a", 32) {
			t.Errorf("%s: HashPart = %q, %v", tt.name, hash, err)
		}
	}
}

func TestCheckItem(t *testing.T) {
	n := parse(t, hello)
	if err := n.CheckItem("/gnu/store", helloPath); err != nil {
		t.Error(err)
	}
	wantError(t, n.CheckItem("/gnu/store", helloPath+"2"), "instead of")
	wantError(t, n.CheckItem("/nix/store", helloPath), "not in the store directory")
	other := parse(t, edit(t, hello, "/gnu/store/", "/gnu/store/x/"))
	wantError(t, other.CheckItem("/gnu/store", helloPath), "instead of")
	wantError(t, other.CheckItem("/gnu/store", other.StorePath), "not in the store directory")
}
