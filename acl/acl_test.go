// SPDX-License-Identifier: GPL-3.0-or-later

package acl

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"
)

func TestParseACL(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       []string // the keys
	}{
		{"empty", "(acl)", nil},
		{"one key", "(acl (entry " + eccKey + " (tag (guix import))))", []string{eccKey}},
		{"two keys", "(acl (entry " + rsaKey + " (tag (guix import))) (entry " + eccKey + "(tag (guix import))))", []string{rsaKey, eccKey}},
		{"a key listed twice", "(acl (entry " + eccKey + " (tag (guix import))) (entry " + eccKey + "(tag (guix import))))", []string{eccKey}},
		{"other notations", `(3:acl (#656e747279# ` + eccKey + ` ("tag" (|Z3VpeA==| import))))`, []string{eccKey}},
		{"a key of another kind", "(acl (entry (public-key (dsa (p #01#))) (tag (guix import))))", []string{"(public-key (dsa (p #01#)))"}},
		{"text after the list", "(acl) (entry)", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, err := ParseACL([]byte(tt.text))
			must(t, err)
			var got []string
			for _, k := range a.Keys() {
				got = append(got, k.String())
				if !a.Contains(k) {
					t.Errorf("Contains(%v) = false", k)
				}
			}
			if strings.Join(got, "\n") != strings.Join(tt.want, "\n") {
				t.Errorf("keys %q, want %q", got, tt.want)
			}
			again, err := ParseACL([]byte(a.Text()))
			if err != nil || again.Text() != a.Text() || len(again.Keys()) != len(tt.want) {
				t.Errorf("Text = %q, which parses as %v, %v", a.Text(), again, err)
			}
		})
	}
}

func TestParseACLRejects(t *testing.T) {
	good := "(entry " + eccKey + " (tag (guix import)))"
	for _, tt := range []struct{ name, text, want string }{
		{"nothing", "", "no list"},
		{"no s-expression", "(acl", "not closed"},
		{"another list", "(acl2 " + good + ")", `does not start with "acl"`},
		{"only a key", eccKey, `does not start with "acl"`},
		{"nested", "((acl))", `does not start with "acl"`},
		{"an atom among the entries", "(acl " + good + " x)", "entry 2"},
		{"an empty entry", "(acl " + good + " ())", `entry 2: the list does not start with "entry"`},
		{"another word", "(acl (Entry " + eccKey + " (tag (guix import))))", `does not start with "entry"`},
		{"no key", "(acl (entry (tag (guix import))))", "public-key"},
		{"a key that is an atom", "(acl (entry public-key (tag (guix import))))", "public-key"},
		{"a private key", "(acl (entry (private-key x) (tag (guix import))))", "public-key"},
		{"no tag", "(acl (entry " + eccKey + "))", "(tag (guix import))"},
		{"another tag", "(acl (entry " + eccKey + " (tag (guix export))))", "(tag (guix import))"},
		{"a longer tag", "(acl (entry " + eccKey + " (tag (guix import export))))", "(tag (guix import))"},
		{"the tag first", "(acl (entry (tag (guix import)) " + eccKey + "))", "public-key"},
		{"something after the tag", "(acl (entry " + eccKey + " (tag (guix import)) x))", "follows the tag"},
		{"one bad entry among many", "(acl" + strings.Repeat(good, 9) + "(entry)" + good + ")", "entry 10"},
	} {
		_, err := ParseACL([]byte(tt.text))
		wantError(t, tt.name, err, tt.want)
	}
}

func TestEmptyACLs(t *testing.T) {
	k, err := ParsePublicKey([]byte(eccKey))
	must(t, err)
	for name, a := range map[string]*ACL{"nil": nil, "zero": {}, "no keys": NewACL()} {
		if a.Contains(k) || len(a.Keys()) != 0 || a.Text() != "(acl)\n" {
			t.Errorf("%s: keys %v, text %q", name, a.Keys(), a.Text())
		}
		if err := a.Verify(digestOf(t, rsaH), signatureOf(eccData, eccVal, eccKey)); !errors.Is(err, ErrUnauthorisedKey) {
			t.Errorf("%s: Verify: %v", name, err)
		}
	}
}

func TestReadACL(t *testing.T) {
	pub, list := read(t, "../testdata/guix-mirror/signing-key.pub"), read(t, "../testdata/guix-mirror/acl")
	file := func(text string, err error) func() ([]byte, error) {
		return func() ([]byte, error) { return []byte(text), err }
	}
	absent, broken := fmt.Errorf("x: %w", fs.ErrNotExist), errors.New("broken")
	for _, c := range []struct {
		name         string
		list, ownKey func() ([]byte, error)
		want         string // nothing is an error
	}{
		{"neither file", file("", absent), file("", absent), "(acl)\n"},
		{"a key only", file("", absent), file(pub, nil), list},
		{"both", file("(acl)", nil), file(pub, nil), "(acl)\n"},
		{"a list that cannot be read", file("", broken), file(pub, nil), ""},
		{"an empty list", file("", nil), file(pub, nil), ""},
		{"a key that cannot be read", file("", absent), file("", broken), ""},
		{"a key of nonsense", file("", absent), file("x", nil), ""},
	} {
		if a, err := ReadACL(c.list, c.ownKey); (err != nil) != (c.want == "") || err == nil && a.Text() != c.want {
			t.Errorf("%s: %v, %v", c.name, a, err)
		}
	}
}

func TestPublicKeyUsable(t *testing.T) {
	ones := "#" + strings.Repeat("FF", 128) + "#"
	for _, tt := range []struct {
		name, key string
		want      string // what the error says, empty if the key is usable
	}{
		{"ecc", eccKey, ""},
		{"ecdsa", strings.Replace(eccKey, "ecc", "ecdsa", 1), ""},
		{"q first", "(public-key (ecc (q #" + eccQ + "#) (curve Ed25519)))", ""},
		{"rsa", rsaKey, ""},
		{"no key in it", "(public-key)", "exactly one"},
		{"two keys in it", "(public-key (ecc) (rsa))", "exactly one"},
		{"an atom", "(public-key ecc)", "neither of type"},
		{"dsa", "(public-key (dsa (p #01#)))", "neither of type"},
		{"another curve", strings.Replace(eccKey, "Ed25519", `"NIST P-256"`, 1), `"NIST P-256"`},
		{"lower-case curve", strings.Replace(eccKey, "Ed25519", "ed25519", 1), `"ed25519"`},
		{"EdDSA", strings.Replace(eccKey, "(q", "(flags eddsa) (q", 1), "other elements"},
		{"no curve", "(public-key (ecc (q #" + eccQ + "#)))", "other elements"},
		{"two curves", strings.Replace(eccKey, "(q", "(curve Ed25519) (q", 1), "other elements"},
		{"q of two values", strings.Replace(eccKey, "#)", "# #00#)", 1), "other elements"},
		{"short q", strings.Replace(eccKey, eccQ, eccQ[2:], 1), "31 bytes"},
		{"q not on the curve", strings.Replace(eccKey, eccQ, "02"+strings.Repeat("00", 31), 1), "not on the curve"},
		{"RSA without e", "(public-key (rsa (n " + ones + ")))", "other elements"},
		{"RSA of 1024 bits", "(public-key (rsa (n " + ones + ") (e #03#)))", ""},
		{"RSA of 1016 bits", "(public-key (rsa (n #" + strings.Repeat("FF", 127) + "#) (e #03#)))", "1016 bits"},
		{"RSA of 16384 bits", "(public-key (rsa (n #" + strings.Repeat("FF", 2048) + "#) (e #03#)))", ""},
		{"RSA of 16392 bits", "(public-key (rsa (n #" + strings.Repeat("FF", 2049) + "#) (e #03#)))", "too large"},
		{"RSA with an even modulus", "(public-key (rsa (n " + strings.Replace(ones, "FF#", "FE#", 1) + ") (e #03#)))", "impossible"},
		{"RSA with an even exponent", "(public-key (rsa (n " + ones + ") (e #04#)))", "impossible"},
		{"RSA with exponent 1", "(public-key (rsa (n " + ones + ") (e #01#)))", "impossible"},
		{"RSA with a large exponent", "(public-key (rsa (n " + ones + ") (e #80000001#)))", "impossible"},
		{"RSA with a huge exponent", "(public-key (rsa (n " + ones + ") (e #0100000001#)))", "too large"},
		{"RSA of empty numbers", "(public-key (rsa (n ##) (e ##)))", "0 bits"},
	} {
		k, err := ParsePublicKey([]byte(tt.key))
		must(t, err)
		wantError(t, tt.name, k.Usable(), tt.want)
	}
	for _, text := range []string{"", "(key)", "public-key", "(private-key (public-keys))"} {
		if k, err := ParsePublicKey([]byte(text)); err == nil {
			t.Errorf("ParsePublicKey(%q) = %v", text, k)
		}
	}
}
