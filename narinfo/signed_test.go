// SPDX-License-Identifier: GPL-3.0-or-later

package narinfo_test

import (
	"cmp"
	"crypto/sha256"
	"reflect"
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

func TestRealNarinfosAreAuthorised(t *testing.T) {
	for name, x := range realNarinfos(t) {
		t.Run(name, func(t *testing.T) {
			n := parse(t, x[0])
			keys := parseACL(t, x[1])
			must(t, n.Authorise(keys))
			wantIs(t, n.Authorise(acl.NewACL()), acl.ErrUnauthorisedKey)
			must(t, n.CheckItem("/gnu/store", n.StorePath))

			// Any change in the signed part is found out.
			signed, _ := n.SignedText()
			for i := 0; i < len(signed); i += 7 {
				b := []byte(x[0])
				b[i] ^= 1
				if m, err := narinfo.Parse(b); err == nil && m.Authorise(keys) == nil {
					t.Errorf("authorised after a change at offset %d", i)
				}
			}
		})
	}
}

// testKey is a fresh pair of keys, and testACL authorises it.
var (
	testKey = acl.GenerateSigningKey()
	testACL = acl.NewACL(testKey.PublicKey())
)

// sign returns the line that signs the text.
func sign(t testing.TB, text string) string {
	t.Helper()
	s, err := testKey.Sign(sha256.Sum256([]byte(text)), "localhost")
	must(t, err)
	return "Signature: " + s + "\n"
}

// TestSignatureCoverage is about what a signature is taken to cover, above all where the text
// around it was written by somebody else.
func TestSignatureCoverage(t *testing.T) {
	const evil = "/gnu/store/00000000000000000000000000000000-evil"
	minimal := edit(t, helloSigned, "NarSize: 120\n", "")
	drv := strings.Repeat("d", 32) + "-d.drv"
	early := strings.Split(helloSigned, "References")[0] + "ERIS: a\n"

	type values struct { // what is not said is as in hello
		storePath  string
		narSize    uint64
		deriver    string
		erisSigned []bool
		references int
	}
	for _, tt := range []struct {
		name, text string
		want       values
		err        error // nil if authorised
	}{
		{"all above the signature", helloSigned + "Deriver: " + drv + "\n" + sign(t, helloSigned+"Deriver: "+drv+"\n") + helloURLs, values{deriver: drv}, nil},
		{"URLs above the signature", helloSigned + helloURLs + sign(t, helloSigned+helloURLs), values{}, nil},
		{"NarSize and Deriver below", minimal + sign(t, minimal) + "NarSize: 7\nDeriver: " + drv + "\n" + helloURLs, values{narSize: 7, deriver: drv}, nil},
		{"duplicates below do not count", helloSigned + sign(t, helloSigned) + "StorePath: " + evil + "\nNarSize: 7\nReferences: " + drv + "\nSignature: x\n" + helloURLs, values{}, nil},
		{"an invalid Deriver above is not replaced by one below", helloSigned + "Deriver: unknown-deriver\n" + sign(t, helloSigned+"Deriver: unknown-deriver\n") + "Deriver: " + drv + "\n" + helloURLs, values{}, nil},
		{"ERIS above and below", helloSigned + "ERIS: a\n" + sign(t, helloSigned+"ERIS: a\n") + "ERIS: b\n" + helloURLs, values{erisSigned: []bool{true, false}}, nil},
		{"a continuation below continues the signature", helloSigned + sign(t, helloSigned) + "+ " + drv + "\n" + helloURLs, values{}, acl.ErrCorruptSignature},
		{"a continuation above is signed", helloSigned + "+ " + drv + "\n" + sign(t, helloSigned+"+ "+drv+"\n") + helloURLs, values{references: 1}, nil},
		{"empty lines and comments above are signed", "\n# x\n" + helloSigned + sign(t, "\n# x\n"+helloSigned) + helloURLs, values{}, nil},
		{"empty lines above are not signed", "\n\n" + helloSigned + sign(t, helloSigned) + helloURLs, values{}, acl.ErrHashMismatch},
		{"StorePath put before the signed text", "StorePath: " + evil + "\n" + helloSigned + sign(t, helloSigned) + helloURLs, values{storePath: evil}, acl.ErrHashMismatch},

		{"no signature", helloSigned + helloURLs, values{}, narinfo.ErrUnsigned},
		{"no signature, but ERIS", helloSigned + "ERIS: a\n" + helloURLs, values{erisSigned: []bool{false}}, narinfo.ErrUnsigned},
		{"the signature comes first and signs nothing", sign(t, "") + helloSigned + helloURLs, values{}, narinfo.ErrUnsigned},
		{"the signature comes before NarHash", "StorePath: " + helloPath + "\n" + sign(t, "StorePath: "+helloPath+"\n") + strings.SplitN(helloSigned, "\n", 2)[1] + helloURLs, values{}, narinfo.ErrUnsigned},
		{"the signature comes before References", early + sign(t, early) + "References: " + drv + "\n" + helloURLs, values{erisSigned: []bool{false}, references: 1}, narinfo.ErrUnsigned},
		{"the word stands in a comment before the field", helloSigned + "# Signature: see below\n" + sign(t, helloSigned+"# ") + helloURLs, values{}, narinfo.ErrUnsigned},
		{"the word stands in a value before the field", helloSigned + "Note: Signature: see below\n" + sign(t, helloSigned+"Note: ") + helloURLs, values{}, narinfo.ErrUnsigned},
		{"the word ends the name of another field", helloSigned + "X-" + sign(t, helloSigned+"X-") + sign(t, helloSigned+"X-") + helloURLs, values{}, narinfo.ErrUnsigned},
		{"the field follows the end of the record", helloSigned + helloURLs + "\n" + sign(t, helloSigned+helloURLs+"\n"), values{}, narinfo.ErrUnsigned},
		{"the signed text does not end its last line", helloSigned + "Note: " + sign(t, helloSigned+"Note: ") + helloURLs, values{}, narinfo.ErrUnsigned},
		{"a signature for another text", helloSigned + sign(t, helloSigned+"x") + helloURLs, values{}, acl.ErrHashMismatch},
		{"another version", helloSigned + strings.Replace(sign(t, helloSigned), "1;", "2;", 1) + helloURLs, values{}, acl.ErrUnsupportedVersion},
		{"a carriage return after the signature", helloSigned + strings.TrimSuffix(sign(t, helloSigned), "\n") + "\r\n" + helloURLs, values{}, acl.ErrCorruptSignature},
		{"an empty signature", helloSigned + "Signature:\n" + helloURLs, values{}, acl.ErrCorruptSignature},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n, want := parse(t, tt.text), tt.want
			want.storePath, want.narSize = cmp.Or(want.storePath, helloPath), cmp.Or(want.narSize, 120)
			got := values{n.StorePath, n.NarSize, n.Deriver, nil, len(n.References)}
			for _, e := range n.ERIS {
				got.erisSigned = append(got.erisSigned, e.Signed)
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got %+v, want %+v", got, want)
			}
			wantIs(t, n.Authorise(testACL), tt.err)
			signed, ok := n.SignedText()
			if ok != (tt.err != narinfo.ErrUnsigned) || !ok && signed != "" {
				t.Errorf("SignedText = %q, %v", signed, ok)
			}
		})
	}
}

func TestEquivalent(t *testing.T) {
	a, b := strings.Repeat("a", 32)+"-a", strings.Repeat("b", 32)+"-b"
	base := edit(t, hello, "References: ", "References: "+a+" "+b)
	for _, tt := range []struct {
		name, text string
		want       bool
	}{
		{"itself", base, true},
		{"unsigned, elsewhere, otherwise compressed", edit(t, base, "Signature: "+helloSignature+"\n"+helloURLs, "Deriver: "+a+"\nURL: http://example.org/x\nCompression: zstd\nERIS: x\n"), true},
		{"fields in another order", "References: " + a + "  " + b + "\n" + edit(t, base, "References", "X"), true},
		{"another path", edit(t, base, "-hello", "-hallo"), false},
		{"another hash", edit(t, base, "sha256:0", "sha256:1"), false},
		{"another size", edit(t, base, "120", "121"), false},
		{"other references", edit(t, base, a+" "+b, a), false},
		{"references in another order", edit(t, base, a+" "+b, b+" "+a), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n, m := parse(t, base), parse(t, tt.text)
			if narinfo.Equivalent(n, m) != tt.want || narinfo.Equivalent(m, n) != tt.want {
				t.Errorf("Equivalent = %v, %v, want %v", narinfo.Equivalent(n, m), narinfo.Equivalent(m, n), tt.want)
			}
		})
	}
}

// BenchmarkParseAndAuthorise is what looking up one store item costs.
func BenchmarkParseAndAuthorise(b *testing.B) {
	text := []byte(read(b, "../testdata/libchop/60m6qih391rq95ck64am8ir64z0sv0zr.narinfo"))
	keys := parseACL(b, read(b, "../testdata/libchop/acl"))
	b.SetBytes(int64(len(text)))
	b.ReportAllocs()
	for b.Loop() {
		n, err := narinfo.Parse(text)
		must(b, err)
		must(b, n.Authorise(keys))
	}
}
