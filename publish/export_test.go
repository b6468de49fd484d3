// SPDX-License-Identifier: GPL-3.0-or-later

package publish

import (
	"crypto/sha256"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// Known returns what narinfos say of a store item if it need not be computed.
func (c *Capabilities) Known(path string, narHash [sha256.Size]byte) (values []narinfo.ERIS, ok bool) {
	k, ok := c.lookUp(path, narHash)
	return c.values(k), ok
}
