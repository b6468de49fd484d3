// SPDX-License-Identifier: GPL-3.0-or-later

package page

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"strings"
	"testing"
	"unicode/utf8"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

// TestPage has texts of strangers and of all lengths.
func TestPage(t *testing.T) {
	for _, unicode := range []bool{true, false} {
		p := &Page{columns: 40, unicode: unicode}
		p.Say(5, Good, "%s and %s", strings.Repeat("http://example.org/", 9), "\x1b[2J\u202e é\xff\u0085 word word word word word word")
		p.Line(0, "")
		p.Item(2, 3, "nar %s", strings.Repeat("y", 39))
		if list := "  3. nar\n     yyyy"; !strings.Contains(p.String(), list) {
			t.Errorf("%v: %q does not begin with %q", unicode, p, list)
		}
		p.Heading(strings.Repeat("x", 41))
		for line := range strings.Lines(p.String()) {
			line = strings.TrimSuffix(line, "\n")
			if utf8.RuneCountInString(line) > 40 || !utf8.ValidString(line) || strings.ContainsAny(line, "\x1b\u202e\u0085") || !unicode && strings.Contains(line, "é") {
				t.Errorf("%v: %q", unicode, line)
			}
		}
	}
}

// TestQuote has the shell read words back.
func TestQuote(t *testing.T) {
	for _, word := range []string{"/usr/local/bin/x", "", "a b", "it's", "'", `$(rm -rf "$HOME")`, "a;b|c>d", "*?[a]~", "\\\n", "é", "#x", "VAR=a b"} {
		out, err := exec.Command("sh", "-c", "printf %s. "+Quote(word)).Output()
		if err != nil || string(out) != word+"." {
			t.Errorf("%q: %q is read as %q; %v", word, Quote(word), out, err)
		}
	}
	if got := Quote("/gnu/store/x-a+b_1.2=c"); got != "/gnu/store/x-a+b_1.2=c" {
		t.Errorf("what needs no quotes has some: %s", got)
	}
}

// TestWrap has texts of several lines, of which short ones stay as they are, and long words.
func TestWrap(t *testing.T) {
	t.Setenv("COLUMNS", "40")
	long := strings.Repeat("x", 50)
	for text, want := range map[string]string{
		"": "", "a  b\n  c\n": "a  b\n  c\n",
		strings.Repeat("é ", 21):            strings.TrimSuffix(strings.Repeat("é ", 20), " ") + "\n  é ",
		"a " + long + " b\n" + long + "\nc": "a\n  " + long + "\n  b\n" + long + "\nc",
		"\x1b[2Ja\u009b\r\u202e\xff é\nb":   "?[2Ja???? é\nb",
	} {
		if got := Wrap(1, text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

// TestEscaped reads JSON back that has no characters which do something to a terminal.
func TestEscaped(t *testing.T) {
	const want = "\x1b\x7f\u009b2J\u202e\U000e0001\U0001f600 é\n"
	var b bytes.Buffer
	testhelp.Must(t, json.NewEncoder(Escaped{&b}).Encode(want))
	var got string
	if err := json.Unmarshal(b.Bytes(), &got); err != nil || got != want {
		t.Errorf("%s: %q, error %v", b.Bytes(), got, err)
	}
	if text := strings.TrimSpace(b.String()); text != `"\u001b\u007f\u009b2J\u202e\udb40\udc01😀 é\n"` {
		t.Error(text)
	}
}
