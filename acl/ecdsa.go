// SPDX-License-Identifier: GPL-3.0-or-later

package acl

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"iter"
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
	shifted := shiftDigest(digest)
	return reduced(shifted[:])
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
// least 1 and less than n.
func decodeScalar(be []byte) (s *edwards25519.Scalar, ok bool) {
	be = bytes.TrimLeft(be, "\x00")
	var le [32]byte
	if len(be) == 0 || len(be) > len(le) {
		return nil, false
	}
	copy(le[:], be)
	slices.Reverse(le[:len(be)])
	s, err := new(edwards25519.Scalar).SetCanonicalBytes(le[:])
	return s, err == nil
}

// reduced returns a little-endian number of at most 512 bits modulo n.
func reduced(le []byte) *edwards25519.Scalar {
	var wide [64]byte
	copy(wide[:], le)
	s, err := new(edwards25519.Scalar).SetUniformBytes(wide[:])
	if err != nil {
		panic(err) // The length is right.
	}
	return s
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
	rScalar, okR := decodeScalar(r)
	sScalar, okS := decodeScalar(s)
	if !okR || !okS {
		return false
	}
	w := invertPublic(sScalar)
	u1 := leftmostBits(digest)
	u1.Multiply(u1, w)
	u2 := w.Multiply(rScalar, w)
	return xIsCongruent(q.sum(u2, u1), rScalar)
}

// xIsCongruent reports whether the x coordinate of p, an integer less than 2^255 − 19, is congruent
// to r modulo n. It does without the inversion that x = X/Z takes: x is one of r, r+n, … r+7n, so X
// must be the product of Z and one of these. (One of 2^124 numbers r has no r+7n; that this is not
// looked at lets nobody find a signature.)
func xIsCongruent(p *edwards25519.Point, r *edwards25519.Scalar) bool {
	x, _, z, _ := p.ExtendedCoordinates()
	product, err := new(fe.Element).SetBytes(r.Bytes())
	if err != nil {
		panic(err) // The length is right.
	}
	product.Multiply(product, z)
	step := z.Multiply(orderElement, z)
	for range 8 {
		if product.Equal(x) == 1 {
			return true
		}
		product.Add(product, step)
	}
	return false
}

// orderElement is n as an element of the field.
var orderElement, _ = new(fe.Element).SetBytes(littleEndian(groupOrder))

func littleEndian(i *big.Int) []byte {
	le := i.FillBytes(make([]byte, 32))
	slices.Reverse(le)
	return le
}

// groupOrder is n.
var groupOrder, _ = new(big.Int).SetString("7237005577332262213973186563042994240857116359379907606001950938285454250989", 10)

// invertPublic returns the inverse modulo n of a number that is at least 1 and not secret. Euclid's
// algorithm takes variable time, but a quarter of that of the constant-time inversion of
// edwards25519.Scalar.
func invertPublic(s *edwards25519.Scalar) *edwards25519.Scalar {
	i := new(big.Int).SetBytes(bigEndian(s))
	return reduced(littleEndian(i.ModInverse(i, groupOrder)))
}

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

// nonces derives the secret numbers for a signature, of which the first that is of use is taken,
// from the private key and the digest (RFC 6979, section 3.2) with HMAC-SHA-256 and qlen = 253.
// Thus numbers are octet strings of 32 bytes, and of each block of output the leftmost 253 bits are
// taken; a result that is 0 or not less than n is skipped.
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
