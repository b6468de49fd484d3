// SPDX-License-Identifier: GPL-3.0-or-later

package fetch_test

import (
	"context"
	"errors"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
)

func TestPipelineOutlivesEncoder(t *testing.T) {
	backend := sourcetest.NewBackend()
	store := backend.Open(1)
	defer store.Close()
	whole, stop := context.WithCancel(t.Context())
	defer stop()
	pipeline := fetch.NewPipeline(whole, store)
	put := func(n byte) eris.Reference {
		block := make([]byte, eris.BlockSize1KiB)
		block[0] = n
		ref := eris.Sum(block)
		ctx, cancel := context.WithCancel(t.Context())
		if err := pipeline.Put(ctx, ref, block); err != nil {
			t.Fatal(err)
		}
		backend.AwaitHeld(1)
		cancel()
		return ref
	}
	release := backend.Hold()
	ref := put(1)
	release()
	if err := pipeline.Flush(); err != nil || !backend.Has(ref) {
		t.Errorf("the block was not stored: %v", err)
	}
	release = backend.Hold()
	defer release()
	ref = put(2)
	stop()
	if err := pipeline.Flush(); !errors.Is(err, context.Canceled) || backend.Has(ref) {
		t.Errorf("after the end of the pipeline's context: %v", err)
	}
}
