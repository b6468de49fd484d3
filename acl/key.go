// SPDX-License-Identifier: GPL-3.0-or-later

package acl

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"filippo.io/edwards25519"
	fe "filippo.io/edwards25519/field"
)

// PublicKey is a public key: an s-expression (public-key …). Two keys are the same key if their
// expressions are, to the last byte of each atom; that one point can be encoded in several ways
// does not make them one key (Guix, guix/pki.scm: authorized-key?). It never changes and can be
// used by several goroutines at once.
type PublicKey struct {
	sexp sexp

	// At most one of these is set; if none is, unusable tells why.
	point    *publicPoint
	rsa      *rsa.PublicKey
	unusable error
}

// ParsePublicKey parses a text that contains an expression (public-key …), such as that of a file
// signing-key.pub. The key need not be usable.
func ParsePublicKey(text []byte) (*PublicKey, error) {
	s, err := parseFile(text)
	if err != nil {
		return nil, fmt.Errorf("public key: %w", err)
	}
	key, ok := s.find("public-key")
	if !ok {
		return nil, errors.New("public key: the text contains no list \"public-key\"")
	}
	return newPublicKey(key), nil
}

// newPublicKey makes a key of a list whose first element is public-key.
func newPublicKey(s sexp) *PublicKey {
	k := &PublicKey{sexp: s}
	k.unusable = k.decode()
	return k
}

// Usable returns nil if signatures by k can be verified, and else an error that says why none can.
// Usable are (ecc (curve Ed25519) (q …)), which is used for ECDSA, and (rsa (n …) (e …)) with a
// modulus of 1024 to 16384 bits and an odd public exponent below 2^31.
func (k *PublicKey) Usable() error { return k.unusable }

// Equal reports whether k and l are the same key.
func (k *PublicKey) Equal(l *PublicKey) bool { return k.sexp.equal(l.sexp) }

// String returns the expression on one line. It is safe to show on a terminal.
func (k *PublicKey) String() string { return k.sexp.oneLine() }

// Text returns the expression as Guix writes it to signing-key.pub.
func (k *PublicKey) Text() string { return k.sexp.String() }

// decode sets k.point or k.rsa.
func (k *PublicKey) decode() error {
	kind, v, err := k.sexp.numbers("public-key", []string{"curve", "q"}, []string{"n", "e"})
	switch {
	case err != nil:
	case kind == "rsa":
		k.rsa, err = newRSAKey(v[0], v[1])
	default:
		err = k.decodeECC(string(v[0]), v[1])
	}
	return err
}

// numbers takes (LIST (KIND (NAME NUMBER) …)) apart, where the names are those of an elliptic-curve
// key or an RSA key. It returns the kind, ecc, ecdsa or rsa, and the numbers in the order of the
// names.
func (s sexp) numbers(list string, ecc, rsa []string) (kind string, numbers [][]byte, err error) {
	if len(s.list) != 2 {
		return "", nil, fmt.Errorf("the list %q has not exactly one element", list)
	}
	// Libgcrypt prints ecc only, but understands ecdsa too.
	for kind, names := range map[string][]string{"ecc": ecc, "ecdsa": ecc, "rsa": rsa} {
		fields, ok := s.at(1).named(kind)
		if !ok {
			continue
		}
		if numbers, ok = values(fields, names...); !ok {
			return "", nil, fmt.Errorf("the list %q has other elements than %q", kind, names)
		}
		return kind, numbers, nil
	}
	return "", nil, errors.New("the key is neither of type ecc nor of type rsa")
}

func (k *PublicKey) decodeECC(curve string, q []byte) error {
	if curve != "Ed25519" {
		return fmt.Errorf("the curve is %.100q instead of Ed25519", curve)
	}
	point, err := decodePoint(q)
	if err == nil {
		k.point = newPublicPoint(point)
	}
	return err
}

// decodePoint decodes the public point of a key in the three forms that Libgcrypt knows: 32 bytes
// as in EdDSA (RFC 8032, section 5.1.2); the same after a byte 0x40; and both coordinates,
// big-endian, after a byte 0x04 (SEC 1, section 2.3.3).
func decodePoint(q []byte) (*edwards25519.Point, error) {
	var enc [32]byte
	switch {
	case len(q) == 32:
		copy(enc[:], q)
	case len(q) == 33 && q[0] == 0x40:
		copy(enc[:], q[1:])
	case len(q) == 65 && q[0] == 0x04:
		x, y := q[1:33], q[33:]
		copy(enc[:], y)
		slices.Reverse(enc[:])
		if enc[31]&0x80 != 0 {
			return nil, errors.New("a coordinate of the public point is too large")
		}
		enc[31] |= x[31] << 7
	default:
		return nil, fmt.Errorf("the public point has an unknown encoding of %d bytes", len(q))
	}
	p, err := new(edwards25519.Point).SetBytes(enc[:])
	if err != nil {
		return nil, errors.New("the public point is not on the curve")
	}
	// The decoder lets values pass that are not reduced.
	if [32]byte(p.Bytes()) != enc {
		return nil, errors.New("the encoding of the public point is not canonical")
	}
	if len(q) == 65 {
		px, _, pz, _ := p.ExtendedCoordinates()
		x := slices.Clone(q[1:33])
		slices.Reverse(x)
		if [32]byte(new(fe.Element).Multiply(px, new(fe.Element).Invert(pz)).Bytes()) != [32]byte(x) {
			return nil, errors.New("the public point is not on the curve")
		}
	}
	// A point of small order would make signatures that fit many messages.
	if new(edwards25519.Point).MultByCofactor(p).Equal(edwards25519.NewIdentityPoint()) == 1 {
		return nil, errors.New("the public point has a small order")
	}
	return p, nil
}

// The sizes of RSA moduli that are accepted, in bits. Go refuses smaller ones; larger ones are not
// found in practice and would be slow.
const (
	minRSABits = 1024
	maxRSABits = 16384
)

// newRSAKey makes a key of the big-endian numbers n and e.
func newRSAKey(n, e []byte) (*rsa.PublicKey, error) {
	n, e = bytes.TrimLeft(n, "\x00"), bytes.TrimLeft(e, "\x00")
	if len(n) > maxRSABits/8 || len(e) > 4 {
		return nil, errors.New("the RSA key has too large a modulus or exponent")
	}
	modulus, exponent := new(big.Int).SetBytes(n), new(big.Int).SetBytes(e).Int64()
	if bits := modulus.BitLen(); bits < minRSABits {
		return nil, fmt.Errorf("the RSA key has %d bits, less than %d", bits, minRSABits)
	}
	if modulus.Bit(0) == 0 || exponent < 3 || exponent > 1<<31-1 || exponent%2 == 0 {
		return nil, errors.New("the RSA key has an impossible modulus or exponent")
	}
	return &rsa.PublicKey{N: modulus, E: int(exponent)}, nil
}

// verifyRSA checks that the big-endian number s, with or without leading zero bytes, is a signature
// of digest by the key pub (RSASSA-PKCS1-v1_5: RFC 8017, section 8.2.2).
func verifyRSA(pub *rsa.PublicKey, digest [32]byte, s []byte) error {
	s = bytes.TrimLeft(s, "\x00")
	if len(s) > pub.Size() {
		return errors.New("it is longer than the modulus of the key")
	}
	padded := slices.Concat(make([]byte, pub.Size()-len(s)), s)
	if rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest[:], padded) != nil {
		return errors.New("it was not made by the key that it names")
	}
	return nil
}
