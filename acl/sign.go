// SPDX-License-Identifier: GPL-3.0-or-later

package acl

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"unicode"
	"unicode/utf8"

	"filippo.io/edwards25519"
)

// SigningKey is a pair of keys with which narinfos are signed. It never changes and can be used by
// several goroutines at once.
type SigningKey struct {
	public *PublicKey
	// private is the expression (private-key …).
	private sexp

	// One of these is set.
	ecdsa *ecdsaKey
	rsa   *rsa.PrivateKey
}

// ParseSigningKey parses a key pair as `guix archive --generate-key` makes it: the texts of
// signing-key.sec, with an expression (private-key …), and of signing-key.pub, with the (public-key
// …) that belongs to it. If public is empty, the public key is made of what the private key says.
//
// The private key is (ecc (curve Ed25519) (q …) (d …)) or (rsa (n …) (e …) (d …) (p …) (q …) (u
// …)). No error says anything about secret numbers.
func ParseSigningKey(secret, public []byte) (*SigningKey, error) {
	s, err := parseFile(secret)
	if err != nil {
		return nil, fmt.Errorf("private key: %w", err)
	}
	private, ok := s.find("private-key")
	if !ok {
		return nil, errors.New("private key: the text contains no list \"private-key\"")
	}
	k := &SigningKey{private: private}
	if err := k.decode(); err != nil {
		return nil, fmt.Errorf("private key: %w", err)
	}
	if len(public) == 0 {
		return k, nil
	}
	given, err := ParsePublicKey(public)
	if err != nil {
		return nil, err
	}
	if err := given.Usable(); err != nil {
		return nil, fmt.Errorf("public key: %w", err)
	}
	if !k.public.sameNumbers(given) {
		return nil, errors.New("the public key does not belong to the private key")
	}
	k.public = given
	return k, nil
}

// sameNumbers reports whether two usable keys are mathematically the same.
func (k *PublicKey) sameNumbers(l *PublicKey) bool {
	if k.rsa != nil {
		return l.rsa != nil && k.rsa.Equal(l.rsa)
	}
	return l.point != nil && k.point.Equal(l.point.Point) == 1
}

// decode sets all of k but k.private.
func (k *SigningKey) decode() error {
	eccNames, rsaNames := []string{"curve", "q", "d"}, []string{"n", "e", "d", "p", "q", "u"}
	kind, v, err := k.private.numbers("private-key", eccNames, rsaNames)
	if err != nil {
		return err
	}
	names := eccNames
	if kind == "rsa" {
		names = rsaNames
	}
	k.public = newPublicKey(list("public-key", list(kind, field(names[0], v[0]), field(names[1], v[1]))))
	if err := k.public.Usable(); err != nil {
		return err
	}
	if kind == "rsa" {
		return k.decodeRSA(v[2], v[3], v[4])
	}
	k.ecdsa, err = newECDSAKey(v[2], k.public.point.Point)
	return err
}

func (k *SigningKey) decodeRSA(d, p, q []byte) error {
	for _, number := range [][]byte{d, p, q} {
		if len(number) > maxRSABits/8+1 {
			return errors.New("a number of the RSA key is too large")
		}
	}
	k.rsa = &rsa.PrivateKey{
		PublicKey: *k.public.rsa,
		D:         new(big.Int).SetBytes(d),
		Primes:    []*big.Int{new(big.Int).SetBytes(p), new(big.Int).SetBytes(q)},
	}
	if k.rsa.Validate() != nil {
		return errors.New("the numbers of the RSA key do not belong together")
	}
	k.rsa.Precompute()
	return nil
}

// GenerateSigningKey makes a new key pair of the kind that `guix archive --generate-key` makes,
// from the system's source of random numbers.
func GenerateSigningKey() *SigningKey {
	var seed [64]byte
	rand.Read(seed[:])
	d := reduced(seed[:])
	q := new(edwards25519.Point).ScalarBaseMult(d).Bytes()
	k := &SigningKey{private: list("private-key",
		list("ecc", field("curve", "Ed25519"), field("q", q), field("d", bytes.TrimLeft(bigEndian(d), "\x00"))))}
	if err := k.decode(); err != nil {
		panic(err) // It was just made.
	}
	return k
}

// PublicKey returns the public key of the pair.
func (k *SigningKey) PublicKey() *PublicKey { return k.public }

// SecretText returns the private key as Guix writes it to signing-key.sec. It must be stored where
// only its owner can read it.
func (k *SigningKey) SecretText() string { return k.private.String() }

// Sign returns the value of the field Signature of a narinfo, 1;HOST;BASE64, where digest is the
// SHA-256 digest of its signed part. host is shown to people; Guix writes the name of the machine.
// The result depends on nothing else. It fails if host is not UTF-8 or contains a semicolon or a
// control character (Guix, guix/scripts/publish.scm: narinfo-string and signed-string;
// guix/pki.scm: signature-sexp).
func (k *SigningKey) Sign(digest [32]byte, host string) (string, error) {
	if !utf8.ValidString(host) || strings.ContainsFunc(host, func(r rune) bool { return r == ';' || unicode.IsControl(r) }) {
		return "", fmt.Errorf("signature: unusable host name %.100q", host)
	}
	var flag string
	var value sexp
	if k.rsa != nil {
		s, err := rsa.SignPKCS1v15(nil, k.rsa, crypto.SHA256, digest[:])
		if err != nil {
			return "", fmt.Errorf("signature: %w", err)
		}
		flag, value = "pkcs1", list("rsa", field("s", s))
	} else {
		r, s := k.ecdsa.sign(digest)
		flag, value = "rfc6979", list("ecdsa", field("r", r), field("s", s))
	}
	data := list("data", field("flags", flag), list("hash", atom("sha256"), atom(digest[:])))
	signature := list("signature", data, list("sig-val", value), k.public.sexp)
	return "1;" + host + ";" + strictBase64.EncodeToString([]byte(signature.String())), nil
}
