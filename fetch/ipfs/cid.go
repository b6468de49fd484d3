// SPDX-License-Identifier: GPL-3.0-or-later

package ipfs

import (
	"encoding/base32"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// cidPrefix is what stands before the digest in the binary form of a CID: version 1; the codec
// "raw" (0x55), because IPFS knows nothing of what is in the block; and a multihash of the kind
// blake2b-256 (0xb220 as a variable-length number) with 32 bytes
// (https://github.com/multiformats/cid, https://github.com/multiformats/multicodec).
const cidPrefix = "\x01\x55\xa0\xe4\x02\x20"

// cidText is Base32 as multibase has it under the prefix "b": lower case, no padding.
var cidText = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// CID returns the name under which IPFS knows an encrypted block: CIDv1, codec raw, hash
// BLAKE2b-256, in Base32. The digest in it is the reference itself, since both are BLAKE2b-256 of
// the same bytes; so a node that checks what it gets, as all do, checks what we would. All names
// are 62 characters long and begin with "bafk2bzace".
func CID(ref eris.Reference) string {
	return "b" + cidText.EncodeToString(append([]byte(cidPrefix), ref[:]...))
}
