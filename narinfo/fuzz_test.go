// SPDX-License-Identifier: GPL-3.0-or-later

package narinfo_test

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

var (
	commentLine  = regexp.MustCompile(`(?m)^#.*\n?`)
	continuation = regexp.MustCompile(`\n\+ ?`)
)

// readSlowly returns the first value of each field of a record, by rewriting the text rather than
// walking over it: another way to the same result.
func readSlowly(text string) map[string]string {
	text = commentLine.ReplaceAllString(text, "")
	text = strings.TrimLeft(text, "\n")
	text, _, _ = strings.Cut(text, "\n\n")
	// A byte that UTF-8 never contains stands for a line feed in a value.
	text = continuation.ReplaceAllString(text, "\xff")
	fields := make(map[string]string)
	for line := range strings.SplitSeq(text, "\n") {
		name, value, ok := strings.Cut(line, ":")
		if _, seen := fields[name]; ok && !seen {
			first, rest, more := strings.Cut(value, "\xff")
			first = strings.TrimSpace(first + "|")
			value = first[:len(first)-1]
			if more {
				value += "\n" + strings.ReplaceAll(rest, "\xff", "\n")
			}
			fields[name] = value
		}
	}
	return fields
}

// approve is a verifier that takes every signature for good.
type approve struct{}

func (approve) Verify([32]byte, string) error { return nil }

func FuzzParse(f *testing.F) {
	for _, x := range realNarinfos(f) {
		f.Add([]byte(x[0]))
	}
	f.Add([]byte("\n# c\n%a: b\n+ c\n#d\n+e\n" + hello))
	f.Add([]byte(helloSigned + "NarSize: 1\nX: Signature: y\n# Signature:\nSignature: x\nERIS: urn:eris:\nURL: http://h/\nCompression: lzip\n\nURL: x"))
	f.Fuzz(func(t *testing.T, text []byte) {
		n, err := narinfo.Parse(text)
		if err != nil {
			if n != nil {
				t.Error("a narinfo beside an error")
			}
			return
		}
		if n.Text() != string(text) {
			t.Errorf("Text = %q", n.Text())
		}

		// The values are those that the slow reader finds.
		fields := readSlowly(string(text))
		if n.StorePath != fields["StorePath"] || n.NarHash != fields["NarHash"] || n.Signature != fields["Signature"] ||
			strconv.FormatUint(n.NarSize, 10) != strings.TrimLeft(fields["NarSize"], "0") && n.NarSize != 0 ||
			!slices.Equal(n.References, strings.Fields(fields["References"])) {
			t.Errorf("Parse = %+v, slowly %q", n, fields)
		}

		// What is said to be signed is what stands in the signed text, read alone.
		signed, ok := n.SignedText()
		if ok != (n.Authorise(approve{}) == nil) {
			t.Errorf("signed %v, authorised %v", ok, n.Authorise(approve{}))
		}
		above := readSlowly(signed)
		if ok {
			if !strings.HasPrefix(n.Text(), signed+"Signature:") || strings.Contains(signed, "Signature:") {
				t.Errorf("SignedText = %q", signed)
			}
			if n.StorePath != above["StorePath"] || n.NarHash != above["NarHash"] ||
				!slices.Equal(n.References, strings.Fields(above["References"])) {
				t.Errorf("Parse = %+v, signed %q", n, above)
			}
		}
		for _, e := range n.ERIS {
			if _, is := above["ERIS"]; e.Signed && !is {
				t.Errorf("ERIS = %v, signed %q", n.ERIS, above)
			}
		}

		// What the daemon will be told is well-formed.
		must(t, narinfo.CheckStoreName(n.StorePath[strings.LastIndexByte(n.StorePath, '/')+1:]))
		for _, name := range n.References {
			// There need not be a hash in it.
			if err := narinfo.CheckStoreName(strings.Repeat("0", 32) + "-" + name); len(name) < 178 && err != nil || strings.HasPrefix(name, ".") {
				t.Errorf("reference %q: %v", name, err)
			}
		}
		urls := n.PreferredURLs()
		if len(urls) == 0 {
			t.Error("no usable URL")
		}
		for _, u := range urls {
			resolved, err := narinfo.ResolveURL("http://h", u.URL)
			if err != nil || !strings.HasSuffix(resolved, u.URL) || strings.ContainsAny(resolved, " \n\r\x00") {
				t.Errorf("ResolveURL(%q) = %q, %v", u.URL, resolved, err)
			}
		}

		// What can be printed is read back as the same.
		part, err := narinfo.SignedPart(n)
		if err != nil || n.NarHash == "" {
			return // the printed one has the hash of NarDigest
		}
		printed, err := narinfo.Text(part, "1;h;", n.PreferredURLs())
		must(t, err)
		m := parse(t, printed)
		wantIs(t, m.Authorise(acl.NewACL()), acl.ErrCorruptSignature)
		if !narinfo.Equivalent(n, m) || m.Deriver != n.Deriver || len(m.ERIS) != len(n.ERIS) {
			t.Errorf("%+v was read back as %+v", n, m)
		}
	})
}
