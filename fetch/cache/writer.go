// SPDX-License-Identifier: GPL-3.0-or-later

package cache

import (
	"fmt"
	"sync"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// A writer has the blocks that wait to be written. While one batch is written the
// next fills, so that the more there is to do, the less each block costs.
type writer struct {
	most int // bytes of a batch

	mu       sync.Mutex
	filling  batch
	spare    batch
	running  bool // there is a goroutine that writes
	closed   bool
	impeded  bool // somebody has waited for long; nobody else does until there is room
	swapped  chan struct{}
	failed   error
	finished sync.WaitGroup
}

// A batch is a number of blocks, one behind the other.
type batch struct {
	blocks []waiting
	data   []byte
}

type waiting struct {
	ref  eris.Reference
	size eris.BlockSize
}

// add has a block written.
func (c *Cache) add(ref *eris.Reference, block []byte) {
	w := &c.writer
	var timer *time.Timer
	w.mu.Lock()
	defer w.mu.Unlock()
	for !w.closed && len(w.filling.data)+len(block) > w.most {
		if w.impeded {
			return
		}
		swapped := w.swapped
		w.mu.Unlock()
		if timer == nil {
			timer = time.NewTimer(patience)
			defer timer.Stop()
		}
		late := false
		select {
		case <-swapped:
		case <-timer.C:
			late = true
		}
		w.mu.Lock()
		if late {
			w.impeded = true
		}
	}
	if w.closed || c.ring == nil {
		return
	}
	if w.filling.data == nil {
		w.filling.data = make([]byte, 0, w.most)
	}
	w.filling.data = append(w.filling.data, block...)
	w.filling.blocks = append(w.filling.blocks, waiting{*ref, eris.BlockSize(len(block))})
	if !w.running {
		w.running = true
		w.finished.Go(c.write)
	}
}

// write writes batches until nothing waits.
func (c *Cache) write() {
	w := &c.writer
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.filling.blocks) > 0 {
		b := w.filling
		w.filling, w.spare = w.spare, batch{}
		w.impeded = false
		close(w.swapped)
		w.swapped = make(chan struct{})
		w.mu.Unlock()
		err := c.writeBatch(b)
		b.blocks, b.data = b.blocks[:0], b.data[:0]
		w.mu.Lock()
		w.spare = b
		if err != nil {
			w.failed = err
		}
	}
	w.running = false
}

func (c *Cache) writeBatch(b batch) error {
	if c.pausing() {
		return nil
	}
	r := c.use()
	if r == nil {
		return nil
	}
	defer c.open.RUnlock()
	err := r.write(b)
	if err != nil {
		c.paused.Store(time.Now().Add(pause).UnixNano())
		err = fmt.Errorf("cache of blocks %s: %w", c.directory, err)
	}
	return err
}

// write writes blocks, and then their entries.
func (r *ring) write(b batch) error {
	position, err := r.reserve(uint64(len(b.data) / unit))
	if err != nil {
		return err
	}
	if _, err := r.file.WriteAt(b.data, r.offset(position)); err != nil {
		return err
	}
	for i := range b.blocks {
		if err := r.insert(&b.blocks[i].ref, b.blocks[i].size, position); err != nil {
			return err
		}
		position += uint64(b.blocks[i].size) / unit
	}
	return nil
}

// close has nothing more written than what waits.
func (w *writer) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
}

// flush waits until everything that has been put is written.
func (c *Cache) flush() { c.writer.finished.Wait() }
