// SPDX-License-Identifier: GPL-3.0-or-later

package fetch

import (
	"context"
	"errors"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
)

// Limited returns a source that asks another one for at most as many bytes per
// second as the limiter lets through, which may be shared by several sources.
// Blocks that are not there do not count; what a transport adds to a block does
// not either. Without a limiter it returns the source itself. To close it is to
// close the source.
func Limited(source Source, limiter *ratelimit.Limiter) Source {
	if limiter == nil {
		return source
	}
	return &limited{source, limiter}
}

type limited struct {
	Source
	limiter *ratelimit.Limiter
}

// Get waits before it asks, so that what it asked for is never held up.
func (l *limited) Get(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	if err := l.limiter.WaitN(ctx, int(size)); err != nil {
		return nil, err
	}
	block, err := l.Source.Get(ctx, ref, size, dst)
	var wrong *eris.BlockError
	if err != nil && !errors.As(err, &wrong) { // wrong bytes have come all the same
		l.limiter.Return(int(size))
	}
	return block, err
}
