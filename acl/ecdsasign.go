// SPDX-License-Identifier: GPL-3.0-or-later

package acl

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"iter"
	"slices"

	"filippo.io/edwards25519"
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
	le := k.secret
	slices.Reverse(le[:])
	k.scalar = reduced(le[:])
	if new(edwards25519.Point).ScalarBaseMult(k.scalar).Equal(q) != 1 {
		return nil, errors.New("the secret number does not belong to the public point")
	}
	return k, nil
}

// sign returns the signature of digest: two big-endian numbers without leading zero bytes. What is
// secret takes constant time.
func (k *ecdsaKey) sign(digest [32]byte) (r, s []byte) {
	e := leftmostBits(digest)
	zero := new(edwards25519.Scalar)
	for nonce := range nonces(k.secret, e) {
		x, _, z, _ := new(edwards25519.Point).ScalarBaseMult(nonce).ExtendedCoordinates()
		rScalar := reduced(x.Multiply(x, z.Invert(z)).Bytes())
		sScalar := new(edwards25519.Scalar).MultiplyAdd(rScalar, k.scalar, e)
		sScalar.Multiply(sScalar, nonce.Invert(nonce))
		if rScalar.Equal(zero) == 1 || sScalar.Equal(zero) == 1 {
			continue
		}
		return bytes.TrimLeft(bigEndian(rScalar), "\x00"), bytes.TrimLeft(bigEndian(sScalar), "\x00")
	}
	panic("there is no end of nonces")
}

func bigEndian(s *edwards25519.Scalar) []byte {
	b := s.Bytes()
	slices.Reverse(b)
	return b
}

// nonces derives the secret numbers for a signature, of which the first that is of use is taken, from the private key and the digest (RFC 6979,
// section 3.2) with HMAC-SHA-256 and qlen = 253. Thus numbers are octet strings of 32 bytes, and of
// each block of output the leftmost 253 bits are taken; a result that is 0 or not less than n is
// skipped.
//
// The RFC wants the private number to be less than n. One that is not, as Libgcrypt makes them,
// goes in as it is, as in Libgcrypt.
func nonces(secret [32]byte, e *edwards25519.Scalar) iter.Seq[*edwards25519.Scalar] {
	key, v := make([]byte, sha256.Size), bytes.Repeat([]byte{1}, sha256.Size)
	mac := func(parts ...[]byte) []byte {
		h := hmac.New(sha256.New, key)
		for _, p := range parts {
			h.Write(p)
		}
		return h.Sum(nil)
	}
	update := func(parts ...[]byte) {
		key = mac(append([][]byte{v}, parts...)...)
		v = mac(v)
	}
	update([]byte{0}, secret[:], bigEndian(e))
	update([]byte{1}, secret[:], bigEndian(e))
	return func(yield func(*edwards25519.Scalar) bool) {
		for {
			v = mac(v)
			le := shiftDigest([32]byte(v))
			nonce, err := new(edwards25519.Scalar).SetCanonicalBytes(le[:])
			if err == nil && nonce.Equal(new(edwards25519.Scalar)) == 0 && !yield(nonce) {
				return
			}
			update([]byte{0})
		}
	}
}
