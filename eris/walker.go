// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"context"
	"io"
	"sync"

	"golang.org/x/crypto/blake2b"
	"golang.org/x/sync/errgroup"
)

// walker is the engine of a Sequence: it knows which blocks are wanted next, keeps workers busy with them, and keeps the
// results until they can be handed out in order.
//
// All of it is guarded by one lock, held for well under a microsecond per block. A worker that is done with a job takes the
// next one under the same hold of the lock; only when there is more to do than workers doing it are idle ones woken, each
// with its job, so that nobody wakes up in vain.
//
// Positions count leaves, over all contents: because every node but the last of a level is full, the position of any node
// is known once the lengths of the contents before it are, and "ahead" has one meaning for leaves, nodes and contents.
type walker struct {
	blocks Blocks
	parent context.Context
	ctx    context.Context // ends at the first failure
	cancel context.CancelFunc
	detach func() bool // of the watcher of the parent
	group  errgroup.Group

	requests    int      // most workers
	leafBudget  int64    // most bytes of leaves
	pathBudget  int64    // most bytes of right-most paths
	leavesAhead [2]int64 // per block size: what one window holds
	totalLimit  int64    // greatest sum of lengths

	mu       sync.Mutex
	ready    sync.Cond // what the reader waits on
	waitsFor waitReason
	err      error // the first failure

	workers int
	idle    []*worker

	flights flights // if the blocks are a Starter

	// The contents that have leaves not asked for yet, in order; those before opened are open, and those from opened to
	// opening are being opened. Indexes are those of the slice.
	contents []*content
	opened   int
	opening  int
	added    int        // contents added so far
	ended    bool       // no more contents will be added
	paths    []*content // whose next block of the path can be asked for
	lefts    []leftNode // that can be asked for

	asked         int64 // position of the next leaf to be asked for
	openedLeaves  int64 // position of the end of the open contents
	openingLeaves int64 // the least that those being opened will add
	totalLength   int64 // of all open contents

	nextLeaf  int64                // in contents[0]
	nextNodes [maxLevel]nodeCursor // per level; that of level 0 is not used
	top       int                  // greatest level of an open content so far

	// Leaves asked for and not handed out, in order: a ring, slots[i&mask] for head <= i < tail.
	slots      []slot
	head, tail uint64

	leafBytes, pathBytes int64 // in use

	free      [2][]*buffer
	releaseMu sync.Mutex
	released  []*buffer // by holders of leaves, not yet accounted for
	freed     int64     // their bytes
}

// waitReason is what must come to pass for the reader to go on.
type waitReason int

const (
	waitNone    waitReason = iota
	waitContent            // the next content is known
	waitLeaf               // the first slot is done
)

// The reader fetches this many contents from its iterator at a time, when fewer than as many wait to be opened.
const refillBatch = 256

// Released leaves are accounted for in batches of this many.
const releaseBatch = 16

// slot is the place of a leaf in the order.
type slot struct {
	content *content
	buffer  *buffer
	bytes   []byte
	done    bool
	last    bool // of its content
}

// buffer is memory for a block, and says which account it is on.
type buffer struct {
	data    []byte
	account account
}

type account int

const (
	onNone  account = iota // internal nodes that are not on the right-most path: bounded by how far ahead they are asked for
	onLeaf                 // leafBytes
	onPath                 // pathBytes, where the whole path is booked when the content starts to be opened
	foreign                // belongs to a Content
)

func sizeIndex(size BlockSize) int {
	if size == BlockSize1KiB {
		return 0
	}
	return 1
}

// jobKind tells the uses of a block apart.
type jobKind int

const (
	pathJob jobKind = iota
	leftJob
	nodeJob
	leafJob
)

// job is one block to get, verify and decrypt.
type job struct {
	kind    jobKind
	content *content
	pair    Pair
	level   int
	node    int64  // of a nodeJob: its index in the level
	slot    uint64 // of a leafJob
	buffer  *buffer

	// Results of a pathJob; the first pair is that of a leftJob, too.
	first  Pair
	next   Pair
	tail   []byte
	length int64
}

type worker struct {
	job  job
	wake chan struct{} // receives when there is a job; closed when there will be none
}

func newWalker(ctx context.Context, blocks Blocks, total int64, window Window) *walker {
	if window.Requests < 1 {
		window.Requests = DefaultRequests
	}
	if window.Bytes < 1 {
		window.Bytes = DefaultBytes
	}
	w := &walker{blocks: blocks, parent: ctx, requests: window.Requests, totalLimit: total}
	w.leafBudget = window.Bytes / 2
	w.pathBudget = window.Bytes - w.leafBudget
	for i, size := range []BlockSize{BlockSize1KiB, BlockSize32KiB} {
		w.leavesAhead[i] = max(1, min(int64(w.requests), w.leafBudget/int64(size)))
	}
	w.ready.L = &w.mu
	w.flights.init(blocks)
	w.ctx, w.cancel = context.WithCancel(ctx)
	w.detach = context.AfterFunc(ctx, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.fail(ctx.Err())
	})
	if err := ctx.Err(); err != nil { // the watcher may take its time
		w.mu.Lock()
		defer w.mu.Unlock()
		w.fail(err)
	}
	return w
}

// close ends everything and waits for the workers.
func (w *walker) close() {
	w.detach()
	w.mu.Lock()
	w.fail(errSequenceClosed)
	w.mu.Unlock()
	_ = w.group.Wait() // workers return nil; the error is w.err
}

// fail records the first failure, and sends all workers home. The lock is held here and in all that follows, unless said
// otherwise.
func (w *walker) fail(err error) {
	if w.err != nil {
		return
	}
	w.err = err
	w.cancel()
	for _, worker := range w.idle {
		close(worker.wake)
	}
	w.idle = nil
	w.flights.fail()
	w.ready.Broadcast()
}

// failed ends everything because of the error of a job.
func (w *walker) failed(err error) {
	if w.parent.Err() != nil {
		err = w.parent.Err()
	}
	w.fail(err)
}

// work does jobs until there is a failure; the worker comes with its first. Called without the lock.
func (w *walker) work(me *worker) {
	for {
		err := w.do(&me.job)
		w.mu.Lock()
		if err != nil {
			w.failed(err)
		}
		starting := w.flights.starter != nil
		if starting {
			w.flights.landed(w.err != nil)
		}
		if w.err != nil {
			w.mu.Unlock()
			return
		}
		w.complete(&me.job) // may fail, too
		more := false
		if starting {
			more = w.flights.takeLeft(&me.job)
		} else {
			more = w.take(&me.job)
		}
		if w.err != nil {
			w.mu.Unlock()
			return
		}
		if !more {
			w.idle = append(w.idle, me)
		}
		if more || starting {
			w.dispatch()
		}
		w.wakeReader()
		w.mu.Unlock()
		if !more {
			if _, open := <-me.wake; !open {
				return
			}
		}
	}
}

// dispatch hands out jobs as long as there are both jobs and workers who could do them. With a Starter it gives the lock up
// meanwhile.
func (w *walker) dispatch() {
	if w.flights.starter != nil {
		w.startAll()
		return
	}
	for w.err == nil {
		if n := len(w.idle); n > 0 {
			worker := w.idle[n-1]
			if !w.take(&worker.job) {
				return
			}
			w.idle = w.idle[:n-1]
			worker.wake <- struct{}{} // has room for one, and an idle worker has none
			continue
		}
		if w.workers == w.requests {
			return
		}
		worker := &worker{wake: make(chan struct{}, 1)}
		if !w.take(&worker.job) {
			return
		}
		w.workers++
		w.group.Go(func() error {
			w.work(worker)
			return nil
		})
	}
}

// do gets, verifies and decrypts a block, and checks what can be checked about it. Called without the lock.
func (w *walker) do(j *job) error {
	block, err := getBlock(w.ctx, w.blocks, j.pair.Reference, j.content.spine.capability.BlockSize, j.buffer.data)
	if err != nil {
		return err
	}
	data := j.buffer.data
	Decrypt(data, block, j.pair.Key, j.level)
	return j.check(j.level == 0 || [32]byte(j.pair.Key) == blake2b.Sum256(data))
}

// check checks the plaintext of a block, and takes from it what a path needs. That a node has the right key the caller has
// found out. Called without the lock; of the content it uses what does not change, and the spine, which only the one job of its
// path uses.
func (j *job) check(rightKey bool) error {
	c := j.content
	data := j.buffer.data
	if j.level == 0 {
		if j.kind == pathJob {
			var err error
			j.tail, j.length, err = c.spine.leaf(data)
			return err
		}
		return nil
	}
	if !rightKey {
		return nodeError(&c.spine.capability, j.pair, errNodeKey)
	}
	node, err := ParseNode(data)
	if err != nil {
		return nodeError(&c.spine.capability, j.pair, err)
	}
	j.first = node.Pair(0)
	if j.kind != pathJob {
		return checkFull(node, &c.spine.capability, j.pair)
	}
	j.next, err = c.spine.node(j.level, node)
	return err
}

// complete puts the result of a job in its place.
func (w *walker) complete(j *job) {
	c := j.content
	switch j.kind {
	case leafJob:
		w.slots[j.slot&uint64(len(w.slots)-1)].done = true
	case leftJob:
		if r := &c.rows[j.level]; len(r.run) > 0 {
			r.run[0] = j.buffer
		} else {
			r.first = j.buffer
		}
		w.addLeft(c, j.level-1, j.first)
	case nodeJob:
		r := &c.rows[j.level]
		r.run[j.node-r.from] = j.buffer
	case pathJob:
		c.rows[j.level].last = j.buffer
		if j.level > 0 {
			if j.level == c.spine.capability.Level {
				w.addLeft(c, j.level-1, j.first)
			}
			c.pair, c.level = j.next, j.level-1
			w.paths = append(w.paths, c)
		} else {
			w.setOpen(c, j.tail, j.length)
		}
	}
	j.buffer, j.content = nil, nil
}

// buffer returns memory for a block, booked on an account. Paths were booked before.
func (w *walker) buffer(size BlockSize, on account) *buffer {
	if on == onLeaf {
		w.leafBytes += int64(size)
	}
	free := &w.free[sizeIndex(size)]
	n := len(*free)
	if n == 0 {
		return &buffer{make([]byte, size), on}
	}
	b := (*free)[n-1]
	*free = (*free)[:n-1]
	b.account = on
	return b
}

// put takes a buffer back. It does nothing for nil.
func (w *walker) put(b *buffer) {
	if b == nil {
		return
	}
	switch b.account {
	case foreign:
		return
	case onLeaf:
		w.leafBytes -= int64(len(b.data))
	case onPath:
		w.pathBytes -= int64(len(b.data))
	}
	i := sizeIndex(BlockSize(len(b.data)))
	w.free[i] = append(w.free[i], b)
}

// release takes back the buffer of a leaf that was handed out. Called without the lock, by anybody.
func (w *walker) release(b *buffer) {
	w.releaseMu.Lock()
	w.released = append(w.released, b)
	w.freed += int64(len(b.data))
	enough := len(w.released) >= releaseBatch || w.freed >= min(w.leafBudget, w.pathBudget)/8
	w.releaseMu.Unlock()
	if enough {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.reclaim()
		w.dispatch()
		w.wakeReader()
	}
}

// reclaim books what has been released.
func (w *walker) reclaim() {
	w.releaseMu.Lock()
	defer w.releaseMu.Unlock()
	for i, b := range w.released {
		w.put(b)
		w.released[i] = nil
	}
	w.released = w.released[:0]
	w.freed = 0
}

// waitContent waits until the path of the next content is complete, and returns the content; io.EOF if there is none. All
// leaves of the one before must have been taken. Called without the lock.
func (w *walker) waitContent(refill func(int) ([]Want, bool)) (*content, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.wait(waitContent, refill); err != nil {
		return nil, err
	}
	if w.head != w.tail {
		return w.first().content, nil
	}
	return w.contents[0], nil // no leaf of it has been asked for yet
}

// waitLeaves waits for the first slot to be done, and appends it and those that follow and are done to ready, up to its
// capacity. Called without the lock.
func (w *walker) waitLeaves(ready []slot, refill func(int) ([]Want, bool)) ([]slot, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.wait(waitLeaf, refill); err != nil {
		return nil, err
	}
	for w.head != w.tail && w.first().done && len(ready) < cap(ready) {
		ready = append(ready, *w.first())
		*w.first() = slot{}
		w.head++
	}
	return ready, nil
}

// wait keeps contents and jobs coming until the reason to wait is gone.
func (w *walker) wait(reason waitReason, refill func(int) ([]Want, bool)) error {
	w.reclaim()
	for {
		if w.err != nil {
			return w.err
		}
		if w.needsRefill() {
			w.mu.Unlock()
			wants, ended := refill(refillBatch)
			w.mu.Lock()
			w.ended = ended
			w.add(wants)
			continue
		}
		w.dispatch()
		if w.err != nil {
			return w.err
		}
		if w.satisfied(reason) {
			return nil
		}
		if w.needsRefill() {
			continue // more can be started than has been fetched
		}
		if w.ended && w.head == w.tail && len(w.contents) == 0 {
			return io.EOF
		}
		w.waitsFor = reason
		w.ready.Wait()
		w.waitsFor = waitNone
	}
}

// needsRefill reports whether the reader should fetch more contents from its iterator.
func (w *walker) needsRefill() bool {
	return !w.ended && len(w.contents)-w.opening < refillBatch
}

func (w *walker) satisfied(reason waitReason) bool {
	if reason == waitContent {
		return w.head != w.tail || w.opened > 0
	}
	return w.head != w.tail && w.first().done
}

// first returns the slot that is to be handed out next, if there is any.
func (w *walker) first() *slot {
	return &w.slots[w.head&uint64(len(w.slots)-1)]
}

// wakeReader wakes the reader if it waits and can go on.
func (w *walker) wakeReader() {
	if w.waitsFor != waitNone && (w.satisfied(w.waitsFor) || w.needsRefill()) {
		w.ready.Signal()
	}
}
