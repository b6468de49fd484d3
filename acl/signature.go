// SPDX-License-Identifier: GPL-3.0-or-later

package acl

import (
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// The ways in which [ACL.Verify] fails. Each error that it returns wraps one of these, and mostly
// says more. (Guix, guix/pki.scm: signature-case; Guix, guix/narinfo.scm:
// narinfo-signature->canonical-sexp.)
var (
	// ErrUnsupportedVersion: the field has a version other than 1.
	ErrUnsupportedVersion = errors.New("unsupported version")
	// ErrCorruptSignature: the field has not the form VERSION;HOST;BASE64 with an s-expression that
	// contains a list "data" and a list "public-key".
	ErrCorruptSignature = errors.New("corrupt signature")
	// ErrUnauthorisedKey: the key that the signature names is not in the ACL.
	ErrUnauthorisedKey = errors.New("unauthorised key")
	// ErrHashMismatch: the signature is about another hash.
	ErrHashMismatch = errors.New("hash mismatch")
	// ErrInvalidSignature: the signature was not made by the key that it names, or is of a kind
	// that is not supported.
	ErrInvalidSignature = errors.New("invalid signature")
)

// MaxFieldSize is the length, in bytes, of the longest signature field that is looked at. With an
// Ed25519 key a field takes less than 1 KiB, with the largest RSA key that is supported about 17
// KiB.
const MaxFieldSize = 32 << 10

// strictBase64 rejects excess bits that are not zero.
var strictBase64 = base64.StdEncoding.Strict()

// parseSignature parses the value of the field Signature of a narinfo, VERSION;HOST;BASE64, where
// VERSION is 1 and BASE64 is the base64 encoding, in one piece, of an s-expression, each byte of
// which is a character in UTF-8: numbers that look like text are printed as such, and that has
// characters from U+0001 to U+00FF. (Guix, guix/narinfo.scm: narinfo-signature->canonical-sexp;
// Guile-Gcrypt, gcrypt/pk-crypto.scm: string->canonical-sexp.)
//
// Host is the name that the signing machine gave itself. It is not signed and can contain any
// characters but semicolons. Nothing says yet whether the signature is good.
func parseSignature(value string) (host string, s sexp, err error) {
	if len(value) > MaxFieldSize {
		return "", s, fmt.Errorf("%w: the field has %d bytes", ErrCorruptSignature, len(value))
	}
	version, rest, _ := strings.Cut(value, ";")
	host, text, ok := strings.Cut(rest, ";")
	if !ok || strings.Contains(text, ";") {
		return "", s, fmt.Errorf("%w: the field has not exactly three parts", ErrCorruptSignature)
	}
	if version != "1" {
		return "", s, fmt.Errorf("%w %.100q", ErrUnsupportedVersion, version)
	}
	// Go's decoder would skip line ends.
	if strings.ContainsAny(text, "\r\n") {
		return "", s, fmt.Errorf("%w: the third part contains a line end", ErrCorruptSignature)
	}
	decoded, err := strictBase64.DecodeString(text)
	if err != nil {
		return "", s, fmt.Errorf("%w: the third part is not base64: %w", ErrCorruptSignature, err)
	}
	characters, ok := bytesOfCharacters(decoded)
	if !ok || slices.Contains(characters, 0) { // which ends a text for Libgcrypt
		return "", s, fmt.Errorf("%w: the third part is not base64 of UTF-8 of characters from U+0001 to U+00FF", ErrCorruptSignature)
	}
	if s, err = parseSexp(characters); err != nil {
		return "", s, fmt.Errorf("%w: %w", ErrCorruptSignature, err)
	}
	return host, s, nil
}

// Signer returns what the signer of a narinfo calls itself in the field Signature, and its public
// key as an s-expression; empty if that cannot be read. Anyone can write any key into a signature,
// so both are good for showing only.
func Signer(field string) (host, key string) {
	host, s, err := parseSignature(field)
	if err != nil {
		return "", ""
	}
	if k, ok := s.find("public-key"); ok {
		key = k.oneLine()
	}
	return host, key
}

// Verify checks that field, the value of the field Signature of a narinfo, is a signature of digest
// by a key of the list; digest is the SHA-256 digest of the signed part of the narinfo. The error
// wraps the first that applies, in the order of Guix, of [ErrUnsupportedVersion] and
// [ErrCorruptSignature], [ErrUnauthorisedKey], [ErrHashMismatch], and [ErrInvalidSignature] (Guix,
// guix/pki.scm: %signature-status).
//
// Accepted are ECDSA signatures with (flags rfc6979) or (flags raw) and RSA signatures with (flags
// pkcs1), both over (hash sha256 …). Guix makes no others.
func (a *ACL) Verify(digest [32]byte, field string) error {
	_, s, err := parseSignature(field)
	if err != nil {
		return err
	}
	data, ok := s.find("data")
	if !ok {
		return fmt.Errorf("%w: no list \"data\"", ErrCorruptSignature)
	}
	subject, ok := s.find("public-key")
	if !ok {
		return fmt.Errorf("%w: no list \"public-key\"", ErrCorruptSignature)
	}
	key := a.lookup(subject)
	if key == nil {
		return fmt.Errorf("%w %.300s", ErrUnauthorisedKey, subject.oneLine())
	}
	if signed := hashValue(data); string(signed) != string(digest[:]) {
		return fmt.Errorf("%w: %.100x is signed, not %x", ErrHashMismatch, signed, digest)
	}
	value, ok := s.find("sig-val")
	if !ok {
		return fmt.Errorf("%w: no list \"sig-val\"", ErrInvalidSignature)
	}
	if err := key.verify(digest, data, value); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalidSignature, err)
	}
	return nil
}

// hashValue returns the value in the list (hash NAME VALUE) of data, or nil.
func hashValue(data sexp) []byte {
	hash, _ := data.find("hash")
	if hash.at(1).atom == nil {
		return nil
	}
	return hash.at(2).atom
}

// verify checks that value, (sig-val …), is a signature by k over data, (data …), in which the
// digest is known to stand.
func (k *PublicKey) verify(digest [32]byte, data, value sexp) error {
	if k.unusable != nil {
		return k.unusable
	}
	kind, form, names, flags := "ecdsa", "(ecdsa (r …) (s …))", []string{"r", "s"}, []string{"rfc6979", "raw"}
	if k.rsa != nil {
		kind, form, names, flags = "rsa", "(rsa (s …))", []string{"s"}, []string{"pkcs1"}
	}
	flagged := slices.ContainsFunc(flags, func(flag string) bool { return data.at(1).has("flags", flag) })
	if !flagged || !data.at(2).has("hash", "sha256", string(digest[:])) || len(data.list) != 3 {
		return fmt.Errorf("what is signed by such a key has one of the flags %q and a hash sha256, but here it is %.300s", flags, data.oneLine())
	}
	fields, _ := value.at(1).named(kind)
	numbers, ok := values(fields, names...)
	switch {
	case !ok || len(value.list) != 2:
		return fmt.Errorf("the signature by such a key is not of the form (sig-val %s)", form)
	case k.rsa != nil:
		return verifyRSA(k.rsa, digest, numbers[0])
	case !verifyECDSA(k.point, digest, numbers[0], numbers[1]):
		return errors.New("it was not made by the key that it names")
	}
	return nil
}
