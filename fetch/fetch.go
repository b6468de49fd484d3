// SPDX-License-Identifier: GPL-3.0-or-later

// Package fetch is where blocks come from and go to. A [Source] has blocks, a
// [Store] takes them as well; there is a package below this one for each kind,
// named by the kind of URL that it serves, and all of them pass the suite in
// fetch/sourcetest. Start with [Source].
package fetch

import (
	"context"
	"errors"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// A Source has blocks. It is safe for concurrent use, and made for many calls at
// the same time: the more there are, the better it uses its connection. It may be an
// [eris.Starter] as well.
type Source interface {
	// Get is the method of [eris.Blocks]. It returns eris.ErrNotFound, wrapped or
	// not, for a block that the source does not have, an [eris.BlockError] for
	// bytes that are not the block, and the cause of ctx when that is done. After
	// any other error the source may work again later.
	//
	// Each block has been checked against its reference when Get returns it.
	eris.Blocks
	// String returns the URL of the source without anything secret, for
	// messages.
	String() string
	// Close lets go of everything. Calls that are under way fail.
	Close() error
}

// A Store is a Source that takes blocks.
type Store interface {
	Source
	// Put stores a block. When it returns nil the block is stored durably, as far
	// as the store can tell. Errors wrap [ErrReadOnly] if the store takes no
	// blocks from us.
	Put(ctx context.Context, ref eris.Reference, block []byte) error
}

// ErrReadOnly is returned by stores that take no blocks, or none from us.
var ErrReadOnly = errors.New("store is read-only")
