// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"encoding/base32"
	"errors"
	"fmt"

	"golang.org/x/crypto/blake2b"
)

// Reference names a block: the unkeyed BLAKE2b-256 of its encrypted bytes.
type Reference [32]byte

// Key is the ChaCha20 key of one block. Who has the reference and the key of a block can read it.
type Key [32]byte

// Pair is what a parent knows of a block: 32 bytes of reference, then 32 bytes of key in an internal node.
type Pair struct {
	Reference Reference
	Key       Key
}

// ConvergenceSecret keys the hashes from which the keys of leaves are made. Equal content gives equal blocks only under an
// equal secret. The zero value is the null convergence secret: the capability is then a function of content and block size,
// which is what publishers of public content want. Decoding needs no secret.
type ConvergenceSecret [32]byte

// referenceURNPrefix starts the URN of a reference.
const referenceURNPrefix = "urn:blake2b:"

// base32Text is the alphabet and form of all texts of ERIS: RFC 4648, section 6, upper case, without padding.
var base32Text = base32.StdEncoding.WithPadding(base32.NoPadding)

var errBase32 = errors.New("not the Base32 of 32 bytes (52 upper-case characters)")

// Sum returns the reference of a block, given its encrypted bytes. It does not look at the length.
func Sum(block []byte) Reference {
	return blake2b.Sum256(block)
}

// String returns the 52 characters of Base32 (RFC 4648, section 6, without padding) of the reference.
func (r Reference) String() string {
	return base32Text.EncodeToString(r[:])
}

// URN returns "urn:blake2b:" and the text of String.
func (r Reference) URN() string {
	return referenceURNPrefix + r.String()
}

// ParseReference reads what String returns. It is strict: exactly 52 characters, upper case only, spare bits zero.
func ParseReference(text string) (Reference, error) {
	var r Reference
	if err := decodeBase32(r[:], text); err != nil {
		return Reference{}, fmt.Errorf("block reference %s: %w", quote(text), err)
	}
	return r, nil
}

// ParseReferenceURN reads what URN returns. It is as strict as [ParseReference], but takes "urn:blake2b:" in any case, as
// RFC 8141, section 3.1, asks for.
func ParseReferenceURN(text string) (Reference, error) {
	rest, ok := cutPrefixFold(text, referenceURNPrefix)
	if !ok {
		return Reference{}, fmt.Errorf("block reference %s: does not start with %s", quote(text), referenceURNPrefix)
	}
	var r Reference
	if err := decodeBase32(r[:], rest); err != nil {
		return Reference{}, fmt.Errorf("block reference %s: %w", quote(text), err)
	}
	return r, nil
}

// ParseConvergenceSecret reads a convergence secret written as 52 characters of Base32 (RFC 4648, section 6, without
// padding). It is as strict as [ParseReference]. Its errors do not quote the text.
func ParseConvergenceSecret(text string) (ConvergenceSecret, error) {
	var s ConvergenceSecret
	if err := decodeBase32(s[:], text); err != nil {
		return ConvergenceSecret{}, fmt.Errorf("convergence secret: %w", errBase32)
	}
	return s, nil
}

// decodeBase32 fills dst from text, which must be the one and only way to write these bytes. Go's decoder skips line
// breaks and ignores the spare bits of the last character, hence the comparison.
func decodeBase32(dst []byte, text string) error {
	if len(text) != base32Text.EncodedLen(len(dst)) {
		return fmt.Errorf("has %d characters of Base32 instead of %d", len(text), base32Text.EncodedLen(len(dst)))
	}
	b, err := base32Text.DecodeString(text)
	if err != nil {
		return errors.New("not upper-case Base32")
	}
	if len(b) != len(dst) || base32Text.EncodeToString(b) != text {
		return errors.New("not the canonical Base32 of its bytes")
	}
	copy(dst, b)
	return nil
}

// cutPrefixFold cuts an ASCII prefix, given in lower case, off text, whatever the case of the letters there.
func cutPrefixFold(text, prefix string) (rest string, ok bool) {
	if len(text) < len(prefix) {
		return text, false
	}
	for i := range len(prefix) {
		c := text[i]
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		if c != prefix[i] {
			return text, false
		}
	}
	return text[len(prefix):], true
}

// quote makes a text of unknown origin fit for an error message: no control characters, bounded length.
func quote(text string) string {
	const most = 128
	if len(text) > most {
		return fmt.Sprintf("%q...", text[:most])
	}
	return fmt.Sprintf("%q", text)
}
