// SPDX-License-Identifier: GPL-3.0-or-later

package acl

import (
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var must, wantError = testhelp.Must, testhelp.WantError

const (
	eccSecret = "(private-key (ecc (curve Ed25519) (q #" + eccQ + "#) (d #" + eccD + "#)))"
	eccD      = "71E660715A57D10A174FC1E40DB9F2E1E503AC15D2448F0C9AFF6289C4C79BA8"
	// rsaDigest is what testdata/rsa.sig-val signs.
	rsaDigest = "261dee5ca4377f70571e7ac8036cc64438420c660d9db3dd6cfe03db99e659d2"
)

func signingKey(t testing.TB, secret, public string) *SigningKey {
	t.Helper()
	k, err := ParseSigningKey([]byte(secret), []byte(public))
	must(t, err)
	return k
}

// TestSignAsLibgcrypt checks that a whole signature is that of Guix, byte for byte: numbers, layout
// and all.
func TestSignAsLibgcrypt(t *testing.T) {
	got, err := signingKey(t, eccSecret, "").Sign(digestOf(t, rsaH), "example.org")
	must(t, err)
	// From a narinfo that Guix wrote.
	want := "1;example.org;KHNpZ25hdHVyZSAKIChkYXRhIAogIChmbGFncyByZmM2OTc5KQogIChoYXNoIHNoYTI1NiAjRENEMUIzN0Y5MDZFREY4NTI2MEIxMUZFMDcwQzE1MjA0QjZCRDlFODY5MUE3Njg3NThGMDU1MzQ1QTMxMUQ0OCMpCiAgKQogKHNpZy12YWwgCiAgKGVjZHNhIAogICAociAjMDcyOTIyQkNEMzY4QThCQjkzMjdGOERCRDUxOTJGNEVCNTk0QTQ0QTg4RDdGQ0FBMTI3NjI5MDZEMThEQjYzMyMpCiAgIChzICMwNDk0MDIxMkRBMjJDMDM5QzlEOTMyOTVENjJDRDlDNTFFQUQ0N0QzOEJFNzNBRkQ1RkI5OTRGRjIxN0EzQTYzIykKICAgKQogICkKIChwdWJsaWMta2V5IAogIChlY2MgCiAgIChjdXJ2ZSBFZDI1NTE5KQogICAocSAjQjYzNzVEQjhGMEE3MzFFMTc3MzdFQjhCQTVCNkFBNEE1NzgzNjQ3NTg5MUE1NzNGOThEQzcyQUZENjI1NUQ0NCMpCiAgICkKICApCiApCg=="
	if got != want {
		t.Errorf("ECDSA: got\n%s\nwant\n%s", decodeField(t, got), decodeField(t, want))
	}

	// The signature value starts with a zero byte, which is kept.
	k := signingKey(t, read(t, "testdata/rsa.sec"), "")
	got, err = k.Sign(digestOf(t, rsaDigest), "h")
	must(t, err)
	want = "1;h;" + base64.StdEncoding.EncodeToString([]byte(mustSexp(t, "(signature (data (flags pkcs1) (hash sha256 #"+rsaDigest+"#))"+
		read(t, "testdata/rsa.sig-val")+k.PublicKey().String()+")").String()))
	if got != want {
		t.Errorf("RSA: got\n%s\nwant\n%s", decodeField(t, got), decodeField(t, want))
	}
	must(t, NewACL(k.PublicKey()).Verify(digestOf(t, rsaDigest), got))
}

func decodeField(t testing.TB, field string) string {
	t.Helper()
	text, err := base64.StdEncoding.DecodeString(field[strings.LastIndexByte(field, ';')+1:])
	must(t, err)
	return string(text)
}

func TestGenerateSigningKey(t *testing.T) {
	seen := make(map[string]bool)
	for i := range byte(20) {
		k := GenerateSigningKey()
		// Through the files, as Guix would read them.
		again := signingKey(t, k.SecretText(), k.PublicKey().Text())
		if !again.PublicKey().Equal(k.PublicKey()) || again.SecretText() != k.SecretText() {
			t.Fatal("the key is another one after writing and reading")
		}
		digest := [32]byte{i}
		a := NewACL(k.PublicKey())
		field, err := again.Sign(digest, "localhost")
		must(t, err)
		must(t, a.Verify(digest, field))
		digest[0] ^= 0x80
		if err := a.Verify(digest, field); !errors.Is(err, ErrHashMismatch) {
			t.Errorf("for another digest: %v", err)
		}
		if seen[k.PublicKey().String()] || !strings.HasPrefix(k.SecretText(), "(private-key \n (ecc \n  (curve Ed25519)\n  (q #") {
			t.Errorf("key %s", k.SecretText())
		}
		seen[k.PublicKey().String()] = true
	}
}

func TestParseSigningKey(t *testing.T) {
	in65Bytes := strings.Replace(eccKey, eccQ, "0476F6573CE851BD4CFB7EC08C64CF2067F307056B135728AD1FD5603ECBE8265E445D25D6AF72DC983F571A89756483574AAAB6A58BEB3777E131A7F0B85D37B6", 1)
	for _, tt := range []struct {
		name, secret, public string
		key                  string // the public key of the pair
	}{
		{"private key alone", eccSecret, "", eccKey},
		{"both files", eccSecret, eccKey, eccKey},
		{"key-data", "(key-data " + eccKey + eccSecret + ")", "", eccKey},
		{"key-data in both files", "(key-data " + eccKey + eccSecret + ")", "(key-data " + eccKey + eccSecret + ")", eccKey},
		{"d with leading zeros", strings.Replace(eccSecret, "#71", "#000071", 1), "", eccKey},
		{"ecdsa", strings.Replace(eccSecret, "ecc", "ecdsa", 1), eccKey, eccKey},
		{"the public key in another form", eccSecret, in65Bytes, in65Bytes},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k := signingKey(t, tt.secret, tt.public)
			if k.PublicKey().String() != tt.key {
				t.Errorf("public key %v, want %v", k.PublicKey(), tt.key)
			}
			field, err := k.Sign(digestOf(t, rsaH), "example.org")
			must(t, err)
			if text := decodeField(t, field); !strings.Contains(text, eccR) || !strings.Contains(text, eccS) {
				t.Errorf("another signature: %s", decodeField(t, field))
			}
			must(t, NewACL(k.PublicKey()).Verify(digestOf(t, rsaH), field))
		})
	}

	rsaSecret := read(t, "testdata/rsa.sec")
	for _, tt := range []struct{ name, secret, public, want string }{
		{"nothing", "", "", "no list"},
		{"a public key", eccKey, "", "private-key"},
		{"empty", "(private-key)", "", "exactly one"},
		{"dsa", "(private-key (dsa))", "", "neither of type"},
		{"no d", "(private-key (ecc (curve Ed25519) (q #" + eccQ + "#)))", "", "other elements"},
		{"EdDSA", strings.Replace(eccSecret, "(d", "(flags eddsa) (d", 1), "", "other elements"},
		{"another curve", strings.Replace(eccSecret, "Ed25519", "Ed448", 1), "", `"Ed448"`},
		{"another d", strings.Replace(eccSecret, "#71", "#72", 1), "", "does not belong"},
		{"d = 0", strings.Replace(eccSecret, eccD, "00", 1), "", "does not belong"},
		{"d too large", strings.Replace(eccSecret, "#71", "#0171", 1), "", "too large"},
		{"another q", strings.Replace(eccSecret, eccQ, strings.Repeat("02", 32), 1), "", "public point"},
		{"a public key that is none", eccSecret, "(x)", "contains no list"},
		{"a public key that is not usable", eccSecret, "(public-key (dsa))", "neither of type"},
		{"the public key of another pair", eccSecret, GenerateSigningKey().PublicKey().Text(), "does not belong"},
		{"the public key of another kind", eccSecret, rsaKey, "does not belong"},
		{"the private key of another kind", rsaSecret, eccKey, "does not belong"},
		{"the public key of another RSA pair", rsaSecret, rsaKey, "does not belong"},
		{"RSA with another d", strings.Replace(rsaSecret, "(d #", "(d #01", 1), "", "belong together"},
		{"RSA with another p", strings.Replace(rsaSecret, "(p #", "(p #01", 1), "", "belong together"},
		{"RSA with p = 0", replaceNumber(rsaSecret, "p", "00"), "", "belong together"},
		{"RSA with empty p", replaceNumber(rsaSecret, "p", ""), "", "belong together"},
		{"RSA with a huge p", replaceNumber(rsaSecret, "p", strings.Repeat("FF", 5000)), "", "too large"},
		{"RSA without u", strings.Replace(rsaSecret, "(u ", "(v ", 1), "", "other elements"},
	} {
		_, err := ParseSigningKey([]byte(tt.secret), []byte(tt.public))
		wantError(t, tt.name, err, tt.want)
		if strings.Contains(strings.ToUpper(fmt.Sprint(err)), eccD[4:]) {
			t.Errorf("%s: the error tells the secret: %v", tt.name, err)
		}
	}
}

// replaceNumber replaces the value of the first list (name #…#) of a key.
func replaceNumber(key, name, hex string) string {
	before, after, _ := strings.Cut(key, "("+name+" #")
	_, after, _ = strings.Cut(after, "#")
	return before + "(" + name + " #" + hex + "#" + after
}

func TestSignHost(t *testing.T) {
	k := signingKey(t, eccSecret, "")
	for host, ok := range map[string]bool{
		"": true, "host.example.org": true, "Rechner im Büro": true,
		"a;b": false, "a\nb": false, "a\r": false, "\x00": false, "\xff": false, "\u0085": false,
	} {
		field, err := k.Sign([32]byte{}, host)
		if (err == nil) != ok {
			t.Errorf("host %q: %v", host, err)
		}
		if again, _ := Signer(field); ok && again != host {
			t.Errorf("host %q: read back as %q", host, again)
		}
	}
}

func BenchmarkSign(b *testing.B) {
	k := GenerateSigningKey()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := k.Sign([32]byte{}, "localhost"); err != nil {
			b.Fatal(err)
		}
	}
}
