// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"fmt"
	"math/bits"
)

// CBORTagReadCapability is the CBOR tag of a read capability: it stands on a byte string of
// [ReadCapabilitySize] bytes (IANA registry of CBOR tags, 276).
const CBORTagReadCapability = 276

// ReadCapabilitySize is the size in bytes of the binary form of a read capability.
const ReadCapabilitySize = 66

// urnPrefix starts the URN of a read capability.
const urnPrefix = "urn:eris:"

// ReadCapability is all that is needed, besides the blocks, to read a content. Capabilities can be
// compared with ==; equal ones denote equal content. It contains a key: who may see it may read the
// content.
type ReadCapability struct {
	BlockSize BlockSize
	Level     int // of the root: 0 if the content is a single leaf
	Root      Reference
	Key       Key
}

// Validate returns an error if the block size is none of the two, or the level is negative or above
// what content below 2⁶³ bytes needs: 14 for blocks of 1 KiB, 6 for 32 KiB. Whether the content
// exists and has this shape is another matter.
func (c ReadCapability) Validate() error {
	if !c.BlockSize.Valid() {
		return fmt.Errorf("read capability: block size of %d bytes is neither 1 KiB nor 32 KiB", int(c.BlockSize))
	}
	if c.Level < 0 || c.Level > c.BlockSize.maxLevel() {
		return fmt.Errorf("read capability: level %d with blocks of %v is out of range", c.Level, c.BlockSize)
	}
	return nil
}

// AppendBinary appends the 66 bytes of the capability to b: the binary logarithm of the block size,
// the level, the root reference, the root key (ERIS 1.0.0, section "Binary Encoding of Read
// Capability"). The capability must be valid.
func (c ReadCapability) AppendBinary(b []byte) []byte {
	b = append(b, byte(bits.TrailingZeros(uint(c.BlockSize))), byte(c.Level))
	b = append(b, c.Root[:]...)
	return append(b, c.Key[:]...)
}

// UnmarshalBinary reads what AppendBinary appends. It returns an error, and leaves c as it is,
// unless data has exactly 66 bytes that make a valid capability.
func (c *ReadCapability) UnmarshalBinary(data []byte) error {
	if len(data) != ReadCapabilitySize {
		return fmt.Errorf("read capability: has %d bytes instead of %d", len(data), ReadCapabilitySize)
	}
	var parsed ReadCapability
	switch data[0] {
	case 0x0a:
		parsed.BlockSize = BlockSize1KiB
	case 0x0f:
		parsed.BlockSize = BlockSize32KiB
	default:
		return fmt.Errorf("read capability: block size code %#02x is neither 0x0a nor 0x0f", data[0])
	}
	parsed.Level = int(data[1])
	copy(parsed.Root[:], data[2:34])
	copy(parsed.Key[:], data[34:66])
	if err := parsed.Validate(); err != nil {
		return err
	}
	*c = parsed
	return nil
}

// URN returns "urn:eris:" and the Base32 (RFC 4648, section 6, without padding) of the binary form,
// 115 characters in all. The capability must be valid; the URN of one that is not does not parse.
func (c ReadCapability) URN() string {
	var binary [ReadCapabilitySize]byte
	return string(base32Encoding.AppendEncode([]byte(urnPrefix), c.AppendBinary(binary[:0])))
}

// String returns the URN.
func (c ReadCapability) String() string { return c.URN() }

// ParseURN reads what URN returns, and nothing else: exactly 115 characters, upper-case Base32,
// spare bits zero, a valid capability. Only "urn:eris:" is taken in any case, as RFC 8141, section
// 3.1, asks for; its r-, q- and f-components are not defined for ERIS and are refused, and so are
// the namespaces of drafts ("urn:erisx2:" and the like), whose encoding is another. Errors quote no
// more than the start of the text, because the rest is a secret if the text is a capability.
func ParseURN(text string) (ReadCapability, error) {
	rest, ok := cutPrefixFold(text, urnPrefix)
	if !ok {
		return ReadCapability{}, fmt.Errorf("read capability: %.12q does not start with %s", text, urnPrefix)
	}
	var binary [ReadCapabilitySize]byte
	if err := decodeBase32(binary[:], rest); err != nil {
		return ReadCapability{}, fmt.Errorf("read capability: %w", err)
	}
	var c ReadCapability
	if err := c.UnmarshalBinary(binary[:]); err != nil {
		return ReadCapability{}, err
	}
	return c, nil
}
