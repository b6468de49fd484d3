// SPDX-License-Identifier: GPL-3.0-or-later

package fetch

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// InOrder asks several sources for each block, one after the other, until one has
// it. A source that has given wrong bytes is not asked again. It implements
// [eris.Blocks].
type InOrder struct {
	sources []*orderedSource
	onFault func(source string, err error)
}

type orderedSource struct {
	Source
	banned atomic.Bool
}

// NewInOrder returns the sources in order; they stay the caller's. onFault, if it
// is not nil, is called once for each source that gives wrong bytes.
func NewInOrder(sources []Source, onFault func(source string, err error)) *InOrder {
	o := &InOrder{onFault: onFault}
	for _, s := range sources {
		o.sources = append(o.sources, &orderedSource{Source: s})
	}
	return o
}

// Verified implements [eris.VerifiedBlocks]: sources verify what they return.
func (o *InOrder) Verified() {}

// Get implements [eris.Blocks]. When no source has the block, the error is
// eris.ErrNotFound if all have said so, else that of a source that could not say.
func (o *InOrder) Get(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	var failed error
	for _, s := range o.sources {
		if s.banned.Load() {
			continue
		}
		block, err := s.Get(ctx, ref, size, dst)
		if err == nil {
			return block, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if errors.Is(err, eris.ErrNotFound) {
			continue
		}
		failed = fmt.Errorf("%s: %w", s, err)
		var wrong *eris.BlockError
		if errors.As(err, &wrong) && !s.banned.Swap(true) && o.onFault != nil {
			o.onFault(s.String(), err)
		}
	}
	if failed == nil {
		failed = fmt.Errorf("block %v: %w", ref, eris.ErrNotFound)
	}
	return nil, failed
}
