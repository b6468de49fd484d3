// SPDX-License-Identifier: GPL-3.0-or-later

package fetch

import (
	"context"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// A Pipeline is an [eris.Sink] that puts blocks into a store, many at a time: a store that is asked
// to keep a block durably answers late, but it answers many requests almost as soon as one. It is
// safe for concurrent use.
type Pipeline struct {
	ctx   context.Context // ends with the first failure
	group *errgroup.Group
	store Store
	room  *semaphore.Weighted // bytes

	mu      sync.Mutex
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

// NewPipeline returns a pipeline into store, which stays the caller's. When ctx ends, or a block
// fails, those fail that have not been stored yet.
func NewPipeline(ctx context.Context, store Store) *Pipeline {
	p := &Pipeline{store: store, room: semaphore.NewWeighted(pipelineBytes), seen: map[eris.Reference]struct{}{}}
	p.buffers.New = func() any { return new([]byte) }
	p.group, p.ctx = errgroup.WithContext(ctx)
	return p
}

// Put takes a block over. The error is that of an earlier block or of ctx, which is that of waiting
// for room only: it may end, as the context of an encoder does, before the block is stored.
func (p *Pipeline) Put(ctx context.Context, ref eris.Reference, block []byte) error {
	if err := context.Cause(p.ctx); err != nil || p.isTwice(ref) {
		return err
	}
	cost := int64(len(block) + pipelineCost)
	if err := p.room.Acquire(ctx, cost); err != nil {
		return err
	}
	buffer := p.buffers.Get().(*[]byte)
	*buffer = append((*buffer)[:0], block...)
	p.group.Go(func() error {
		defer p.room.Release(cost)
		err := p.store.Put(p.ctx, ref, *buffer)
		p.buffers.Put(buffer)
		if err == nil {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.blocks++
			p.bytes += int64(len(block))
		}
		return err
	})
	return nil
}

func (p *Pipeline) isTwice(ref eris.Reference) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, twice := p.seen[ref]
	if len(p.seen) == maxSeen {
		clear(p.seen)
	}
	p.seen[ref] = struct{}{}
	return twice
}

// Flush waits until every block has been stored, and returns the first error. It must be called
// once, before the pipeline is given up, and before anybody is told of the blocks.
func (p *Pipeline) Flush() error { return p.group.Wait() }

// Stored returns how many blocks have been stored so far, and how many bytes they have. Blocks that
// were given twice count once, mostly.
func (p *Pipeline) Stored() (blocks, bytes int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.blocks, p.bytes
}
