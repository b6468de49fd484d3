// SPDX-License-Identifier: GPL-3.0-or-later

package content

import (
	"cmp"
	"context"
	"io"
	"sync"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/arrivals"
)

// fetcher is the engine of a Sequence: it knows which blocks are wanted next, keeps requests for
// them in flight, and keeps the results until they can be handed out in order.
//
// All of it is guarded by one lock, held for well under a microsecond per block.
//
// Positions count leaves, over all contents: because every node but the last of a level is full,
// the position of any node is known once the lengths of the contents before it are, and "ahead" has
// one meaning for leaves, nodes and contents.
type fetcher struct {
	source fetch.Source
	next   func() (Want, bool) // called without the lock, by the reader only
	parent context.Context
	detach func() bool // of the watcher of the parent
	group  sync.WaitGroup

	window       fetch.Window
	narrow       bool     // nobody waits, so that a part of the window is used
	most         int      // requests in flight
	leafBudget   int64    // most bytes of leaves
	pathBudget   int64    // most bytes of right-most and left-most paths
	leavesAhead  [2]int64 // per block size: what one window holds
	totalLimit   int64    // greatest sum of lengths
	releaseBytes int64    // see release

	mu       sync.Mutex
	ready    sync.Cond           // what the reader waits on
	waitsFor func(*fetcher) bool // what lets it go on; nil if it does not wait
	err      error               // the first failure
	paused   bool                // only paths are fetched

	responses *arrivals.Queue[*request]
	decoders  int
	inFlight  int
	requests  []*request // all that there are
	unused    []*request // of them

	// The contents that have leaves not requested yet, in order; those before opened are open, and
	// those from opened to opening are being opened. Indexes are those of the slice.
	contents []*content
	opened   int
	opening  int
	ended    bool       // no more contents will be added
	paths    []pathStep // that can be requested

	requested     int64 // position of the next leaf to be requested
	openedLeaves  int64 // position of the end of the open contents
	openingLeaves int64 // the least that those being opened will add
	totalLength   int64 // of all open contents

	nextLeaf  int64                // in contents[0]
	nextNodes [maxLevel]nodeCursor // per level; that of level 0 is not used
	top       int                  // greatest level of an open content so far

	// Leaves requested and not handed out, in order: a ring, slots[i&mask] for head <= i < tail.
	slots      []slot
	head, tail uint64

	leafBytes, pathBytes int64 // in use

	free      [2][]*buffer
	releaseMu sync.Mutex
	released  []*buffer // by holders of leaves, not yet accounted for
	freed     int64     // their bytes
}

// The reader fetches this many contents from its iterator at a time, when fewer than as many wait
// to be opened.
const refillBatch = 256

// unwaitedShare is the part of the window that is used as long as nobody waits.
const unwaitedShare = 4

// Released leaves are accounted for in batches of this many.
const releaseBatch = 16

// slot is a position in the order of leaves, and the leaf that stands there.
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
	node    eris.Node // that is in data
	kin     *fetch.Kin
	leaf    Leaf // that is in data, when it is handed out
	origin  any  // as in [fetch.Request]
	account account
}

// named is a block, and those that were named together with it.
type named struct {
	eris.Pair
	kin *fetch.Kin
	nth int
}

// child returns the node at the given index of the level below.
func (b *buffer) child(index int64) named {
	nth := int(index) & (eris.BlockSize(len(b.data)).Arity() - 1)
	return named{b.node.Pair(nth), b.kin, nth}
}

type account int

const (
	onNone account = iota // internal nodes that are on neither path: bounded by how far ahead they are requested
	onLeaf                // leafBytes
	onPath                // pathBytes, where both paths are booked when the content starts to be opened
)

func sizeIndex(size eris.BlockSize) int {
	if size == eris.BlockSize1KiB {
		return 0
	}
	return 1
}

func newFetcher(ctx context.Context, source fetch.Source, total int64, window fetch.Window) *fetcher {
	if window.Requests < 1 {
		window.Requests = defaultRequests
	}
	if window.Bytes < 1 {
		window.Bytes = defaultBytes
	}
	f := &fetcher{source: source, parent: ctx, totalLimit: total, window: window}
	f.setBounds()
	f.releaseBytes = f.leafBudget / 8
	f.ready.L = &f.mu
	f.responses = arrivals.New(func(r *request) eris.BlockSize { return r.Size })
	f.mu.Lock()
	defer f.mu.Unlock()
	f.detach = context.AfterFunc(ctx, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.fail(context.Cause(ctx))
	})
	if ctx.Err() != nil { // the watcher may take its time
		f.fail(context.Cause(ctx))
	}
	return f
}

// setBounds sets the bounds that follow from the window.
func (f *fetcher) setBounds() {
	requests, bytes := f.window.Requests, f.window.Bytes
	if f.narrow = f.window.Waited != nil && !f.window.Waited(); f.narrow {
		requests, bytes = max(1, requests/unwaitedShare), max(1, bytes/unwaitedShare)
	}
	f.most = requests
	f.leafBudget = bytes / 2
	f.pathBudget = bytes - f.leafBudget
	for i, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
		f.leavesAhead[i] = max(1, min(int64(f.most), f.leafBudget/int64(size)))
	}
}

func (f *fetcher) close() {
	f.detach()
	f.mu.Lock()
	f.fail(errClosed)
	f.mu.Unlock()
	f.group.Wait()
}

// fail records the first failure, and cancels everything in flight. The lock is held here and in
// all that follows, unless said otherwise.
func (f *fetcher) fail(err error) {
	if f.err != nil {
		return
	}
	f.err = cmp.Or(context.Cause(f.parent), err)
	f.cancelAll()
	f.ready.Broadcast()
}

// resume lets everything be fetched. Called without the lock.
func (f *fetcher) resume() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.paused = false
	f.dispatch()
}

// complete puts the result of a request in its place.
func (f *fetcher) complete(r *request) {
	c := r.content
	r.buffer.origin = r.Origin
	switch r.kind {
	case leafRequest:
		f.slotAt(r.slot).done = true
	case nodeRequest:
		row := &c.rows[r.level]
		row.run[r.node-row.from] = r.buffer
	case leftRequest:
		f.completeLeft(c, r.level, r.buffer)
		if r.level > 0 {
			f.paths = append(f.paths, pathStep{leftRequest, c, r.level - 1, r.buffer.child(0)})
		}
	case pathRequest:
		c.rows[r.level].last = r.buffer
		if r.level == 0 {
			f.setOpen(c, r.tail, r.length)
			return
		}
		f.paths = append(f.paths, pathStep{pathRequest, c, r.level - 1, r.buffer.child(int64(r.buffer.node.Len() - 1))})
		if r.level == c.rootLevel() { // it has two pairs at least, so this is not on the right-most path
			f.paths = append(f.paths, pathStep{leftRequest, c, r.level - 1, r.buffer.child(0)})
		}
	}
}

// buffer returns memory for a block, booked on an account. Paths were booked before.
func (f *fetcher) buffer(size eris.BlockSize, on account) *buffer {
	if on == onLeaf {
		f.leafBytes += int64(size)
	}
	free := &f.free[sizeIndex(size)]
	n := len(*free)
	if n == 0 {
		return &buffer{data: make([]byte, size), account: on}
	}
	b := (*free)[n-1]
	*free = (*free)[:n-1]
	b.account = on
	return b
}

func (f *fetcher) put(b *buffer) {
	if b == nil {
		return
	}
	switch b.account {
	case onLeaf:
		f.leafBytes -= int64(len(b.data))
	case onPath:
		f.pathBytes -= int64(len(b.data))
	}
	i := sizeIndex(eris.BlockSize(len(b.data)))
	f.free[i] = append(f.free[i], b)
}

// release takes back the buffer of a leaf that was handed out. Called without the lock, by anybody.
func (f *fetcher) release(b *buffer) {
	f.releaseMu.Lock()
	f.released = append(f.released, b)
	f.freed += int64(len(b.data))
	enough := len(f.released) >= releaseBatch || f.freed >= f.releaseBytes
	f.releaseMu.Unlock()
	if enough {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.reclaim()
		f.dispatch()
		f.wakeReader()
	}
}

func (f *fetcher) reclaim() {
	f.releaseMu.Lock()
	defer f.releaseMu.Unlock()
	for i, b := range f.released {
		f.put(b)
		f.released[i] = nil
	}
	f.released = f.released[:0]
	f.freed = 0
}

// waitContent waits until the path of the next content is complete, and returns the content; io.EOF
// if there is none. All leaves of the one before must have been taken. Called without the lock.
func (f *fetcher) waitContent() (*content, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.wait((*fetcher).hasContent); err != nil {
		return nil, err
	}
	return f.slotAt(f.head).content, nil // its first leaf has got a slot when it was opened
}

// waitLeaves waits for the first slot to be done, and appends it and those that follow and are done
// to ready, up to its capacity. Called without the lock.
func (f *fetcher) waitLeaves(ready []slot) ([]slot, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.wait((*fetcher).hasLeaf); err != nil {
		return nil, err
	}
	for f.head != f.tail && f.slotAt(f.head).done && len(ready) < cap(ready) {
		ready = append(ready, *f.slotAt(f.head))
		*f.slotAt(f.head) = slot{}
		f.head++
	}
	return ready, nil
}

// wait keeps contents and requests coming until the reader can go on.
func (f *fetcher) wait(ready func(*fetcher) bool) error {
	f.reclaim()
	for {
		if f.err != nil {
			return f.err
		}
		if f.needsRefill() {
			f.refill()
			continue
		}
		f.dispatch()
		if f.err != nil {
			return f.err
		}
		if ready(f) {
			return nil
		}
		if f.needsRefill() {
			continue // more can be started than has been fetched
		}
		if f.ended && f.head == f.tail && len(f.contents) == 0 {
			return io.EOF
		}
		f.waitsFor = ready
		f.ready.Wait()
		f.waitsFor = nil
	}
}

func (f *fetcher) needsRefill() bool {
	return !f.ended && len(f.contents)-f.opening < refillBatch
}

// refill takes more contents from the iterator. It gives the lock up meanwhile.
func (f *fetcher) refill() {
	f.mu.Unlock()
	var wants []Want
	more := true
	for more && len(wants) < refillBatch {
		var want Want
		if want, more = f.next(); more {
			wants = append(wants, want)
		}
	}
	f.mu.Lock()
	f.ended = !more
	f.add(wants)
}

func (f *fetcher) hasContent() bool { return f.head != f.tail }
func (f *fetcher) hasLeaf() bool    { return f.head != f.tail && f.slotAt(f.head).done }

func (f *fetcher) wakeReader() {
	if f.waitsFor != nil && (f.waitsFor(f) || f.needsRefill()) {
		f.ready.Signal()
	}
}
