// SPDX-License-Identifier: GPL-3.0-or-later

package acl

import (
	"math/big"
	"slices"

	"filippo.io/edwards25519"
	fe "filippo.io/edwards25519/field"
)

// What Guix calls a signature with an Ed25519 key is ECDSA (FIPS 186-5, section 6.4) with the group
// of edwards25519 in place of a NIST curve: the first coordinate of the random point is the x of
// the Edwards form, and integers are big-endian. Scalars are integers modulo n, the order of the
// base point B, which has 253 bits:
//
//	n = 2^252 + 27742317777372353535851937790883648493

// leftmostBits returns the number that ECDSA makes of a digest, its leftmost 253 bits, reduced
// modulo n (FIPS 186-5, section 6.4.1, steps 2 and 3).
func leftmostBits(digest [32]byte) *edwards25519.Scalar {
	var wide [64]byte
	shifted := shiftDigest(digest)
	copy(wide[:], shifted[:])
	e, err := new(edwards25519.Scalar).SetUniformBytes(wide[:])
	if err != nil {
		panic(err) // The length is right.
	}
	return e
}

// shiftDigest returns the leftmost 253 bits of a big-endian number of 256 bits, little-endian.
func shiftDigest(digest [32]byte) [32]byte {
	var out [32]byte
	for i := range out {
		out[31-i] = digest[i] >> 3
		if i > 0 {
			out[31-i] |= digest[i-1] << 5
		}
	}
	return out
}

// decodeScalar decodes a big-endian number, with or without leading zero bytes, that must be at
// least 1 and less than n. It also returns the number as 32 little-endian bytes.
func decodeScalar(be []byte) (s *edwards25519.Scalar, le [32]byte, ok bool) {
	for len(be) > 0 && be[0] == 0 {
		be = be[1:]
	}
	if len(be) == 0 || len(be) > len(le) {
		return nil, le, false
	}
	copy(le[:], be)
	slices.Reverse(le[:len(be)])
	s, err := new(edwards25519.Scalar).SetCanonicalBytes(le[:])
	return s, le, err == nil
}

// verifyECDSA reports whether (r, s) is a signature of digest by the key whose public point is q.
// Nothing here is secret, so it takes variable time.
func verifyECDSA(q *edwards25519.Point, digest [32]byte, r, s []byte) bool {
	rScalar, rBytes, ok := decodeScalar(r)
	if !ok {
		return false
	}
	_, sBytes, ok := decodeScalar(s)
	if !ok {
		return false
	}
	w := invertPublic(sBytes)
	u1 := leftmostBits(digest)
	u1.Multiply(u1, w)
	u2 := rScalar.Multiply(rScalar, w)
	point := new(edwards25519.Point).VarTimeDoubleScalarBaseMult(u2, q, u1)
	return xIsCongruent(point, rBytes)
}

// groupOrder is n.
var groupOrder, _ = new(big.Int).SetString("7237005577332262213973186563042994240857116359379907606001950938285454250989", 10)

// invertPublic returns the inverse modulo n of a number that is at least 1, less than n,
// little-endian, and not secret. Euclid's algorithm takes variable time, but a quarter of that of
// the constant-time inversion of edwards25519.Scalar.
func invertPublic(le [32]byte) *edwards25519.Scalar {
	slices.Reverse(le[:])
	var i big.Int
	i.SetBytes(le[:])
	i.ModInverse(&i, groupOrder)
	i.FillBytes(le[:])
	slices.Reverse(le[:])
	w, err := new(edwards25519.Scalar).SetCanonicalBytes(le[:])
	if err != nil {
		panic(err) // It is less than n.
	}
	return w
}

// orderElement is n as an element of the field.
var orderElement = func() fe.Element {
	le := [32]byte{
		0xed, 0xd3, 0xf5, 0x5c, 0x1a, 0x63, 0x12, 0x58, 0xd6, 0x9c, 0xf7, 0xa2, 0xde, 0xf9, 0xde, 0x14,
		31: 0x10,
	}
	n, err := new(fe.Element).SetBytes(le[:])
	if err != nil {
		panic(err) // The length is right.
	}
	return *n
}()

// lastResidue is 2^255 − 19 − 7n, little-endian: 7n can be added to a smaller number only without
// reaching 2^255 − 19.
var lastResidue = [32]byte{
	0x72, 0x34, 0x47, 0x75, 0x47, 0x4a, 0x7f, 0x97, 0x23, 0xb6, 0x3a, 0x8b, 0xe9, 0x2a, 0xe7, 0x6d,
	0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x0f,
}

// xIsCongruent reports whether the x coordinate of p, an integer less than 2^255 − 19, is congruent
// to r modulo n, where r is less than n and little-endian.
//
// It does without the inversion that x = X/Z takes: x is one of r, r+n, … r+7n, so X must be the
// product of Z and one of these.
func xIsCongruent(p *edwards25519.Point, r [32]byte) bool {
	x, _, z, _ := p.ExtendedCoordinates()
	var zero, rest, step fe.Element
	if _, err := rest.SetBytes(r[:]); err != nil {
		panic(err) // The length is right.
	}
	rest.Subtract(x, rest.Multiply(&rest, z))
	step.Multiply(&orderElement, z)
	for range 7 {
		if rest.Equal(&zero) == 1 {
			return true
		}
		rest.Subtract(&rest, &step)
	}
	return rest.Equal(&zero) == 1 && lessLE(r, lastResidue)
}

// lessLE compares two little-endian numbers.
func lessLE(a, b [32]byte) bool {
	for i := len(a) - 1; i >= 0; i-- {
		if a[i] != b[i] {
			return a[i] < b[i]
		}
	}
	return false
}
