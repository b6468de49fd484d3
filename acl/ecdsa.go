// SPDX-License-Identifier: GPL-3.0-or-later

package acl

import (
	"math/big"
	"slices"
	"sync"
	"sync/atomic"

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

// A publicPoint is the point of a public key. It is safe for concurrent use.
type publicPoint struct {
	*edwards25519.Point
	used      atomic.Int64 // how often it was multiplied
	multiples func() *[64][16]edwards25519.Point
}

func newPublicPoint(q *edwards25519.Point) *publicPoint {
	p := &publicPoint{Point: q}
	p.multiples = sync.OnceValue(p.multiply)
	return p
}

// manyUses is after how many multiplications of a point it pays to make its multiples, which takes
// as long as a few signatures and 160 KB.
const manyUses = 64

// multiply returns the points d·16^i·p for each i and each digit d.
func (p *publicPoint) multiply() *[64][16]edwards25519.Point {
	var table [64][16]edwards25519.Point
	base := p.Point
	for i := range table {
		row := &table[i]
		row[0].Set(edwards25519.NewIdentityPoint())
		for d := 1; d < len(row); d++ {
			row[d].Add(&row[d-1], base)
		}
		base = new(edwards25519.Point).Add(&row[15], base)
	}
	return &table
}

// sum returns x·p + y·B in variable time. All narinfos of a server are signed by one key, so that
// of many signatures most are by a point whose multiples are known, which saves all doublings.
func (p *publicPoint) sum(x, y *edwards25519.Scalar) *edwards25519.Point {
	sum := new(edwards25519.Point)
	if p.used.Add(1) <= manyUses {
		return sum.VarTimeDoubleScalarBaseMult(x, p.Point, y)
	}
	sum.ScalarBaseMult(y)
	table := p.multiples()
	for i, b := range x.Bytes() {
		if low := b & 15; low != 0 {
			sum.Add(sum, &table[2*i][low])
		}
		if high := b >> 4; high != 0 {
			sum.Add(sum, &table[2*i+1][high])
		}
	}
	return sum
}

// verifyECDSA reports whether (r, s) is a signature of digest by the key whose public point is q.
// Nothing here is secret, so it takes variable time.
func verifyECDSA(q *publicPoint, digest [32]byte, r, s []byte) bool {
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
	return xIsCongruent(q.sum(u2, u1), rBytes)
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
