// SPDX-License-Identifier: GPL-3.0-or-later

package narinfo_test

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

func TestParseHello(t *testing.T) {
	n := parse(t, hello)
	if n.StorePath != helloPath || n.NarHash != helloHash || n.NarSize != 120 || n.Signature != helloSignature ||
		n.NarDigest != sha256.Sum256(helloNar()) || n.References == nil || len(n.References) != 0 || n.Deriver != "" || n.ERIS != nil {
		t.Errorf("Parse = %+v", n)
	}
	want := []narinfo.URL{
		{"nar/gzip/9bad6mqc3ygqsf9g926syc6r4z7b5pgl-hello", "gzip", 99, true},
		{"nar/9bad6mqc3ygqsf9g926syc6r4z7b5pgl-hello", "none", 120, true},
	}
	if !reflect.DeepEqual(n.URLs, want) {
		t.Errorf("URLs = %v, want %v", n.URLs, want)
	}
	if signed, ok := n.SignedText(); !ok || signed != helloSigned || n.Text() != hello {
		t.Errorf("Text = %q, SignedText = %q, %v", n.Text(), signed, ok)
	}
}

const deltaBase = "9bad6mqc3ygqsf9g926syc6r4z7b5pgl-hello-1"

func TestParseLibchop(t *testing.T) {
	n := parse(t, read(t, "../testdata/libchop/60m6qih391rq95ck64am8ir64z0sv0zr.narinfo"))
	want := []narinfo.ERIS{{
		URN:    "urn:eris:BIARSURIJ3WYLEINE6W5ZF7LKTIHL42AE367TQ355ORW5UZVSTQGT5H5T2OLKF7XICML3VHLTLMDWXLUCQVKHRKNVREV3GMVX3J5RMT4GU",
		Signed: true,
	}}
	if !reflect.DeepEqual(n.ERIS, want) || n.Deriver != "zcly5fm6rsqis9csk33i7zfqjidjzy1a-libchop-0.5.2.drv" || n.NarSize != 1021984 ||
		len(n.References) != 14 || n.References[3] != "60m6qih391rq95ck64am8ir64z0sv0zr-libchop-0.5.2" {
		t.Errorf("Parse = %+v", n)
	}
}

// helloNar returns the nar of a file that contains "hello" and a line feed.
func helloNar() []byte {
	var nar []byte
	for _, s := range []string{"nix-archive-1", "(", "type", "regular", "contents", "hello\n", ")"} {
		nar = binary.LittleEndian.AppendUint64(nar, uint64(len(s)))
		nar = append(nar, s...)
		nar = append(nar, make([]byte, -len(s)&7)...)
	}
	return nar
}

// edit returns text with each of the pairs of strings replaced, the first once.
func edit(t testing.TB, text string, oldNew ...string) string {
	t.Helper()
	for i := 0; i < len(oldNew); i += 2 {
		if !strings.Contains(text, oldNew[i]) {
			t.Fatalf("%q is not in the text", oldNew[i])
		}
		text = strings.Replace(text, oldNew[i], oldNew[i+1], 1)
	}
	return text
}

func TestParseAccepts(t *testing.T) {
	a, b := strings.Repeat("a", 32)+"-a", strings.Repeat("b", 32)+"-b"
	storePath := func(n *narinfo.Narinfo) any { return n.StorePath }
	narSize := func(n *narinfo.Narinfo) any { return n.NarSize }
	deriver := func(n *narinfo.Narinfo) any { return n.Deriver }
	references := func(n *narinfo.Narinfo) any { return n.References }
	urls := func(n *narinfo.Narinfo) any { return n.URLs }
	eris := func(n *narinfo.Narinfo) any { return n.ERIS }
	for _, tt := range []struct {
		name, text string
		// what shows what is to be checked of the result, want what it must be.
		what func(*narinfo.Narinfo) any
		want any
	}{
		{"empty lines and comments first", "\n\n# one\n\n#two\n" + hello, storePath, helloPath},
		{"no line feed at the end", strings.TrimSuffix(hello, "\n"),
			func(n *narinfo.Narinfo) any { return n.URLs[1].FileSize }, uint64(120)},
		{"no white space after the colon", edit(t, hello, "NarSize: ", "NarSize:"), narSize, uint64(120)},
		{"much white space after the colon", edit(t, hello, "NarSize: ", "NarSize: \t\v\f\u00a0\u2003 "), narSize, uint64(120)},
		{"an empty line ends the record", hello + "\nThis is not read.\nURL: x\nCompression: none\n",
			func(n *narinfo.Narinfo) any { return len(n.URLs) }, 2},
		{"the first of several counts", hello + "StorePath: /x\nNarHash: y\nNarSize: z\nReferences: !\nDeriver: " + a + "\nDeriver: " + b + "\nSignature: no\n",
			func(n *narinfo.Narinfo) any { return []any{n.NarSize, n.Signature, n.Deriver} }, []any{uint64(120), helloSignature, a}},
		{"an empty Deriver counts as the first", hello + "Deriver:\nDeriver: " + a + "\n", deriver, ""},
		{"an invalid Deriver is unknown", hello + "Deriver: /gnu/store/" + a + "\n", deriver, ""},
		{"continued references", edit(t, hello, "References: \n", "References: "+a+"\n+ "+b+"\n# comment\n+"+a+"\n"), references, []string{a, b, a}},
		{"continued unknown field", "Comment: x\n+y\n+\n+ \n" + hello, storePath, helloPath},
		{"continuation keeps white space", edit(t, hello, "NarSize", "ERIS: a\n+  b \n+c\nNarSize"),
			func(n *narinfo.Narinfo) any { return n.ERIS[0].URN }, "a\n b \nc"},
		{"unknown fields, also with odd names", "%x: y\nStore Path:z\nstorepath: no\nélan: vital\n" + hello, storePath, helloPath},
		{"the largest size", edit(t, hello, "120", "18446744073709551615"), narSize, uint64(math.MaxUint64)},
		{"Compression and FileSize before URL", helloSigned + "Compression: xz\nFileSize: 1\nURL: a\nFileSize: 2\nFileHash: x\nCompression: none\nURL: b\n", urls, []narinfo.URL{{"a", "xz", 1, true}, {"b", "none", 2, true}}},
		{"fields by their kind", helloSigned + "URL: a\nURL: b\nFileSize: 1\nFileSize: -2\nCompression: xz\nERIS: u\nCompression: none\n", urls, []narinfo.URL{{"a", "xz", 1, true}, {"b", "none", 0, false}}},
		{"sizes of some URLs", helloSigned + "FileSize: 1\nURL: a\nCompression: gzip\nURL: b\nCompression: none\nFileSize: 2\nURL: c\nCompression: zstd\nFileSize: -1\nFileSize: 3\nFileSize: 4\n", urls, []narinfo.URL{{"a", "gzip", 0, false}, {"b", "none", 2, true}, {"c", "zstd", 3, true}}},
		{"fewer compressions than URLs", helloSigned + "URL: a\nURL: b\nCompression: gzip\n\nCompression: none\n", urls, []narinfo.URL{{"a", "gzip", 0, false}, {"b", "", 0, false}}},
		{"more compressions than URLs", helloSigned + "Compression: gzip\nURL: a\nCompression: none\nCompression: none\n", urls, []narinfo.URL{{"a", "gzip", 0, false}}},
		{"a URL that cannot be used beside one that can", hello + "URL: a b\nCompression: none\nURL: x\nCompression: brotli\nURL:\nCompression: none\n",
			func(n *narinfo.Narinfo) any { return len(n.PreferredURLs()) }, 2},
		{"any ERIS value", edit(t, hello, "NarSize", "ERIS: urn:erisx2:AAAA\nERIS:\nNarSize"), eris, []narinfo.ERIS{{URN: "urn:erisx2:AAAA", Signed: true}, {Signed: true}}},
		{"ERIS values that say the form, or not quite", edit(t, hello, "NarSize", "ERIS: u nar.zstd 7\nERIS: u nar.zstd\nERIS: u nar.zstd -7\nERIS: u  7\nNarSize"), eris, []narinfo.ERIS{
			{URN: "u", Form: "nar.zstd", Size: 7, Signed: true}, {URN: "u nar.zstd", Signed: true}, {URN: "u nar.zstd -7", Signed: true}, {URN: "u  7", Signed: true}}},
		{"deltas, also such that make no sense", hello + "Delta: " + deltaBase + " 7 delta/x\n" +
			"Delta: ../x 7 y\nDelta: " + deltaBase + " 0 y\nDelta: " + deltaBase + " -7 y\nDelta: " + deltaBase + " 9223372036854775808 y\nDelta: " + deltaBase + " 7 \n" +
			"Delta: " + deltaBase + " 7 y z\nDelta: " + deltaBase + " 7 \x01\nDelta: " + deltaBase + " 7 " + strings.Repeat("x", 4097) + "\nDelta: " + deltaBase + " 9 urn:eris:A",
			func(n *narinfo.Narinfo) any { return n.Deltas }, []narinfo.Delta{{Base: deltaBase, Size: 7, URL: "delta/x"}, {Base: deltaBase, Size: 9, URL: "urn:eris:A"}}},
		{"too many deltas", hello + strings.Repeat("Delta: "+deltaBase+" 7 x\n", 1000),
			func(n *narinfo.Narinfo) any { return len(n.Deltas) }, 16},
		{"a signed delta", edit(t, hello, "NarSize", "Delta: "+deltaBase+" 7 x\nNarSize"),
			func(n *narinfo.Narinfo) any { return n.Deltas[0].Signed }, true},
		{"no NarSize", edit(t, hello, "NarSize", "X"),
			func(n *narinfo.Narinfo) any { return []any{n.NarSize, n.NarSizeKnown} }, []any{uint64(0), false}},
		{"references without a hash", edit(t, hello, "References: ", "References: bar baz"), references, []string{"bar", "baz"}},
		{"too many ERIS values", hello + strings.Repeat("ERIS: x\n", 1000),
			func(n *narinfo.Narinfo) any { return len(n.ERIS) }, 16},
	} {
		if got := tt.what(parse(t, tt.text)); !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: got %#v, want %#v", tt.name, got, tt.want)
		}
	}
}

func TestParseRejects(t *testing.T) {
	a := strings.Repeat("a", 32) + "-a"
	for _, tt := range []struct {
		name, text, want string
	}{
		{"nothing", "", "no field StorePath"},
		{"empty lines", "\n\n\n", "no field StorePath"},
		{"no StorePath", edit(t, hello, "StorePath", "X"), "no field StorePath"},
		{"no References", edit(t, hello, "References: \n", ""), "no field References"},
		{"no URL", helloSigned + "Signature: " + helloSignature + "\n", "no field URL"},
		{"a record ends too early", "\nX: y\n\n" + hello, "no field StorePath"},
		{"no supported compression", edit(t, hello, "gzip\n", "brotli\n", "none\n", "None\n"), "no well-formed URL"},
		{"no compression", edit(t, hello, "Compression: gzip\n", "", "Compression: none\n", ""), "no well-formed URL"},
		{"carriage returns", strings.ReplaceAll(hello, "\n", "\r\n"), "field StorePath in line 1"},
		{"no colon", hello + "Deriver\n", `line 12: "Deriver" has no colon`},
		{"no field", hello + " URL: x\n", `line 12: " URL: x" is neither`},
		{"a digit", "1: x\n" + hello, `line 1: "1: x" is neither`},
		{"a letter of no case", "中: x\n" + hello, "line 1"},
		{"a line of a carriage return", hello + "\r\n", `line 12: "\r" is neither`},
		{"control characters are quoted", hello + "\x1b[2J\n", `"\x1b[2J"`},
		{"long lines are cut", hello + strings.Repeat("!", 1000) + "\n", `!!!" is neither`},
		{"nothing to continue", "+ x\n" + hello, "line 1: it continues"},
		{"nothing but a comment to continue", "# x\n+ x\n" + hello, "line 2: it continues"},
		{"not UTF-8", hello + "# \xff\n", "UTF-8"},
		{"not UTF-8 after the record", hello + "\n\xff\n", "UTF-8"},
		{"relative StorePath", edit(t, hello, "/gnu", "gnu"), "not an absolute file name"},
		{"StorePath in no directory", edit(t, hello, "/gnu/store/", ""), "not an absolute file name"},
		{"StorePath at the root", edit(t, hello, "/gnu/store/", "/"), "not an absolute file name"},
		{"StorePath of no item", edit(t, hello, "9bad6mqc3", "eeeeeeeee"), `'e' at offset 0`},
		{"StorePath with a blank at the end", edit(t, hello, helloPath, helloPath+" "), "0x20"},
		{"empty StorePath", edit(t, hello, helloPath, ""), "not an absolute file name"},
		{"NarSize negative", edit(t, hello, "120", "-120"), "not a decimal number"},
		{"NarSize signed", edit(t, hello, "120", "+120"), "not a decimal number"},
		{"NarSize in hexadecimal", edit(t, hello, "120", "0x78"), "not a decimal number"},
		{"NarSize fractional", edit(t, hello, "120", "120.0"), "not a decimal number"},
		{"NarSize too large", edit(t, hello, "120", "18446744073709551616"), "not a decimal number"},
		{"NarSize empty", edit(t, hello, "120", ""), "not a decimal number"},
		{"NarSize with white space", edit(t, hello, "120", "120 "), "not a decimal number"},
		{"References with a directory", edit(t, hello, "References: ", "References: "+a+" /gnu/store/"+a), "not the name of a store item"},
		{"References that begin with a period", edit(t, hello, "References: ", "References: .x"), "begins with a period"},
		{"References that are too long", edit(t, hello, "References: ", "References: "+strings.Repeat("x", 256)), "longer than 255 bytes"},
		{"References that climb", edit(t, hello, "References: ", "References: "+a+"/../x"), "0x2f"},
		{"References with a control character", edit(t, hello, "References: ", "References: "+a+"\x01"), "0x01"},
		{"References continued by a signature", helloSigned + "+ Signature: " + a + "\n" + helloURLs, "References"},
		{"References that do not end their line", strings.TrimSuffix(helloSigned, "\n") + sign(t, strings.TrimSuffix(helloSigned, "\n")) + helloURLs, "References"},
		{"too many references", edit(t, hello, "References: ", "References: "+strings.Repeat(a+" ", narinfo.MaxReferences+1)), "16385 references"},
		{"too many URLs", hello + strings.Repeat("URL: x\n", narinfo.MaxURLs), "more than 64 URLs"},
		{"too long", hello + "#" + strings.Repeat("x", narinfo.MaxSize), "exceed the limit"},
	} {
		_, err := narinfo.Parse([]byte(tt.text))
		wantError(t, tt.name, err, tt.want)
		if err != nil && len(err.Error()) > 400 {
			t.Errorf("%s: the error has %d bytes", tt.name, len(err.Error()))
		}
	}
}

func TestCheckHash(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"as usual", hello, ""},
		{"missing", edit(t, hello, "NarHash", "X"), "no field NarHash"},
		{"hexadecimal", edit(t, hello, helloHash, "sha256:"+strings.Repeat("0", 64)), "hexadecimal"},
		{"another kind", edit(t, hello, "sha256:", "sha512:"), `does not start with "sha256:"`},
		{"too short", edit(t, hello, helloHash, helloHash[:58]), "51 digits"},
		{"excess bits", edit(t, hello, "sha256:04", "sha256:z4"), "excess bits"},
		{"white space", edit(t, hello, helloHash, helloHash+" "), "53 digits"},
	} {
		wantError(t, tt.name, parse(t, tt.text).CheckHash(), tt.want)
	}
}

// TestParseBounds checks that texts at the limits are accepted, and in time that is proportional to
// their length.
func TestParseBounds(t *testing.T) {
	a := strings.Repeat("a", 32) + "-a"
	n := parse(t, edit(t, hello, "References: ", "References: "+strings.Repeat(a+" ", narinfo.MaxReferences)))
	m := parse(t, helloSigned+strings.Repeat("URL: x\nCompression: none\n", narinfo.MaxURLs))
	if len(n.References) != narinfo.MaxReferences || len(m.URLs) != narinfo.MaxURLs {
		t.Errorf("%d references and %d URLs", len(n.References), len(m.URLs))
	}
	rest := narinfo.MaxSize - len(hello)
	parse(t, hello+strings.Repeat("\n", rest))
	parse(t, hello+strings.Repeat("+\n", rest/2))
	parse(t, hello+strings.Repeat("#\n", rest/2))
	parse(t, hello+strings.Repeat("ERIS:\n", rest/6))
}

func TestParseKeepsNothing(t *testing.T) {
	text := []byte(hello)
	n, err := narinfo.Parse(text)
	must(t, err)
	clear(text)
	if n.StorePath != helloPath || n.Text() != hello {
		t.Errorf("the narinfo changed with the text: %+v", n)
	}
}

func ExampleParse() {
	n, err := narinfo.Parse([]byte(hello))
	if err != nil {
		fmt.Println(err)
		return
	}
	if err := n.CheckItem("/gnu/store", helloPath); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(n.NarHash, n.PreferredURLs()[0].URL)
	// Output: sha256:04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw nar/9bad6mqc3ygqsf9g926syc6r4z7b5pgl-hello
}

var must, wantError = testhelp.Must, testhelp.WantError

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

func wantIs(t *testing.T, err, target error) {
	t.Helper()
	if !errors.Is(err, target) {
		t.Errorf("error %v, want %v", err, target)
	}
}
