// SPDX-License-Identifier: GPL-3.0-or-later

package acl

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"slices"

	"filippo.io/edwards25519"
	fe "filippo.io/edwards25519/field"
)

// ecdsaKey is a private key. Its number d is used as it is: it is neither hashed nor clamped as in
// EdDSA, and the public point is d·B.
type ecdsaKey struct {
	// secret is d, big-endian. Libgcrypt makes keys in which d is not less than n; the bytes matter
	// as such in the derivation of nonces.
	secret [32]byte
	// scalar is d modulo n.
	scalar *edwards25519.Scalar
}

// newECDSAKey makes a key of the big-endian number d, whose public point must be q.
func newECDSAKey(d []byte, q *edwards25519.Point) (*ecdsaKey, error) {
	k := new(ecdsaKey)
	d = bytes.TrimLeft(d, "\x00")
	if len(d) > len(k.secret) {
		return nil, errors.New("the secret number is too large")
	}
	copy(k.secret[len(k.secret)-len(d):], d)
	var wide [64]byte
	copy(wide[:], k.secret[:])
	slices.Reverse(wide[:len(k.secret)])
	var err error
	if k.scalar, err = new(edwards25519.Scalar).SetUniformBytes(wide[:]); err != nil {
		panic(err) // The length is right.
	}
	if new(edwards25519.Point).ScalarBaseMult(k.scalar).Equal(q) != 1 {
		return nil, errors.New("the secret number does not belong to the public point")
	}
	return k, nil
}

// sign returns the signature of digest: two big-endian numbers without leading zero bytes. What is
// secret takes constant time.
func (k *ecdsaKey) sign(digest [32]byte) (r, s []byte) {
	e := leftmostBits(digest)
	nonces := newNonces(k.secret, e)
	zero := new(edwards25519.Scalar)
	for {
		nonce := nonces.next()
		x, _, z, _ := new(edwards25519.Point).ScalarBaseMult(nonce).ExtendedCoordinates()
		var wide [64]byte
		copy(wide[:], x.Multiply(x, new(fe.Element).Invert(z)).Bytes())
		rScalar, err := new(edwards25519.Scalar).SetUniformBytes(wide[:])
		if err != nil {
			panic(err) // The length is right.
		}
		sScalar := new(edwards25519.Scalar).MultiplyAdd(rScalar, k.scalar, e)
		sScalar.Multiply(sScalar, nonce.Invert(nonce))
		if rScalar.Equal(zero) == 1 || sScalar.Equal(zero) == 1 {
			continue
		}
		return bigEndian(rScalar), bigEndian(sScalar)
	}
}

func bigEndian(s *edwards25519.Scalar) []byte {
	b := s.Bytes()
	slices.Reverse(b)
	return bytes.TrimLeft(b, "\x00")
}

// nonces derives the secret number of each signature from the private key and the digest (RFC 6979,
// section 3.2) with HMAC-SHA-256 and qlen = 253. Thus numbers are octet strings of 32 bytes, and of
// each block of output the leftmost 253 bits are taken; a result that is 0 or not less than n is
// skipped.
//
// The RFC wants the private number to be less than n. One that is not, as Libgcrypt makes them,
// goes in as it is, as in Libgcrypt.
type nonces struct {
	k, v  []byte
	later bool
}

func newNonces(secret [32]byte, e *edwards25519.Scalar) *nonces {
	digest := e.Bytes()
	slices.Reverse(digest)
	g := &nonces{k: make([]byte, sha256.Size), v: bytes.Repeat([]byte{1}, sha256.Size)}
	g.update([]byte{0}, secret[:], digest)
	g.update([]byte{1}, secret[:], digest)
	return g
}

// update replaces both halves of the state.
func (g *nonces) update(parts ...[]byte) {
	g.k = g.mac(append([][]byte{g.v}, parts...)...)
	g.v = g.mac(g.v)
}

func (g *nonces) mac(parts ...[]byte) []byte {
	h := hmac.New(sha256.New, g.k)
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

// next returns the next number that is at least 1 and less than n.
func (g *nonces) next() *edwards25519.Scalar {
	for {
		if g.later {
			g.update([]byte{0})
		}
		g.later = true
		g.v = g.mac(g.v)
		le := shiftDigest([32]byte(g.v))
		nonce, err := new(edwards25519.Scalar).SetCanonicalBytes(le[:])
		if err == nil && nonce.Equal(new(edwards25519.Scalar)) == 0 {
			return nonce
		}
	}
}
