// SPDX-License-Identifier: GPL-3.0-or-later

package acl

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestParseSexp(t *testing.T) {
	for _, tt := range []struct {
		in, printed string // as Libgcrypt 1.10.1 does
		canonical   string // which is the same
	}{
		{"(a)", "(a)\n", "(1:a)"},
		{" \t\r\n\v\f(\n a\t)", "(a)\n", "(1:a)"},
		{"(a) text after the list )", "(a)\n", "(1:a)"},
		{"(a ())", "(a \n ()\n )\n", "(1:a())"},
		{"(())", "(\n ()\n )\n", "(())"},
		{"((a)(b) c)", "(\n (a)\n (b)\n c)\n", "((1:a)(1:b)1:c)"},
		{"(a(b c(d))e)", "(a \n (b c \n  (d)\n  )\n e)\n", "(1:a(1:b1:c(1:d))1:e)"},
		{"(-a .b /c _d :e *f +g =h)", "(-a .b /c _d :e *f +g =h)\n", "(2:-a2:.b2:/c2:_d2::e2:*f2:+g2:=h)"},
		{"(a1-2)", "(a1-2)\n", "(4:a1-2)"},
		{`(a"b"#63#|ZA==|1:e)`, "(a b c d e)\n", "(1:a1:b1:c1:d1:e)"},
		{`("")`, "(\"\")\n", "(0:)"},
		{`(##)`, "(\"\")\n", "(0:)"},
		{`("\b\t\v\n\f\r\"\'\\")`, "(\"\\b\\t\\v\\n\\f\\r\\\"\\'\\\\\")\n", "(9:\b\t\v\n\f\r\"'\\)"},
		{`("\101\x42\x4f\377")`, "(#41424FFF#)\n", "(4:ABO\xff)"},
		{"(\"a\n)b\")", "(\"a\\n)b\")\n", "(4:a\n)b)"},
		{"(#6 1\n6\t2#)", "(ab)\n", "(2:ab)"},
		{"(#aAfF#)", "(#AAFF#)\n", "(2:\xaa\xff)"},
		{"(|YWI=|)", "(ab)\n", "(2:ab)"},
		{"(|YWI|)", "(ab)\n", "(2:ab)"},
		{"(|YWJj|)", "(abc)\n", "(3:abc)"},
		{"(3:abc10:(((((((((()", "(abc \"((((((((((\")\n", "(3:abc10:(((((((((()"},
		{`("1a" "a b" "a?")`, "(\"1a\" \"a b\" \"a?\")\n", "(2:1a3:a b2:a?)"},
		{`(#0061# #80# #6100# #611b# #617f# #61a0# #61a1#)`, "(#0061# #80# #6100# #611B# #617F# #61A0# #61A1#)\n", "(2:\x00a1:\x802:a\x002:a\x1b2:a\x7f2:a\xa02:a\xa1)"},
	} {
		s := mustSexp(t, tt.in)
		if got := s.String(); got != tt.printed {
			t.Errorf("%q is printed as %q, want %q", tt.in, got, tt.printed)
		}
		for _, text := range []string{tt.canonical, tt.printed, s.oneLine()} {
			if again := mustSexp(t, text); !again.equal(s) {
				t.Errorf("%q is %v, want what %q gives", text, again, tt.in)
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
		{"(" + strings.Repeat("()", 1<<18) + ")", "more than 262144 elements"},
		{"(a" + strings.Repeat(" ", MaxSexpSize) + ")", "exceeds the limit"},
	} {
		_, err := parseSexp([]byte(tt.in))
		wantError(t, fmt.Sprintf("%.40q", tt.in), err, tt.want)
	}
	mustSexp(t, strings.Repeat("(", 64)+strings.Repeat(")", 64))
}

func mustSexp(t testing.TB, text string) sexp {
	t.Helper()
	s, err := parseSexp([]byte(text))
	if err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	return s
}

func TestSexpFind(t *testing.T) {
	s := mustSexp(t, `(signature (x (data 1:1)) data (data 1:2) ("public-key" ((y (#7a#)))) (a "(4:none)" 8:(4:none) (b)))`)
	for name, want := range map[string]string{
		"data":       "(data \"1\")", // the first in the text, not the uppermost
		"signature":  s.oneLine(),
		"public-key": "(public-key ((y (z))))",
		"y":          "(y (z))",
		"z":          "(z)",
		"b":          "(b)",
		"1":          "()",
		"dat":        "()",
		"none":       "()", // stands in an atom
	} {
		if got, ok := s.find(name); got.oneLine() != want || ok != (want != "()") {
			t.Errorf("%q is %v, %v, want %q", name, got, ok, want)
		}
	}
}

func TestSexpEqual(t *testing.T) {
	s := mustSexp(t, "(a (b c))")
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
		if mustSexp(t, text).equal(s) != want {
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
		if got := mustSexp(t, text).String(); got != text {
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
