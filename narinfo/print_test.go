// SPDX-License-Identifier: GPL-3.0-or-later

package narinfo_test

import (
	"crypto/sha256"
	"slices"
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// TestPrintReal checks that what `guix publish` wrote is printed again byte for byte, the field
// ERIS included.
func TestPrintReal(t *testing.T) {
	for name, x := range realNarinfos(t) {
		t.Run(name, func(t *testing.T) {
			n := parse(t, x[0])
			signed, err := narinfo.SignedPart(n)
			must(t, err)
			text, err := narinfo.Text(signed, n.Signature, n.URLs)
			must(t, err)
			if text != x[0] {
				t.Errorf("printed\n%s\nwant\n%s", text, x[0])
			}
		})
	}
}

func TestPrintSignParse(t *testing.T) {
	n := &narinfo.Narinfo{
		StorePath:  helloPath,
		NarDigest:  sha256.Sum256(helloNar()),
		NarSize:    120,
		ERIS:       []narinfo.ERIS{{URN: "urn:eris:A"}, {URN: "urn:eris:B", Form: "nar.zstd", Size: 77}},
		References: []string{strings.Repeat("a", 32) + "-a", "9bad6mqc3ygqsf9g926syc6r4z7b5pgl-hello"},
		Deriver:    strings.Repeat("d", 32) + "-hello.drv",
	}
	signed, err := narinfo.SignedPart(n)
	must(t, err)
	if want := "StorePath: " + helloPath + "\nNarHash: " + helloHash + "\nNarSize: 120\nERIS: urn:eris:A\nERIS: urn:eris:B nar.zstd 77\nReferences: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-a 9bad6mqc3ygqsf9g926syc6r4z7b5pgl-hello\nDeriver: dddddddddddddddddddddddddddddddd-hello.drv\n"; signed != want {
		t.Errorf("SignedPart = %q, want %q", signed, want)
	}
	urls := []narinfo.URL{{URL: "nar/x", Compression: "none", FileSize: 120, SizeKnown: true}, {URL: "nar/zstd/x", Compression: "zstd"}}
	signature, err := testKey.Sign(sha256.Sum256([]byte(signed)), "localhost")
	must(t, err)
	text, err := narinfo.Text(signed, signature, urls)
	must(t, err)
	m := parse(t, text)
	must(t, m.Authorise(testACL))
	if !slices.Equal(m.References, n.References) || m.Deriver != n.Deriver || !slices.Equal(m.URLs, urls) ||
		!slices.Equal(m.ERIS, []narinfo.ERIS{{URN: "urn:eris:A", Signed: true}, {URN: "urn:eris:B", Form: "nar.zstd", Size: 77, Signed: true}}) {
		t.Errorf("read back %+v", m)
	}

	text, err = narinfo.Text(signed, "", urls)
	must(t, err)
	if m := parse(t, text); !narinfo.Equivalent(m, parse(t, text)) || m.Signature != "" || m.ERIS[0].Signed {
		t.Errorf("without a signature: %+v", m)
	}
}

func TestPrintRejects(t *testing.T) {
	drv := strings.Repeat("d", 32) + "-d.drv"
	for _, tt := range []struct {
		name   string
		change func(*narinfo.Narinfo)
		want   string
	}{
		{"no path", func(n *narinfo.Narinfo) { n.StorePath = "" }, "not an absolute file name"},
		{"a line feed in the directory", func(n *narinfo.Narinfo) { n.StorePath = strings.Replace(helloPath, "gnu", "g\nu", 1) }, "not an absolute file name"},
		{"the word in the directory", func(n *narinfo.Narinfo) { n.StorePath = strings.Replace(helloPath, "gnu", "Signature:", 1) }, "must not contain"},
		{"an invalid name", func(n *narinfo.Narinfo) { n.StorePath += " " }, "0x20"},
		{"two hashes", func(n *narinfo.Narinfo) { n.NarDigest[0] ^= 1 }, "the hash is both"},
		{"an invalid reference", func(n *narinfo.Narinfo) { n.References = []string{drv, "x"} }, "too short"},
		{"too many references", func(n *narinfo.Narinfo) {
			n.References = slices.Repeat([]string{drv}, narinfo.MaxReferences+1)
		}, "too many"},
		{"a full Deriver", func(n *narinfo.Narinfo) { n.Deriver = "/gnu/store/" + drv }, "not the name of a store item"},
		{"an empty ERIS", func(n *narinfo.Narinfo) { n.ERIS = []narinfo.ERIS{{}} }, "not a URN"},
		{"a line feed in ERIS", func(n *narinfo.Narinfo) { n.ERIS = []narinfo.ERIS{{URN: "urn:eris:A\nX: y"}} }, "not a URN"},
		{"the word in ERIS", func(n *narinfo.Narinfo) { n.ERIS = []narinfo.ERIS{{URN: "Signature:"}} }, "not a URN"},
		{"too many ERIS", func(n *narinfo.Narinfo) { n.ERIS = slices.Repeat([]narinfo.ERIS{{URN: "urn:eris:A"}}, 17) }, "too many"},
	} {
		n := parse(t, hello)
		tt.change(n)
		_, err := narinfo.SignedPart(n)
		wantError(t, tt.name, err, tt.want)
	}

	urls := parse(t, hello).URLs
	for _, tt := range []struct {
		name, signed, signature string
		urls                    []narinfo.URL
		want                    string
	}{
		{"no URLs", helloSigned, helloSignature, nil, "no field URL"},
		{"a URL that cannot be used", helloSigned, helloSignature, []narinfo.URL{{URL: "a\nb", Compression: "none"}}, "cannot be used"},
		{"a compression that is not supported", helloSigned, helloSignature, append(slices.Clone(urls), narinfo.URL{URL: "x"}), "cannot be used"},
		{"a signature of two lines", helloSigned, helloSignature + "\nX: y", urls, "would not cover"},
		{"a signature that starts with a blank", helloSigned, " " + helloSignature, urls, "would not cover"},
		{"no line feed at the end", strings.TrimSuffix(helloSigned, "\n"), helloSignature, urls, "does not end with a line feed"},
		{"a signature in the part to be signed", helloSigned + "Signature: x\n", helloSignature, urls, "would not cover"},
		{"a signature in the part not to be signed", helloSigned + "Signature: x\n", "", urls, "would not cover"},
		{"an incomplete part", edit(t, helloSigned, "References: \n", ""), helloSignature, urls, "no field References"},
		{"the end of the record in the part", helloSigned + "\n", helloSignature, urls, "no field URL"},
	} {
		_, err := narinfo.Text(tt.signed, tt.signature, tt.urls)
		wantError(t, tt.name, err, tt.want)
	}
}
