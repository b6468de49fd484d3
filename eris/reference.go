// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"encoding/base32"
	"errors"
	"fmt"
	"strings"
)

// Reference names a block: the unkeyed BLAKE2b-256 of its encrypted bytes.
type Reference [32]byte

// Key is the ChaCha20 key of one block. Who has the reference and the key of a block can read it.
type Key [32]byte

// Pair is what a parent knows of a block: 32 bytes of reference, then 32 bytes of key in an
// internal node.
type Pair struct {
	Reference Reference
	Key       Key
}

// ConvergenceSecret keys the hashes from which the keys of leaves are made. Equal content gives
// equal blocks only under an equal secret. The zero value is the null convergence secret: the
// capability is then a function of content and block size, which is what publishers of public
// content want. Decoding needs no secret.
type ConvergenceSecret [32]byte

// referenceURNPrefix starts the URN of a reference.
const referenceURNPrefix = "urn:blake2b:"

// String returns the 52 characters of Base32 (RFC 4648, section 6, without padding) of the
// reference.
func (r Reference) String() string {
	var text [52]byte
	return string(base32Encoding.AppendEncode(text[:0], r[:]))
}

// AppendText appends what String returns, and makes no garbage. It always returns nil.
func (r Reference) AppendText(b []byte) ([]byte, error) {
	return base32Encoding.AppendEncode(b, r[:]), nil
}

// URN returns "urn:blake2b:" and the text of String.
func (r Reference) URN() string {
	return referenceURNPrefix + r.String()
}

// ParseReference reads what String returns. It is strict: exactly 52 characters, upper case only,
// spare bits zero. It makes no garbage unless it fails.
func ParseReference[T string | []byte](text T) (Reference, error) {
	var r Reference
	if err := decodeBase32(r[:], text); err != nil {
		return Reference{}, fmt.Errorf("block reference %.128q: %w", string(text), err)
	}
	return r, nil
}

// ParseReferenceURN reads what URN returns. It is as strict as [ParseReference], but takes
// "urn:blake2b:" in any case, as RFC 8141, section 3.1, asks for.
func ParseReferenceURN(text string) (Reference, error) {
	rest, ok := cutPrefixFold(text, referenceURNPrefix)
	if !ok {
		return Reference{}, fmt.Errorf("block reference %.128q: does not start with %s", text, referenceURNPrefix)
	}
	return ParseReference(rest)
}

// ParseConvergenceSecret reads a convergence secret written as 52 characters of Base32 (RFC 4648,
// section 6, without padding). It is as strict as [ParseReference]. Its errors do not quote the
// text.
func ParseConvergenceSecret(text string) (ConvergenceSecret, error) {
	var s ConvergenceSecret
	if err := decodeBase32(s[:], text); err != nil {
		return ConvergenceSecret{}, errors.New("convergence secret: not the Base32 of 32 bytes (52 upper-case characters)")
	}
	return s, nil
}

// cutPrefixFold cuts an ASCII prefix off text, whatever the case of the letters there. No other
// letters fold to as many bytes.
func cutPrefixFold(text, prefix string) (rest string, ok bool) {
	if len(text) < len(prefix) || !strings.EqualFold(text[:len(prefix)], prefix) {
		return text, false
	}
	return text[len(prefix):], true
}

// base32Encoding is that of all texts of ERIS: RFC 4648, section 6, in upper case and without
// padding. Its decoder allocates, takes line breaks and passes over spare bits, hence decodeBase32.
var base32Encoding = base32.StdEncoding.WithPadding(base32.NoPadding)

// base32Values has the value of each character of the alphabet, and 0xff for all others.
var base32Values = func() (values [256]byte) {
	for i := range values {
		values[i] = 0xff
	}
	for i, c := range []byte("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567") {
		values[c] = byte(i)
	}
	return values
}()

// decodeBase32 fills dst from text, which must be the one and only way to write these bytes.
func decodeBase32[T string | []byte](dst []byte, text T) error {
	if len(text) != base32Encoding.EncodedLen(len(dst)) {
		return fmt.Errorf("has %d characters of Base32 instead of %d", len(text), base32Encoding.EncodedLen(len(dst)))
	}
	var n uint64
	var invalid byte
	bits, at := 0, 0
	for i := range len(text) {
		v := base32Values[text[i]]
		invalid |= v
		n = n<<5 | uint64(v&31)
		if bits += 5; bits >= 8 {
			bits -= 8
			dst[at] = byte(n >> bits)
			at++
		}
	}
	switch {
	case invalid > 31:
		return errors.New("not upper-case Base32")
	case n&(1<<bits-1) != 0:
		return errors.New("not the canonical Base32 of its bytes")
	}
	return nil
}
