// SPDX-License-Identifier: GPL-3.0-or-later

// Package transfer puts blocks from dumps and directories into stores. Start with [Import].
package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/dir"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/dump"
)

// Blocks calls f for each of some blocks, which are not verified and whose memory is used again,
// until it returns an error, and returns the read capabilities that came with them.
type Blocks func(f func(ref eris.Reference, block []byte) error) ([]eris.ReadCapability, error)

// FromDump returns the blocks of a dump that is read from r, once.
func FromDump(r io.Reader) Blocks {
	return func(f func(eris.Reference, []byte) error) ([]eris.ReadCapability, error) { return dump.Read(r, f) }
}

// FromDirectory returns the blocks of a directory, as package fetch/dir keeps them.
func FromDirectory(name string) Blocks {
	return func(f func(eris.Reference, []byte) error) ([]eris.ReadCapability, error) {
		return nil, dir.Each(name, f)
	}
}

// Imported tells what has been put into a store.
type Imported struct {
	Blocks  int64 `json:"blocks"`
	Bytes   int64 `json:"bytes"`
	Damaged int64 `json:"damaged"` // blocks that are not what their references say, and were left out
	// Capabilities are those that came with the blocks.
	Capabilities []eris.ReadCapability `json:"-"`
}

// ErrCut is wrapped by the error of a dump that ends too early.
var ErrCut = errors.New("the dump is cut off")

// Import verifies blocks and puts those that are right into a store; got, which must not wait, is
// told the length of each. Blocks that the store has are put once more, so that an import that was
// cut off is resumed by doing it again. What the result counts is stored, also with an error, which
// is that of the blocks, of the store or of ctx.
func Import(ctx context.Context, store fetch.Store, blocks Blocks, got func(bytes int)) (result Imported, err error) {
	pipeline := fetch.NewPipeline(ctx, store)
	result.Capabilities, err = blocks(func(ref eris.Reference, block []byte) error {
		got(len(block))
		if eris.Verify(ref, block) != nil {
			result.Damaged++
			return ctx.Err()
		}
		return pipeline.Put(ctx, ref, block)
	})
	stored := pipeline.Flush()
	result.Blocks, result.Bytes = pipeline.Stored()
	var format *dump.FormatError
	switch {
	case stored != nil:
		return result, fmt.Errorf("storing the blocks: %w", stored)
	case errors.As(err, &format) && format.Err == io.ErrUnexpectedEOF:
		return result, fmt.Errorf("%w at byte %d", ErrCut, format.Offset)
	}
	return result, err
}
