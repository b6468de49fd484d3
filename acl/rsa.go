// SPDX-License-Identifier: GPL-3.0-or-later

package acl

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"errors"
	"fmt"
	"math/big"
)

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
	padded := make([]byte, pub.Size())
	copy(padded[len(padded)-len(s):], s)
	if rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest[:], padded) != nil {
		return errors.New("it was not made by the key that it names")
	}
	return nil
}
