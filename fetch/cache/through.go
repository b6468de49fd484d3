// SPDX-License-Identifier: GPL-3.0-or-later

package cache

import (
	"context"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// Through returns blocks that are looked for in a cache first, and kept there when
// they had to be got from elsewhere. The cache stays the caller's. If it is nil,
// Through returns blocks.
func Through(c *Cache, blocks eris.VerifiedBlocks) eris.VerifiedBlocks {
	if c == nil {
		return blocks
	}
	return &through{c, blocks}
}

type through struct {
	cache  *Cache
	blocks eris.VerifiedBlocks
}

func (t *through) Verified() {}

func (t *through) Get(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if block, err := t.cache.Get(ctx, ref, size, dst); err == nil {
		return block, nil
	}
	block, err := t.blocks.Get(ctx, ref, size, dst)
	if err == nil {
		t.cache.putMissing(&ref, block)
	}
	return block, err
}
