// SPDX-License-Identifier: GPL-3.0-or-later

package acl

import (
	"encoding/base64"
	"errors"
	"strings"
	"testing"
)

func FuzzParseSexp(f *testing.F) {
	for _, s := range []string{
		eccKey, eccData + eccVal, eccSecret, "(acl (entry " + rsaKey + " (tag (guix import))))",
		`(a "\n\x41\101\"" #00 fF# |YWI=| |YW| 3:(") (()) b-1./_:*+= "")x`, "(10:0123456789(1:a)0:)",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := parseSexp(text)
		if err != nil {
			return
		}
		// All ways to write it are read back as the same.
		for _, again := range []string{s.String(), s.String() + ")(", s.oneLine()} {
			if u, err := parseSexp([]byte(again)); err != nil || !u.equal(s) {
				t.Errorf("%q is read back as %q, %v", again, u, err)
			}
		}
		if strings.ContainsAny(s.String(), "\x00\x1b\r\x7f") {
			t.Errorf("printed as %q", s.String())
		}
		// The other parsers must live with whatever the expression is.
		if a, err := ParseACL(text); err == nil {
			if b, err := ParseACL([]byte(a.Text())); err != nil || b.Text() != a.Text() {
				t.Errorf("the ACL %q is read back as %v, %v", a.Text(), b, err)
			}
		}
		if k, err := ParsePublicKey(text); err == nil {
			if l, err := ParsePublicKey([]byte(k.Text())); err != nil || !k.Equal(l) || (k.Usable() == nil) != (l.Usable() == nil) {
				t.Errorf("the key %v is read back as %v, %v", k, l, err)
			}
		}
		if k, err := ParseSigningKey(text, nil); err == nil {
			field, err := k.Sign([32]byte{}, "h")
			if err == nil {
				err = NewACL(k.PublicKey()).Verify([32]byte{}, field)
			}
			if err != nil {
				t.Errorf("the key %q signs badly: %v", text, err)
			}
		}
	})
}

func FuzzVerify(f *testing.F) {
	for _, s := range []string{
		"(signature " + eccData + eccVal + eccKey + ")", "(signature " + rsaData + rsaVal + rsaKey + ")",
		"(signature " + eccData + strings.Replace(eccVal, "#07", "#0007", 1) + eccKey + ")",
	} {
		f.Add("1;h;", []byte(s), true)
		f.Add(fieldOf(s), []byte{}, false)
	}
	f.Add("2;h;", []byte("()"), true)
	both := aclOf(f, eccKey, rsaKey)
	digest := digestOf(f, rsaH)
	f.Fuzz(func(t *testing.T, field string, sexp []byte, encode bool) {
		// Mutations of the expression get through base64 only if it is applied here.
		if encode {
			field += base64.StdEncoding.EncodeToString(sexp)
		}
		host, s, parseErr := parseSignature(field)
		err := both.Verify(digest, field)
		if parseErr != nil {
			if host != "" || err == nil || err.Error() != parseErr.Error() {
				t.Errorf("parseSignature: %q, %v; Verify: %v", host, parseErr, err)
			}
			return
		}
		if errors.Is(err, ErrUnsupportedVersion) {
			t.Errorf("Verify: %v", err)
		}
		k, hasKey := s.find("public-key")
		if !hasKey && !errors.Is(err, ErrCorruptSignature) {
			t.Errorf("without a key: %v", err)
		}
		if hasKey && both.lookup(k) == nil && err == nil {
			t.Errorf("authorised though the key is %v", k)
		}
		if err == nil {
			// Nobody can make new signatures, so it must be one of the two.
			raw, _ := base64.StdEncoding.DecodeString(field[strings.LastIndexByte(field, ';')+1:])
			text := mustSexp(t, string(raw)).oneLine()
			if !strings.Contains(text, rsaH) || !strings.Contains(text, eccS) && !strings.Contains(text, rsaS) {
				t.Errorf("authorised: %s", text)
			}
			other := digest
			other[0] ^= 1
			if err := both.Verify(other, field); !errors.Is(err, ErrHashMismatch) {
				t.Errorf("for another digest: %v", err)
			}
		}
		if err != nil && (len(err.Error()) > 600 || strings.ContainsAny(err.Error(), "\x00\x1b\n\r")) {
			t.Errorf("error %q is not fit to be shown", err)
		}
	})
}
