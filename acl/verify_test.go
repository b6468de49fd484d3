// SPDX-License-Identifier: GPL-3.0-or-later

package acl

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"
)

// An RSA key of 1024 bits and a signature by it, made by Libgcrypt; the key was thrown away.
const (
	rsaN = "00DCB6CF40148935D5251933F0D12D10BAD0DB17557A8B21F0D3F3BAB26520561F9F658FD899952EAC14B3806C7C9AEF7F0AB7303183DE537DEDFE570A62ADF79ED6574EAC799F05A29B9CC59558766A3E94B91D53936B59FF2B9998CE20526AE1EDDE0A3A79C8A203EBA1BCA58C9678AFD106330750B07CB6ECA4CC05301976BF"
	rsaH = "DCD1B37F906EDF85260B11FE070C15204B6BD9E8691A768758F055345A311D48"
	rsaS = "8B4FB7E4FDB9730CFDEE20AC5974BC7D3AB31086B37E44A075E66AA0E0731337F734169243C41F26BA87370F88BB9AC563E04A4D79154EB1F92118A8D2CC714F45C017112DDC685AD096FC7B214D6EFC28FE9BC38E3DB5F0FD97E18F495FE21FF2C130B2D88EE585EB12CC8BEBCDD9428C24AB93E910CFF588655F415AAF8650"

	// The same for ECDSA; the signature is of the same digest.
	eccQ = "B6375DB8F0A731E17737EB8BA5B6AA4A57836475891A573F98DC72AFD6255D44"
	eccR = "072922BCD368A8BB9327F8DBD5192F4EB594A44A88D7FCAA12762906D18DB633"
	eccS = "04940212DA22C039C9D93295D62CD9C51EAD47D38BE73AFD5FB994FF217A3A63"
)

// The expressions that a signature is put together from.
var (
	eccKey  = "(public-key (ecc (curve Ed25519) (q #" + eccQ + "#)))"
	eccData = "(data (flags rfc6979) (hash sha256 #" + rsaH + "#))"
	eccVal  = "(sig-val (ecdsa (r #" + eccR + "#) (s #" + eccS + "#)))"
	rsaKey  = "(public-key (rsa (n #" + rsaN + "#) (e #010001#)))"
	rsaData = "(data (flags pkcs1) (hash sha256 #" + rsaH + "#))"
	rsaVal  = "(sig-val (rsa (s #" + rsaS + "#)))"
)

func fieldOf(sexp string) string {
	return "1;example.org;" + base64.StdEncoding.EncodeToString([]byte(sexp))
}

// characters returns the text in UTF-8 whose characters stand for the bytes of s.
func characters(s string) string {
	var b strings.Builder
	for i := range len(s) {
		b.WriteRune(rune(s[i]))
	}
	return b.String()
}

func signatureOf(parts ...string) string {
	return fieldOf("(signature " + strings.Join(parts, " ") + ")")
}

func aclOf(t testing.TB, keys ...string) *ACL {
	t.Helper()
	text := "(acl"
	for _, k := range keys {
		text += " (entry " + k + " (tag (guix import)))"
	}
	a, err := ParseACL([]byte(text + ")"))
	must(t, err)
	return a
}

func digestOf(t testing.TB, h string) [32]byte {
	t.Helper()
	b, err := hex.DecodeString(h)
	must(t, err)
	return [32]byte(b)
}

func TestVerify(t *testing.T) {
	both := aclOf(t, eccKey, rsaKey)
	replace := func(s, old, new string) string {
		if !strings.Contains(s, old) {
			t.Fatalf("%q is not in %q", old, s)
		}
		return strings.Replace(s, old, new, 1)
	}
	h2 := strings.Replace(rsaH, "48", "49", 1)
	keyIn65Bytes := replace(eccKey, eccQ, "0476F6573CE851BD4CFB7EC08C64CF2067F307056B135728AD1FD5603ECBE8265E445D25D6AF72DC983F571A89756483574AAAB6A58BEB3777E131A7F0B85D37B6")
	keyIn33Bytes := replace(eccKey, eccQ, "40"+eccQ)
	rsaWithoutZero := replace(rsaKey, "#00DC", "#DC")
	good := signatureOf(eccData, eccVal, eccKey)

	for _, tt := range []struct {
		name  string
		field string
		acl   *ACL
		want  error // nil if the signature is good
		says  string
	}{
		{"ECDSA", good, both, nil, ""},
		{"RSA", signatureOf(rsaData, rsaVal, rsaKey), both, nil, ""},
		{"in canonical form", fieldOf(characters("(9:signature" + canonical(t, eccData) + canonical(t, eccVal) + canonical(t, eccKey) + ")")), both, nil, ""},
		{"in canonical form, but not of characters", fieldOf("(9:signature" + canonical(t, eccData) + canonical(t, eccVal) + canonical(t, eccKey) + ")"), both, ErrCorruptSignature, "UTF-8"},
		{"a character that is no byte", fieldOf("(signature " + eccData + eccVal + eccKey + ") \u0100"), both, ErrCorruptSignature, "UTF-8"},
		{"a NUL after the expression", fieldOf("(signature " + eccData + eccVal + eccKey + ")\x00"), both, ErrCorruptSignature, "U+0001"},
		{"flag raw", signatureOf(replace(eccData, "rfc6979", "raw"), eccVal, eccKey), both, nil, ""},
		{"r with leading zeros", signatureOf(eccData, replace(eccVal, "#07", "#000007"), eccKey), both, nil, ""},
		{"s before r", signatureOf(eccData, "(sig-val (ecdsa (s #"+eccS+"#) (r #"+eccR+"#)))", eccKey), both, nil, ""},
		{"RSA signature with leading zeros", signatureOf(rsaData, replace(rsaVal, "#8B", "#00008B"), rsaKey), both, nil, ""},
		{"parts in another order, and more", fieldOf("(x (y " + eccKey + ") (comment 3:abc) " + eccVal + eccData + ")"), both, nil, ""},
		{"text after the expression", fieldOf("(signature " + eccData + eccVal + eccKey + ") junk"), both, nil, ""},
		{"no host", strings.Replace(good, "example.org", "", 1), both, nil, ""},
		{"odd host", strings.Replace(good, "example.org", "ü \x00\r", 1), both, nil, ""},
		{"65-byte key, listed so", signatureOf(eccData, eccVal, keyIn65Bytes), aclOf(t, keyIn65Bytes), nil, ""},
		{"33-byte key, listed so", signatureOf(eccData, eccVal, keyIn33Bytes), aclOf(t, keyIn33Bytes), nil, ""},
		{"RSA modulus without leading zero, listed so", signatureOf(rsaData, rsaVal, rsaWithoutZero), aclOf(t, rsaWithoutZero), nil, ""},

		{"version 2", "2" + good[1:], both, ErrUnsupportedVersion, `"2"`},
		{"version 11", "1" + good, both, ErrUnsupportedVersion, `"11"`},
		{"version is no number", "foo" + good[1:], both, ErrUnsupportedVersion, `"foo"`},
		{"version is empty", good[1:], both, ErrUnsupportedVersion, `""`},
		{"version is hostile", "\x1b[2J" + strings.Repeat("x", 1000) + good[1:], both, ErrUnsupportedVersion, `"\x1b[2Jxxx`},

		{"empty", "", both, ErrCorruptSignature, "three parts"},
		{"two parts", "1;example.org", both, ErrCorruptSignature, "three parts"},
		{"four parts", good + ";", both, ErrCorruptSignature, "three parts"},
		{"no base64", "1;h;!", both, ErrCorruptSignature, "not base64"},
		{"no padding", "1;h;KGE", both, ErrCorruptSignature, "not base64"},
		{"excess bits", "1;h;KGF=", both, ErrCorruptSignature, "not base64"},
		{"a blank in the base64", good + " ", both, ErrCorruptSignature, "not base64"},
		{"a carriage return", good + "\r", both, ErrCorruptSignature, "line end"},
		{"a line feed in the base64", good[:40] + "\n" + good[40:], both, ErrCorruptSignature, "line end"},
		{"no s-expression", fieldOf("hello"), both, ErrCorruptSignature, "instead of a list"},
		{"nothing in base64", "1;h;", both, ErrCorruptSignature, "no list"},
		{"too long", "1;h;" + strings.Repeat("A", MaxFieldSize), both, ErrCorruptSignature, "bytes"},
		{"no data", signatureOf(eccVal, eccKey), both, ErrCorruptSignature, `"data"`},
		{"no public key", signatureOf(eccData, eccVal), both, ErrCorruptSignature, `"public-key"`},
		{"data is an atom", signatureOf("data", eccVal, eccKey), both, ErrCorruptSignature, `"data"`},

		{"empty ACL", good, aclOf(t), ErrUnauthorisedKey, eccQ},
		{"no ACL", good, nil, ErrUnauthorisedKey, eccQ},
		{"another key", good, aclOf(t, rsaKey), ErrUnauthorisedKey, eccQ},
		{"the key in another form", signatureOf(eccData, eccVal, keyIn65Bytes), both, ErrUnauthorisedKey, "76F6573C"},
		{"the curve in another case", signatureOf(eccData, eccVal, replace(eccKey, "Ed", "ed")), both, ErrUnauthorisedKey, "ed25519"},
		{"the modulus in another form", signatureOf(rsaData, rsaVal, rsaWithoutZero), both, ErrUnauthorisedKey, "DCB6CF"},
		{"the key with something added", signatureOf(eccData, eccVal, replace(eccKey, "(q", "(flags eddsa) (q")), both, ErrUnauthorisedKey, "eddsa"},
		{"an authorised key after another one", signatureOf(eccData, eccVal, replace(eccKey, "B6", "B7"), eccKey), both, ErrUnauthorisedKey, "B737"},
		{"unauthorised before hash mismatch", signatureOf(replace(eccData, rsaH, h2), eccVal, eccKey), aclOf(t), ErrUnauthorisedKey, ""},

		{"another hash", signatureOf(replace(eccData, rsaH, h2), eccVal, eccKey), both, ErrHashMismatch, strings.ToLower(rsaH)},
		{"a shorter hash", signatureOf(replace(eccData, rsaH, rsaH[:62]), eccVal, eccKey), both, ErrHashMismatch, ""},
		{"a longer hash", signatureOf(replace(eccData, rsaH, rsaH+"00"), eccVal, eccKey), both, ErrHashMismatch, ""},
		{"a huge hash", signatureOf(replace(eccData, rsaH, strings.Repeat("00", 5000)), eccVal, eccKey), both, ErrHashMismatch, ""},
		{"no hash", signatureOf("(data (flags rfc6979))", eccVal, eccKey), both, ErrHashMismatch, ""},
		{"hash without value", signatureOf("(data (flags rfc6979) (hash sha256))", eccVal, eccKey), both, ErrHashMismatch, ""},
		{"the right hash comes second", signatureOf(replace(eccData, "(hash", "(hash sha256 #00#) (hash"), eccVal, eccKey), both, ErrHashMismatch, ""},
		{"the bits of the hash that ECDSA drops", signatureOf(replace(eccData, rsaH, h2), eccVal, eccKey), both, ErrHashMismatch, ""},
		{"hash mismatch before invalid signature", signatureOf(replace(eccData, rsaH, h2), rsaVal, eccKey), both, ErrHashMismatch, ""},

		{"no value", signatureOf(eccData, eccKey), both, ErrInvalidSignature, `"sig-val"`},
		{"empty value", signatureOf(eccData, "(sig-val)", eccKey), both, ErrInvalidSignature, "not of the form"},
		{"two values", signatureOf(eccData, replace(eccVal, "val", "val (ecdsa)"), eccKey), both, ErrInvalidSignature, "not of the form"},
		{"value is an atom", signatureOf(eccData, "(sig-val ecdsa)", eccKey), both, ErrInvalidSignature, "not of the form"},
		{"wrong r", signatureOf(eccData, replace(eccVal, "#0729", "#0728"), eccKey), both, ErrInvalidSignature, "not made by"},
		{"wrong s", signatureOf(eccData, replace(eccVal, "#0494", "#0495"), eccKey), both, ErrInvalidSignature, "not made by"},
		{"r twice", signatureOf(eccData, replace(eccVal, "(r", "(r #01#) (r"), eccKey), both, ErrInvalidSignature, "not of the form"},
		{"r twice and no s", signatureOf(eccData, "(sig-val (ecdsa (r #"+eccR+"#) (r #"+eccR+"#)))", eccKey), both, ErrInvalidSignature, "not of the form"},
		{"no s", signatureOf(eccData, "(sig-val (ecdsa (r #"+eccR+"#)))", eccKey), both, ErrInvalidSignature, "not of the form"},
		{"EdDSA", signatureOf(replace(eccData, "rfc6979", "eddsa"), replace(eccVal, "ecdsa", "eddsa"), eccKey), both, ErrInvalidSignature, "here it is (data "},
		{"flag eddsa", signatureOf(replace(eccData, "rfc6979", "eddsa"), eccVal, eccKey), both, ErrInvalidSignature, "here it is (data "},
		{"flag pkcs1 with ECDSA", signatureOf(rsaData, eccVal, eccKey), both, ErrInvalidSignature, "here it is (data "},
		{"two flags", signatureOf(replace(eccData, "rfc6979", "rfc6979 raw"), eccVal, eccKey), both, ErrInvalidSignature, "here it is (data "},
		{"no flags", signatureOf(replace(eccData, "(flags rfc6979)", ""), eccVal, eccKey), both, ErrInvalidSignature, "here it is (data "},
		{"more in data", signatureOf(replace(eccData, "(hash", "(x y) (hash"), eccVal, eccKey), both, ErrInvalidSignature, "here it is (data "},
		{"more in data, at the end", signatureOf(replace(eccData, "#))", "#) (x y))"), eccVal, eccKey), both, ErrInvalidSignature, "here it is (data "},
		{"more in hash", signatureOf(replace(eccData, "#))", "# x))"), eccVal, eccKey), both, ErrInvalidSignature, "here it is (data "},
		{"another hash algorithm", signatureOf(replace(eccData, "sha256", "sha512"), eccVal, eccKey), both, ErrInvalidSignature, "here it is (data "},
		{"RSA value with an ECC key", signatureOf(eccData, rsaVal, eccKey), both, ErrInvalidSignature, "not of the form"},
		{"ECDSA value with an RSA key", signatureOf(rsaData, eccVal, rsaKey), both, ErrInvalidSignature, "not of the form"},
		{"flag raw with RSA", signatureOf(replace(rsaData, "pkcs1", "raw"), rsaVal, rsaKey), both, ErrInvalidSignature, "here it is (data "},
		{"wrong RSA value", signatureOf(rsaData, replace(rsaVal, "#8B", "#8A"), rsaKey), both, ErrInvalidSignature, "not made by"},
		{"RSA value too long", signatureOf(rsaData, replace(rsaVal, "#8B", "#018B"), rsaKey), both, ErrInvalidSignature, "longer than"},
		{"RSA value empty", signatureOf(rsaData, "(sig-val (rsa (s ##)))", rsaKey), both, ErrInvalidSignature, "not made by"},
		{"RSA value too short", signatureOf(rsaData, replace(rsaVal, "50#", "#"), rsaKey), both, ErrInvalidSignature, "not made by"},
		{"a listed key that is not usable", signatureOf(eccData, eccVal, "(public-key (dsa (p #01#)))"), aclOf(t, "(public-key (dsa (p #01#)))"), ErrInvalidSignature, "neither of type ecc"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.acl.Verify(digestOf(t, rsaH), tt.field)
			if !errors.Is(err, tt.want) {
				t.Fatalf("Verify: %v, want %v", err, tt.want)
			}
			if err == nil {
				return
			}
			if !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error %q does not say %q", err, tt.says)
			}
			if len(err.Error()) > 600 || strings.ContainsAny(err.Error(), "\x1b\n\x00") {
				t.Errorf("error %q is not fit to be shown", err)
			}
			if !strings.HasPrefix(err.Error(), tt.want.Error()) {
				t.Errorf("error %q does not start with %q", err, tt.want)
			}
		})
	}
}

// canonical returns an expression with a length before each atom and no white space.
func canonical(t testing.TB, text string) string {
	var write func(s sexp) string
	write = func(s sexp) string {
		if s.atom != nil {
			return fmt.Sprintf("%d:%s", len(s.atom), s.atom)
		}
		text := "("
		for _, e := range s.list {
			text += write(e)
		}
		return text + ")"
	}
	return write(mustSexp(t, text))
}

func TestSigner(t *testing.T) {
	for field, want := range map[string][2]string{
		signatureOf(eccData, eccVal, eccKey): {"example.org", eccKey},
		signatureOf(eccData, eccVal):         {"example.org", ""},
		"2;example.org;":                     {},
	} {
		if host, key := Signer(field); host != want[0] || key != want[1] {
			t.Errorf("host %q, key %v instead of %q", host, key, want)
		}
	}
}

// BenchmarkVerify is about one signature field, from base64 to the decision.
func BenchmarkVerify(b *testing.B) {
	digest := digestOf(b, rsaH)
	for _, bb := range []struct{ name, field string }{
		{"ecdsa", signatureOf(eccData, eccVal, eccKey)},
		{"rsa1024", signatureOf(rsaData, rsaVal, rsaKey)},
		{"unauthorised", signatureOf(eccData, eccVal, strings.Replace(eccKey, "B6", "B7", 1))},
	} {
		b.Run(bb.name, func(b *testing.B) {
			a := aclOf(b, eccKey, rsaKey)
			b.SetBytes(int64(len(bb.field)))
			b.ReportAllocs()
			for b.Loop() {
				if err := a.Verify(digest, bb.field); err != nil && bb.name != "unauthorised" {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestVerifyCharacters verifies signatures in which numbers are printed as text: about one of a
// thousand signatures has such a number.
func TestVerifyCharacters(t *testing.T) {
	const key = "(public-key (ecc (curve Ed25519) (q #8A20FB42F322A6DB2243B2532D136920A5E85F6016138F7039889298241EC790#)))"
	list := aclOf(t, key)
	n := 0
	for line := range strings.Lines(read(t, "testdata/characters.signatures")) {
		number, field, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		if number == "#" || !ok {
			continue
		}
		n++
		if err := list.Verify(sha256.Sum256([]byte(number)), field); err != nil {
			t.Errorf("%s: %v", number, err)
		}
	}
	if n != 3 {
		t.Errorf("%d signatures", n)
	}
}

// TestSignCharacters checks that what is signed and written is ASCII, whatever its bytes look like,
// and read back as it was.
func TestSignCharacters(t *testing.T) {
	k := signingKey(t, read(t, "testdata/rsa.sec"), "")
	digest := [32]byte([]byte(strings.Repeat("a\xe4\xff ", 8)))
	field, err := k.Sign(digest, "h")
	must(t, err)
	if text := decodeField(t, field); strings.ContainsFunc(text, func(r rune) bool { return r > 0x7e }) {
		t.Errorf("signature is %q", text)
	}
	must(t, NewACL(k.PublicKey()).Verify(digest, field))
}

// TestFilesOfCharacters reads keys and lists that Guile has written in UTF-8 and in ISO 8859-1.
func TestFilesOfCharacters(t *testing.T) {
	point := "a\xe4\xff " + strings.Repeat("~\xbf\xc3\xa1", 7)
	key := "(public-key (ecc (curve Ed25519) (q \"" + point + "\")))"
	want := mustSexp(t, strings.Replace(key, `"`+point+`"`, fmt.Sprintf("#%x#", point), 1))
	for _, text := range []string{key, characters(key)} {
		k, err := ParsePublicKey([]byte(text))
		if err != nil || !mustSexp(t, k.Text()).equal(want) {
			t.Errorf("key %q is read as %v, %v", text, k, err)
		}
		list, err := ParseACL([]byte("(acl (entry " + text + " (tag (guix import))))"))
		if err != nil || !list.Contains(k) {
			t.Errorf("list with %q does not contain the key (%v)", text, err)
		}
	}
}
