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
	t := &through{cache: c, blocks: blocks}
	t.starter, _ = blocks.(eris.Starter)
	return t
}

type through struct {
	cache   *Cache
	blocks  eris.VerifiedBlocks
	starter eris.Starter // the blocks, or nil
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

// Starts implements [eris.Starter].
func (t *through) Starts() bool { return t.starter != nil && t.starter.Starts() }

// Start implements [eris.Starter]. It returns nil for a block that is in the cache.
func (t *through) Start(ref eris.Reference, size eris.BlockSize, dst []byte, answered func()) eris.Request {
	if t.starter == nil || t.cache.Has(context.Background(), ref, size) {
		return nil
	}
	of := t.starter.Start(ref, size, dst, answered)
	if of == nil {
		return nil
	}
	return &request{Request: of, cache: t.cache, ref: ref}
}

// request is a request for a block that will be kept.
type request struct {
	eris.Request
	cache *Cache
	ref   eris.Reference
	block []byte
}

// Finish implements [eris.Request].
func (r *request) Finish() ([]byte, error) {
	var err error
	r.block, err = r.Request.Finish()
	return r.block, err
}

// Verified implements [eris.Request].
func (r *request) Verified(err error) error {
	if err = r.Request.Verified(err); err == nil {
		r.cache.putMissing(&r.ref, r.block)
	}
	return err
}
