// SPDX-License-Identifier: GPL-3.0-or-later

package fetch

import (
	"context"
	"sync"

	"golang.org/x/sync/semaphore"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// A Pipeline is an [eris.Sink] that puts blocks into a store, many at a time: a store that is asked
// to keep a block durably answers late, but it answers many requests almost as soon as one. It is
// safe for concurrent use.
type Pipeline struct {
	ctx   context.Context
	store Store
	room  *semaphore.Weighted // bytes

	wait    sync.WaitGroup
	mu      sync.Mutex
	failed  error
	seen    map[eris.Reference]struct{}
	buffers sync.Pool
	blocks  int64
	bytes   int64
}

const (
	// pipelineBytes bounds the blocks that are under way.
	pipelineBytes = 32 << 20
	// pipelineCost is what a block counts beside its bytes: a goroutine.
	pipelineCost = 4 << 10
	// maxSeen is how many references are remembered, so that a block that occurs often is put once.
	maxSeen = 1 << 17
)

// NewPipeline returns a pipeline into store, which stays the caller's. When ctx ends, blocks that
// have not been stored yet fail.
func NewPipeline(ctx context.Context, store Store) *Pipeline {
	return &Pipeline{
		ctx:   ctx,
		store: store,
		room:  semaphore.NewWeighted(pipelineBytes),
		seen:  map[eris.Reference]struct{}{},
	}
}

// Put takes a block over. The error is that of an earlier block or of ctx, which is that of waiting
// for room only: it may end, as the context of an encoder does, before the block is stored.
func (p *Pipeline) Put(ctx context.Context, ref eris.Reference, block []byte) error {
	p.mu.Lock()
	err := p.failed
	_, twice := p.seen[ref]
	if err == nil && !twice {
		if len(p.seen) == maxSeen {
			clear(p.seen)
		}
		p.seen[ref] = struct{}{}
	}
	p.mu.Unlock()
	if err != nil || twice {
		return err
	}
	cost := int64(len(block) + pipelineCost)
	if err := p.room.Acquire(ctx, cost); err != nil {
		return err
	}
	buffer, _ := p.buffers.Get().(*[]byte)
	if buffer == nil {
		buffer = new([]byte)
	}
	*buffer = append((*buffer)[:0], block...)
	p.wait.Go(func() {
		defer p.room.Release(cost)
		err := p.store.Put(p.ctx, ref, *buffer)
		p.buffers.Put(buffer)
		p.mu.Lock()
		defer p.mu.Unlock()
		switch {
		case err == nil:
			p.blocks++
			p.bytes += int64(len(block))
		case p.failed == nil:
			p.failed = err
		}
	})
	return nil
}

// Flush waits until every block has been stored, and returns the first error. It must be called
// before the pipeline is given up, and before anybody is told of the blocks.
func (p *Pipeline) Flush() error {
	p.wait.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.failed
}

// Stored returns how many blocks have been stored so far, and how many bytes they have. Blocks that
// were given twice count once, mostly.
func (p *Pipeline) Stored() (blocks, bytes int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.blocks, p.bytes
}
