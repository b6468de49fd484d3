// SPDX-License-Identifier: GPL-3.0-or-later

package fetch

import (
	"context"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// Counted returns blocks that tell how many bytes each block that has come has. got is called from many goroutines, and must
// not wait. What it returns is an [eris.Starter] where blocks are.
func Counted(blocks eris.VerifiedBlocks, got func(bytes int)) eris.VerifiedBlocks {
	c := &counted{VerifiedBlocks: blocks, got: got}
	c.starter, _ = blocks.(eris.Starter)
	return c
}

type counted struct {
	eris.VerifiedBlocks
	starter eris.Starter // the blocks, or nil
	got     func(bytes int)
}

func (c *counted) Get(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	block, err := c.VerifiedBlocks.Get(ctx, ref, size, dst)
	if err == nil {
		c.got(len(block))
	}
	return block, err
}

// Starts implements [eris.Starter].
func (c *counted) Starts() bool { return c.starter != nil && c.starter.Starts() }

// Start implements [eris.Starter].
func (c *counted) Start(ref eris.Reference, size eris.BlockSize, dst []byte, answered func()) eris.Request {
	if c.starter == nil {
		return nil
	}
	of := c.starter.Start(ref, size, dst, answered)
	if of == nil {
		return nil
	}
	return &countedRequest{of, c, int(size)}
}

type countedRequest struct {
	eris.Request
	blocks *counted
	size   int
}

// Verified implements [eris.Request].
func (r *countedRequest) Verified(err error) error {
	if err = r.Request.Verified(err); err == nil {
		r.blocks.got(r.size)
	}
	return err
}
