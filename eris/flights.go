// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
)

// This file is what a walker does with a Starter: jobs in flight have no goroutine. Answers wait in a queue, from which as many
// goroutines as there are processors take some at a time, verify and decrypt them, and start as many further jobs, so that the
// lock of the walker, the connection below and the processor's vectors are used for many blocks at once. What cannot be started
// is for the workers, as with other blocks. For 5 000 files of one to four blocks of 1 KiB this takes two thirds of the time of
// a goroutine per block.

const (
	startBatch = 64
	// finishBatch and finishBytes are how many answers are taken from the queue at a time: few enough to leave some for other
	// processors.
	finishBatch = 32
	finishBytes = 256 << 10
	// mostWorkers bounds the goroutines for what could not be started.
	mostWorkers = 4096
)

// errAgain is the error of an answer that says nothing about the block.
var errAgain = errors.New("request has failed")

// flights are the jobs in flight of a walker. But for the last part, they are guarded by the lock of the walker.
type flights struct {
	starter Starter // nil if there is none, and then nothing of this is used
	count   int     // jobs in flight, including those of workers and those that are left
	first   *flight // of those that were started
	free    []*flight
	left    []job // that could not be started and wait for a worker

	// Nothing else is locked while this is.
	mu        sync.Mutex
	wake      sync.Cond
	answered  []*flight // from head on
	head      int
	finishers int
	sleeping  int  // of them
	over      bool // there will be no more answers
}

// flight is a job that was started.
type flight struct {
	walker   *walker
	job      job
	answer   func()       // arrive, as a value
	steps    atomic.Int32 // that Start has returned is one, that there is an answer the other
	previous *flight
	next     *flight

	mu        sync.Mutex
	request   Request // nil once it is being finished
	finishing Request // only then
}

func (fs *flights) init(blocks Blocks) {
	if s, ok := blocks.(Starter); ok && s.Starts() {
		fs.starter = s
	}
	fs.wake.L = &fs.mu
}

// get returns a flight for a job.
func (fs *flights) get(w *walker) *flight {
	if n := len(fs.free); n > 0 {
		f := fs.free[n-1]
		fs.free = fs.free[:n-1]
		return f
	}
	f := &flight{walker: w}
	f.answer = f.arrive
	return f
}

func (fs *flights) put(f *flight) {
	f.job = job{}
	f.steps.Store(0)
	fs.free = append(fs.free, f)
}

func (fs *flights) link(f *flight) {
	f.previous, f.next = nil, fs.first
	if fs.first != nil {
		fs.first.previous = f
	}
	fs.first = f
}

func (fs *flights) unlink(f *flight) {
	if f.previous == nil {
		fs.first = f.next
	} else {
		f.previous.next = f.next
	}
	if f.next != nil {
		f.next.previous = f.previous
	}
	f.previous, f.next = nil, nil
}

// takeLeft takes a job that could not be started.
func (fs *flights) takeLeft(j *job) bool {
	if len(fs.left) == 0 {
		return false
	}
	*j = fs.left[0]
	fs.left[0] = job{}
	fs.left = fs.left[1:]
	return true
}

// landed books that a job is over.
func (fs *flights) landed(failed bool) {
	fs.count--
	if failed && fs.count == 0 {
		fs.end()
	}
}

// fail cancels everything in flight.
func (fs *flights) fail() {
	if fs.starter == nil {
		return
	}
	for f := fs.first; f != nil; f = f.next {
		f.cancel()
	}
	fs.count -= len(fs.left)
	fs.left = nil
	if fs.count == 0 {
		fs.end()
	}
}

// end sends the finishers home.
func (fs *flights) end() {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.over = true
	fs.wake.Broadcast()
}

// startAll starts jobs as long as there are any and room for them. It is called and returns with the lock held, but gives it up
// meanwhile.
func (w *walker) startAll() {
	fs := &w.flights
	for w.err == nil {
		var batch [startBatch]*flight
		n := 0
		for n < len(batch) && fs.count < w.requests {
			f := fs.get(w)
			if !w.take(&f.job) {
				fs.put(f)
				break
			}
			fs.count++
			fs.link(f)
			batch[n] = f
			n++
		}
		if n == 0 {
			return
		}
		for fs.finishers < runtime.GOMAXPROCS(0) {
			fs.finishers++
			w.group.Go(func() error {
				w.finish()
				return nil
			})
		}
		w.mu.Unlock()
		var left [startBatch]bool
		for i, f := range batch[:n] {
			left[i] = !f.start()
		}
		w.mu.Lock()
		for i, f := range batch[:n] {
			switch {
			case left[i]:
				fs.unlink(f)
				w.giveToWorker(&f.job)
				fs.put(f)
			case w.err != nil:
				f.cancel() // by now it may be over, which does no harm
			}
		}
	}
}

// giveToWorker has a worker do a job.
func (w *walker) giveToWorker(j *job) {
	switch n := len(w.idle); {
	case w.err != nil:
		w.flights.landed(true)
	case n > 0:
		worker := w.idle[n-1]
		w.idle = w.idle[:n-1]
		worker.job = *j
		worker.wake <- struct{}{} // has room for one, and an idle worker has none
	case w.workers < min(w.requests, mostWorkers):
		worker := &worker{job: *j, wake: make(chan struct{}, 1)}
		w.workers++
		w.group.Go(func() error {
			w.work(worker)
			return nil
		})
	default:
		w.flights.left = append(w.flights.left, *j)
	}
}

// start starts the job, and reports whether that was possible. Called without the lock.
func (f *flight) start() bool {
	j := &f.job
	request := f.walker.flights.starter.Start(j.pair.Reference, j.content.spine.capability.BlockSize, j.buffer.data[:0], f.answer)
	if request == nil {
		return false
	}
	f.mu.Lock()
	f.request = request
	f.mu.Unlock()
	f.arrive()
	return true
}

// arrive is called when Start has returned and when there is an answer, in whichever order. The second time the flight is put
// into the queue.
func (f *flight) arrive() {
	if f.steps.Add(1) < 2 {
		return
	}
	fs := &f.walker.flights
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.answered = append(fs.answered, f)
	if fs.sleeping > 0 {
		fs.sleeping--
		fs.wake.Signal()
	}
}

// cancel makes an answer come soon.
func (f *flight) cancel() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.request != nil {
		f.request.Cancel()
	}
}

// finish looks at answers until there are no more. Called without the lock.
func (w *walker) finish() {
	fs := &w.flights
	for {
		var batch [finishBatch]*flight
		n := fs.takeAnswers(batch[:])
		if n == 0 {
			return
		}
		var errs [finishBatch]error
		w.finishAll(batch[:n], errs[:n])
		w.mu.Lock()
		for i, f := range batch[:n] {
			fs.unlink(f)
			switch err := errs[i]; {
			case err == errAgain:
				w.giveToWorker(&f.job)
			case err != nil:
				w.failed(err)
				fs.landed(true)
			default:
				if w.err == nil {
					w.complete(&f.job) // may fail, too
				}
				fs.landed(w.err != nil)
			}
			fs.put(f)
		}
		w.dispatch()
		w.wakeReader()
		w.mu.Unlock()
	}
}

// takeAnswers waits for answers and takes some. It returns 0 when there will be no more. Called without the lock.
func (fs *flights) takeAnswers(batch []*flight) (n int) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for fs.head == len(fs.answered) {
		if fs.over {
			return 0
		}
		fs.sleeping++
		fs.wake.Wait()
	}
	bytes := 0
	for n < len(batch) && fs.head < len(fs.answered) && bytes < finishBytes {
		f := fs.answered[fs.head]
		fs.answered[fs.head] = nil
		fs.head++
		batch[n] = f
		n++
		bytes += len(f.job.buffer.data)
	}
	if fs.head == len(fs.answered) {
		fs.answered, fs.head = fs.answered[:0], 0
	}
	return n
}

// finishAll does with answers what do does with a block. Called without the lock.
func (w *walker) finishAll(batch []*flight, errs []error) {
	var answers [finishBatch][]byte
	var hashes batchHashes
	for i, f := range batch {
		f.mu.Lock()
		f.finishing, f.request = f.request, nil
		f.mu.Unlock()
		block, err := f.finishing.Finish()
		if size := f.job.content.spine.capability.BlockSize; err == nil && len(block) != int(size) {
			err = &BlockError{Reference: f.job.pair.Reference, Length: len(block), Want: size}
		}
		if answers[i], errs[i] = block, err; err == nil {
			hashes.add(i, block)
		}
	}
	hashes.sum(func(i int, sum Reference) {
		if ref := batch[i].job.pair.Reference; sum != ref {
			errs[i] = &BlockError{Reference: ref, Length: len(answers[i])}
		}
	})
	for i, f := range batch {
		j := &f.job
		err := f.finishing.Verified(errs[i])
		f.finishing = nil
		var wrong *BlockError
		switch {
		case err == nil:
			Decrypt(j.buffer.data, answers[i], j.pair.Key, j.level)
			if j.level > 0 {
				hashes.add(i, j.buffer.data)
			} else {
				errs[i] = j.check(true)
			}
		case errors.As(err, &wrong), errors.Is(err, ErrNotFound):
			errs[i] = gettingError(j.pair.Reference, err)
		default:
			errs[i] = errAgain
		}
	}
	hashes.sum(func(i int, sum Reference) {
		j := &batch[i].job
		errs[i] = j.check(Key(sum) == j.pair.Key)
	})
}

// batchHashes hashes some blocks of a batch together.
type batchHashes struct {
	n      int
	index  [finishBatch]int
	blocks [finishBatch][]byte
	sums   [finishBatch]Reference
}

func (h *batchHashes) add(i int, block []byte) {
	h.index[h.n], h.blocks[h.n] = i, block
	h.n++
}

// sum calls each with the hash of every block that was added, and forgets them.
func (h *batchHashes) sum(each func(i int, sum Reference)) {
	SumAll(h.sums[:h.n], h.blocks[:h.n])
	for k := range h.n {
		each(h.index[k], h.sums[k])
	}
	h.n = 0
}
