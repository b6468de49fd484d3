// SPDX-License-Identifier: GPL-3.0-or-later

package acl

import (
	"bytes"
	"encoding/hex"
	"math/big"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"filippo.io/edwards25519"
)

// The key and the signatures were made by Libgcrypt 1.10.1. The key is eccKey; these are the
// coordinates of its point.
const (
	vectorX = "76F6573CE851BD4CFB7EC08C64CF2067F307056B135728AD1FD5603ECBE8265E"
	vectorY = "445D25D6AF72DC983F571A89756483574AAAB6A58BEB3777E131A7F0B85D37B6"
)

var ecdsaVectors = []struct{ name, h, r, s string }{
	{"plain",
		"5891B5B522D5DF086D0FF0B110FBD9D21BB4FC7163AF34D08286A2E846F6BE03",
		"029002EB87604059A45053A3D4FBA52017B1CBFAEAD66548F1B817470FAD86F3",
		"03375D68BA3355D0CBDCA69C69AD734A5E525A2EEF47968D24F9946098AD4F01"},
	{"short r",
		"95A0DEEE3CD5E09EB02E66DF7E744CC31C262E97644E9A913B5A83E5203EFA6B",
		"C2204BFA44098B8BACD35C0F32C4F754E817277E91775568494FD95997DFCB",
		"0D07A44140037EA8032BBC32B4503C37FD785DE9ABBD8A481E2F84931B9F87EE"},
	{"short s",
		"CB8DD286A09BEAAE83CFD6CBF271A7A6F0EA12D447EABF2B4AD56075A9A5C5AF",
		"07A4A0EA56D743865AE6A30DD60BBA3277BC20B88C466D59F41A4D34D5462228",
		"4D3B1929D480B27CEB2D4883261E192903CBDFBAD06687B0656E660A55769A"},
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	must(t, err)
	return b
}

func vectorPoint(t testing.TB) *edwards25519.Point {
	t.Helper()
	q, err := decodePoint(unhex(t, eccQ))
	must(t, err)
	return q
}

func TestVerifyECDSA(t *testing.T) {
	q := newPublicPoint(vectorPoint(t))
	n := groupOrder
	for _, tt := range ecdsaVectors {
		t.Run(tt.name, func(t *testing.T) {
			h, r, s := [32]byte(unhex(t, tt.h)), unhex(t, tt.r), unhex(t, tt.s)
			add := func(b []byte, m *big.Int) []byte { return m.Add(m, new(big.Int).SetBytes(b)).Bytes() }
			negate := func(b []byte) []byte { return new(big.Int).Sub(n, new(big.Int).SetBytes(b)).Bytes() }
			for _, v := range []struct {
				name string
				r, s []byte
				want bool
			}{
				{"as it is", r, s, true},
				{"r with leading zeros", append(make([]byte, 40), r...), s, true},
				{"s with leading zeros", r, append(make([]byte, 3), s...), true},
				{"r without leading zeros", bytes.TrimLeft(r, "\x00"), s, true},
				{"r + n", add(r, new(big.Int).Set(n)), s, false},
				{"s + n", r, add(s, new(big.Int).Set(n)), false},
				{"n - r", negate(r), s, false},
				{"n - s", r, negate(s), false},
				{"r = 0", []byte{0}, s, false},
				{"s = 0", r, []byte{0, 0}, false},
				{"r = n", n.Bytes(), s, false},
				{"s = n", r, n.Bytes(), false},
				{"r empty", nil, s, false},
				{"s empty", r, nil, false},
				{"r and s exchanged", s, r, false},
				{"r with a trailing zero", append(slices.Clone(r), 0), s, false},
				{"r of 33 bytes", append([]byte{1}, append(make([]byte, 32-len(r)), r...)...), s, false},
				{"r of 1000 bytes", bytes.Repeat(r, 40), s, false},
			} {
				if got := verifyECDSA(q, h, v.r, v.s); got != v.want {
					t.Errorf("%s: %v, want %v", v.name, got, v.want)
				}
			}
			// The lowest three of the 256 bits do not enter into the signature.
			for bit := range 256 {
				flipped := h
				flipped[31-bit/8] ^= 1 << (bit % 8)
				if got := verifyECDSA(q, flipped, r, s); got != (bit < 3) {
					t.Errorf("bit %d of the digest flipped: %v", bit, got)
				}
			}
			if verifyECDSA(newPublicPoint(new(edwards25519.Point).Negate(q.Point)), h, r, s) {
				t.Error("accepted with the opposite point")
			}
		})
	}
}

// TestSum compares what is computed at first with what is computed after many uses, also for a
// point that is not in the subgroup of the base point.
func TestSum(t *testing.T) {
	two, err := new(edwards25519.Point).SetBytes(unhex(t, "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"))
	must(t, err)
	random := rand.New(rand.NewPCG(1, 2))
	scalar := func() *edwards25519.Scalar {
		var b [64]byte
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		s, _ := new(edwards25519.Scalar).SetUniformBytes(b[:])
		return s
	}
	q := vectorPoint(t)
	for _, point := range []*edwards25519.Point{q, two, new(edwards25519.Point).Add(q, two)} {
		p := newPublicPoint(point)
		for i := range 2 * manyUses {
			x, y := scalar(), scalar()
			if i%16 == 0 {
				x = edwards25519.NewScalar()
			}
			want := new(edwards25519.Point).VarTimeDoubleScalarBaseMult(x, point, y)
			if p.sum(x, y).Equal(want) != 1 {
				t.Fatalf("use %d: another point", i)
			}
		}
	}
}

func TestSignECDSA(t *testing.T) {
	key, err := newECDSAKey(unhex(t, eccD), vectorPoint(t))
	must(t, err)
	for _, tt := range ecdsaVectors {
		r, s := key.sign([32]byte(unhex(t, tt.h)))
		if !bytes.Equal(r, unhex(t, tt.r)) || !bytes.Equal(s, unhex(t, tt.s)) {
			t.Errorf("%s: signature %X, %X, want %s, %s", tt.name, r, s, tt.r, tt.s)
		}
	}
}

func TestDecodePoint(t *testing.T) {
	q := vectorPoint(t)
	flip := func(s string, i int) string {
		b := unhex(t, s)
		b[i] ^= 1
		return hex.EncodeToString(b)
	}
	p := new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 255), big.NewInt(19))
	opposite := new(big.Int).Sub(p, new(big.Int).SetBytes(unhex(t, vectorX)))
	for _, tt := range []struct {
		name, in string
		want     *edwards25519.Point // nil if it is an error
	}{
		{"32 bytes", eccQ, q},
		{"33 bytes", "40" + eccQ, q},
		{"65 bytes", "04" + vectorX + vectorY, q},
		{"opposite, 65 bytes", "04" + hex.EncodeToString(opposite.FillBytes(make([]byte, 32))) + vectorY, new(edwards25519.Point).Negate(q)},
		{"opposite, 32 bytes", eccQ[:62] + "c4", new(edwards25519.Point).Negate(q)},
		{"nothing", "", nil},
		{"31 bytes", eccQ[2:], nil},
		{"33 bytes, other prefix", "02" + eccQ, nil},
		{"65 bytes, other prefix", "40" + vectorX + vectorY, nil},
		{"64 bytes", vectorX + vectorY, nil},
		{"x is wrong, but its parity is right", "04" + flip(vectorX, 5) + vectorY, nil},
		{"x is wrong in its parity", "04" + flip(vectorX, 31) + vectorY, nil},
		{"y is too large", "04" + vectorX + "c4" + vectorY[2:], nil},
		{"not on the curve", "02" + strings.Repeat("00", 31), nil},
		{"y is not reduced", "F0" + strings.Repeat("FF", 30) + "7F", nil},
		{"x = 0 with a sign", "01" + strings.Repeat("00", 30) + "80", nil},
		{"identity", "01" + strings.Repeat("00", 31), nil},
		{"order 2", "EC" + strings.Repeat("FF", 30) + "7F", nil},
		{"order 4", strings.Repeat("00", 32), nil},
	} {
		got, err := decodePoint(unhex(t, tt.in))
		if tt.want == nil {
			if err == nil {
				t.Errorf("%s: no error", tt.name)
			}
		} else if err != nil || got.Equal(tt.want) != 1 {
			t.Errorf("%s: error %v or another point", tt.name, err)
		}
	}
}
