// SPDX-License-Identifier: GPL-3.0-or-later

package acl_test

import (
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
)

func TestParseSexp(t *testing.T) {
	for _, tt := range []struct {
		in, canonical, printed string
	}{
		// The last two columns are what Libgcrypt 1.10.1 makes of the first.
		{"(a)", "(1:a)", "(a)\n"},
		{" \t\r\n\v\f(\n a\t)", "(1:a)", "(a)\n"},
		{"(a) text after the list )", "(1:a)", "(a)\n"},
		{"(a ())", "(1:a())", "(a \n ()\n )\n"},
		{"(())", "(())", "(\n ()\n )\n"},
		{"((a)(b) c)", "((1:a)(1:b)1:c)", "(\n (a)\n (b)\n c)\n"},
		{"(a(b c(d))e)", "(1:a(1:b1:c(1:d))1:e)", "(a \n (b c \n  (d)\n  )\n e)\n"},
		{"(-a .b /c _d :e *f +g =h)", "(2:-a2:.b2:/c2:_d2::e2:*f2:+g2:=h)", "(-a .b /c _d :e *f +g =h)\n"},
		{"(a1-2)", "(4:a1-2)", "(a1-2)\n"},
		{`(a"b"#63#|ZA==|1:e)`, "(1:a1:b1:c1:d1:e)", "(a b c d e)\n"},
		{`("")`, "(0:)", "(\"\")\n"},
		{`(##)`, "(0:)", "(\"\")\n"},
		{`("\b\t\v\n\f\r\"\'\\")`, "(9:\b\t\v\n\f\r\"'\\)", "(\"\\b\\t\\v\\n\\f\\r\\\"\\'\\\\\")\n"},
		{`("\101\x42\x4f\377")`, "(4:ABO\xff)", "(#41424FFF#)\n"},
		{"(\"a\n)b\")", "(4:a\n)b)", "(\"a\\n)b\")\n"},
		{"(#6 1\n6\t2#)", "(2:ab)", "(ab)\n"},
		{"(#aAfF#)", "(2:\xaa\xff)", "(#AAFF#)\n"},
		{"(|YWI=|)", "(2:ab)", "(ab)\n"},
		{"(|YWI|)", "(2:ab)", "(ab)\n"},
		{"(|YWJj|)", "(3:abc)", "(abc)\n"},
		{"(3:abc10:(((((((((()", "(3:abc10:(((((((((()", "(abc \"((((((((((\")\n"},
		{`("1a" "a b" "a?")`, "(2:1a3:a b2:a?)", "(\"1a\" \"a b\" \"a?\")\n"},
		{`(#0061# #80# #6100# #611b# #617f# #61a0# #61a1#)`, "(2:\x00a1:\x802:a\x002:a\x1b2:a\x7f2:a\xa02:a\xa1)", "(#0061# #80# #6100# #611B# #617F# #61A0# #61A1#)\n"},
	} {
		s, err := acl.ParseSexp([]byte(tt.in))
		if err != nil {
			t.Errorf("ParseSexp(%q): %v", tt.in, err)
			continue
		}
		if got := string(s.AppendCanonical(nil)); got != tt.canonical {
			t.Errorf("ParseSexp(%q) = %q, want %q", tt.in, got, tt.canonical)
		}
		if got := s.String(); got != tt.printed {
			t.Errorf("ParseSexp(%q).String() = %q, want %q", tt.in, got, tt.printed)
		}
		for _, text := range []string{tt.canonical, tt.printed} {
			if again, err := acl.ParseSexp([]byte(text)); err != nil || !again.Equal(s) {
				t.Errorf("ParseSexp(%q) = %q, %v, want what %q gives", text, again, err, tt.in)
			}
		}
	}
}

func TestParseSexpRejects(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"", "no list"},
		{" \n", "no list"},
		{"()", "the list is empty"},
		{"( ) (a)", "the list is empty"},
		{"a", "instead of a list at offset 0"},
		{"a (b)", "instead of a list at offset 0"},
		{")", "instead of a list at offset 0"},
		{"[h](a)", "instead of a list at offset 0"},
		{"(a", "not closed at offset 2"},
		{"(a (b)", "not closed"},
		{"([h]a)", `unexpected character '[' at offset 1`},
		{"({a})", `unexpected character '{'`},
		{"(a;b)", `unexpected character ';' at offset 2`},
		{"(a&b)", `unexpected character '&'`},
		{"(a?)", `unexpected character '?'`},
		{`(a\)`, `unexpected character '\\'`},
		{"(\x00)", `unexpected character '\x00'`},
		{"(é)", "unexpected character"},
		{"(1a)", "not followed by a colon"},
		{"(5)", "not followed by a colon"},
		{"(5", "not followed by a colon"},
		{"(5 :abcde)", "not followed by a colon"},
		{`(3"abc")`, "not followed by a colon"},
		{"(3#616263#)", "not followed by a colon"},
		{"(0)", "not followed by a colon"},
		{"(03:abc)", "starts with zero"},
		{"(00:)", "starts with zero"},
		{"(9:abc)", "cut short"},
		{"(2:", "cut short"},
		{"(99999999999999999999999999:a)", "cut short"},
		{"(#616#)", "odd length"},
		{"(#6g#)", "invalid byte: U+0067 'g'"},
		{"(#61", "cut short"},
		{"(#61)", "cut short"},
		{"(||)", "malformed base64"},
		{"(|Y|)", "malformed base64"},
		{"(|YW I=|)", "malformed base64"},
		{"(|YWI=\n|)", "malformed base64"},
		{"(|YWI", "cut short"},
		{`("a`, "cut short"},
		{`("\`, "cut short"},
		{`("\x4`, "cut short"},
		{`("\q")`, "unknown escape"},
		{`("\8")a`, "unknown escape"},
		{`("\1")aa`, "unknown escape"},
		{`("\400")`, "unknown escape"},
		{`("\x4g")`, "unknown escape"},
		{strings.Repeat("(", 65) + "a" + strings.Repeat(")", 65), "more than 64 nested lists at offset 64"},
		{strings.Repeat("(", 500000), "more than 64 nested lists"},
		{"(a" + strings.Repeat(" ", acl.MaxSexpSize) + ")", "exceeds the limit"},
	} {
		s, err := acl.ParseSexp([]byte(tt.in))
		if err == nil {
			t.Errorf("ParseSexp(%.40q) = %q, want an error", tt.in, s)
		} else if !strings.Contains(err.Error(), tt.want) {
			t.Errorf("ParseSexp(%.40q): error %q does not say %q", tt.in, err, tt.want)
		}
		if !s.Equal(acl.Sexp{}) {
			t.Errorf("ParseSexp(%.40q) gives %q beside an error", tt.in, s)
		}
	}
	if _, err := acl.ParseSexp([]byte(strings.Repeat("(", 64) + strings.Repeat(")", 64))); err != nil {
		t.Errorf("64 nested lists: %v", err)
	}
}

func parseSexp(t testing.TB, text string) acl.Sexp {
	t.Helper()
	s, err := acl.ParseSexp([]byte(text))
	if err != nil {
		t.Fatalf("ParseSexp(%q): %v", text, err)
	}
	return s
}

func TestSexpFind(t *testing.T) {
	s := parseSexp(t, `(signature (x (data 1:1)) data (data 1:2) ("public-key" ((y (#7a#)))))`)
	for _, tt := range []struct{ name, want string }{
		{"data", "(4:data1:1)"}, // the first in the text, not the uppermost
		{"signature", string(s.AppendCanonical(nil))},
		{"public-key", "(10:public-key((1:y(1:z))))"},
		{"y", "(1:y(1:z))"},
		{"z", "(1:z)"},
		{"1", ""},
		{"dat", ""},
		{"", ""},
	} {
		got, ok := s.Find(tt.name)
		if string(got.AppendCanonical(nil)) != tt.want || ok != (tt.want != "") {
			t.Errorf("Find(%q) = %q, %v, want %q", tt.name, got, ok, tt.want)
		}
	}
	// The contents of an atom are not searched.
	s = parseSexp(t, `(a "(4:data)" 8:(4:data) (b))`)
	if got, ok := s.Find("data"); ok {
		t.Errorf("Find found %q inside an atom", got)
	}
	if _, ok := s.Find("b"); !ok {
		t.Error("Find did not get past an atom")
	}
	if got, ok := (acl.Sexp{}).Find(""); ok {
		t.Errorf("Find found %q in nothing", got)
	}
}

func TestSexpEqual(t *testing.T) {
	s := parseSexp(t, "(a (b c))")
	for text, want := range map[string]bool{
		`("a" (#62# |Yw==|))`: true,
		`(1:a(1:b1:c))`:       true,
		`(a b c)`:             false,
		`(a (b) c)`:           false,
		`(a (b c) ())`:        false,
		`(A (b c))`:           false,
		`(a (b "c "))`:        false,
		`(a (b #0063#))`:      false,
	} {
		if parseSexp(t, text).Equal(s) != want {
			t.Errorf("%s equals %s: %v, want %v", text, s, !want, want)
		}
	}
}

// TestSexpLayout checks that printing reproduces what Libgcrypt printed for Guix,
// byte for byte.
func TestSexpLayout(t *testing.T) {
	texts := map[string]string{}
	for _, name := range []string{"guix-mirror/acl", "guix-mirror/signing-key.pub"} {
		texts[name] = read(t, filepath.Join("..", "testdata", name))
	}
	for _, name := range []string{"rsa.sec", "rsa.sig-val"} {
		texts[name] = read(t, filepath.Join("testdata", name))
	}
	narinfos, err := filepath.Glob("../testdata/*/*/*.narinfo")
	if err != nil || len(narinfos) == 0 {
		t.Fatalf("no narinfos: %v", err)
	}
	for _, name := range narinfos {
		_, line, _ := strings.Cut(read(t, name), "\nSignature: ")
		line, _, _ = strings.Cut(line, "\n")
		text, err := base64.StdEncoding.DecodeString(line[strings.LastIndexByte(line, ';')+1:])
		must(t, err)
		texts[name] = string(text)
	}
	for name, text := range texts {
		if got := parseSexp(t, text).String(); got != text {
			t.Errorf("%s is printed as\n%swant\n%s", name, got, text)
		}
	}
}

func read(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	must(t, err)
	return string(b)
}

func BenchmarkParseSexp(b *testing.B) {
	text := []byte(read(b, "../testdata/guix-mirror/acl"))
	b.SetBytes(int64(len(text)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := acl.ParseSexp(text); err != nil {
			b.Fatal(err)
		}
	}
}
