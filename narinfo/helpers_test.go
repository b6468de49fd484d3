// SPDX-License-Identifier: GPL-3.0-or-later

package narinfo_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// must ends the test if there is an error.
func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

const (
	helloPath = "/gnu/store/9bad6mqc3ygqsf9g926syc6r4z7b5pgl-hello"
	helloHash = "sha256:04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw"

	// hello is a narinfo that Libgcrypt signed with a key that was thrown away, and helloACL
	// authorises the key.
	helloSigned = "StorePath: " + helloPath + `
NarHash: ` + helloHash + `
NarSize: 120
References: ` + `
`
	helloSignature = "1;example.org;KHNpZ25hdHVyZSAKIChkYXRhIAogIChmbGFncyByZmM2OTc5KQogIChoYXNoIHNoYTI1NiAjRENEMUIzN0Y5MDZFREY4NTI2MEIxMUZFMDcwQzE1MjA0QjZCRDlFODY5MUE3Njg3NThGMDU1MzQ1QTMxMUQ0OCMpCiAgKQogKHNpZy12YWwgCiAgKGVjZHNhIAogICAociAjMDcyOTIyQkNEMzY4QThCQjkzMjdGOERCRDUxOTJGNEVCNTk0QTQ0QTg4RDdGQ0FBMTI3NjI5MDZEMThEQjYzMyMpCiAgIChzICMwNDk0MDIxMkRBMjJDMDM5QzlEOTMyOTVENjJDRDlDNTFFQUQ0N0QzOEJFNzNBRkQ1RkI5OTRGRjIxN0EzQTYzIykKICAgKQogICkKIChwdWJsaWMta2V5IAogIChlY2MgCiAgIChjdXJ2ZSBFZDI1NTE5KQogICAocSAjQjYzNzVEQjhGMEE3MzFFMTc3MzdFQjhCQTVCNkFBNEE1NzgzNjQ3NTg5MUE1NzNGOThEQzcyQUZENjI1NUQ0NCMpCiAgICkKICApCiApCg=="
	helloURLs      = `URL: nar/gzip/9bad6mqc3ygqsf9g926syc6r4z7b5pgl-hello
Compression: gzip
FileSize: 99
URL: nar/9bad6mqc3ygqsf9g926syc6r4z7b5pgl-hello
Compression: none
FileSize: 120
`
	hello    = helloSigned + "Signature: " + helloSignature + "\n" + helloURLs
	helloACL = `(acl (entry (public-key (ecc (curve Ed25519)
 (q #B6375DB8F0A731E17737EB8BA5B6AA4A57836475891A573F98DC72AFD6255D44#))) (tag (guix import))))`
)

func parse(t testing.TB, text string) *narinfo.Narinfo {
	t.Helper()
	n, err := narinfo.Parse([]byte(text))
	if err != nil {
		t.Fatalf("Parse: %v\n%s", err, text)
	}
	return n
}

func parseACL(t testing.TB, text string) *acl.ACL {
	t.Helper()
	a, err := acl.ParseACL([]byte(text))
	must(t, err)
	return a
}

func read(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	must(t, err)
	return string(b)
}

// realNarinfos returns the texts of the narinfos that other programs made, and with each the ACL
// that authorises it.
func realNarinfos(t testing.TB) map[string][2]string {
	t.Helper()
	texts := map[string][2]string{"hello": {hello, helloACL}}
	for _, dir := range []string{"guix-mirror/all", "libchop"} {
		names, err := filepath.Glob(filepath.Join("..", "testdata", dir, "*.narinfo"))
		if err != nil || len(names) == 0 {
			t.Fatalf("no narinfos in %s (%v)", dir, err)
		}
		list := read(t, filepath.Join("..", "testdata", strings.TrimSuffix(dir, "/all"), "acl"))
		for _, name := range names {
			texts[filepath.Base(name)] = [2]string{read(t, name), list}
		}
	}
	return texts
}

// wantError fails the test unless err says what.
func wantError(t *testing.T, err error, what string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, want one that says %q", what)
	} else if !strings.Contains(err.Error(), what) {
		t.Errorf("error %q does not say %q", err, what)
	}
}

func wantIs(t *testing.T, err, target error) {
	t.Helper()
	if !errors.Is(err, target) {
		t.Errorf("error %v, want %v", err, target)
	}
}
