// SPDX-License-Identifier: GPL-3.0-or-later

package mirror

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/backoff"
)

const (
	// leastWindow and mostWindow bound how many requests may be under way on one connection. It
	// begins with few, so that a slow server leaves something for other connections; a fast one is
	// soon sent as many as it answers in two round trips.
	leastWindow = 4
	mostWindow  = 512
	// maxRequests bounds the requests that are written at a time, in bytes, if they are several.
	maxRequests = 64 << 10
	// measured is how many responses of each connection tell how fast the server is.
	measured = 3
	// payingFactor is how much faster twice the connections must be to be kept.
	payingFactor = 1.3
	// fewResponses is how many responses a server gives at least before it closes a connection, if
	// it takes pipelines.
	fewResponses = 8
	// maxBroken is how many pipelines may break before the server gets no more.
	maxBroken = 2
	// maxFailures is how many connections in a row may break without a response before a server
	// rests, and how many may break at the same item.
	maxFailures = 3
	// maxFailuresLater is how many may break in a row at a server that has responded before:
	// perhaps there are only items that it breaks at.
	maxFailuresLater = 10
	// maxSilent is how many in a row may be silent at such a server.
	maxSilent = 1
	// leastExtraTimeout is for how long at least a connection beside others may be silent at first.
	leastExtraTimeout = 500 * time.Millisecond
)

// An Urgency is the queue that a question waits in.
type Urgency int

// The urgencies.
const (
	Wanted Urgency = iota
	Ahead          // wanted later, perhaps
	urgencies
)

// pipelines are the connections to a server on which narinfos are requested, each with a worker
// that owns it. The lock of the peer guards them.
type pipelines struct {
	queues  [urgencies][]*question
	limit   int // of workers
	most    int // of workers, as the server is
	workers int // how many there are
	open    map[*exchange]bool
	wake    chan struct{} // has room for one: there are questions for a worker that is idle
	leave   chan struct{} // workers that are idle leave when they read from it

	busy     backoff.Backoff // nothing is requested while it rests
	failures int             // connections without a response since the last one
	good     bool            // there has been a response
	broken   int             // pipelines that it has broken off soon, since one that it has not
	refuses  bool            // it has answered one in the wrong order, or by an error, and gets no more

	// How fast the workers are: responses since a time, and per second when they were fewer.
	since      time.Time
	responses  int
	starting   int // workers that have had no response yet
	fewer      int
	fewerRate  float64
	firstAfter time.Duration // the first response on a connection has come after
}

func newPipelines(limit int) pipelines {
	return pipelines{
		limit: limit, most: limit, open: map[*exchange]bool{}, wake: make(chan struct{}, 1), leave: make(chan struct{}),
		busy: backoff.Backoff{Min: busyDelay, Max: maxRetryAfter},
	}
}

// add puts questions into the queue, unless the server rests.
func (p *peer) add(questions []*question) {
	p.mu.Lock()
	err := p.restingLocked()
	if err == nil {
		for _, q := range questions {
			p.queues[q.urgency] = append(p.queues[q.urgency], q)
		}
		p.fill()
		p.spawn(1)
	}
	p.mu.Unlock()
	resolve(questions, err)
}

// fill sends requests on connections whose workers wait for a response, unless another one has
// nothing to do. The caller holds the lock.
func (p *peer) fill() {
	for x := range p.open {
		if len(x.unanswered) == 0 {
			return
		}
	}
	for x := range p.open {
		x.more()
	}
}

// resolve ends questions without an answer if err is not nil.
func resolve(questions []*question, err error) {
	for _, q := range questions {
		if err != nil {
			q.call.resolve(Answer{}, err)
		}
	}
}

// spawn sees to it that there are as many workers as wanted, if there may be, and wakes one up that
// is idle. The caller holds the lock.
func (p *peer) spawn(wanted int) {
	for p.workers < min(wanted, p.most) && p.c.ctx.Err() == nil {
		p.workers++
		p.starting++
		p.responses = 0
		p.c.workers.Go(p.work)
	}
	p.wakeOne()
}

// wakeOne wakes a worker up that is idle, if there is one.
func (p *peer) wakeOne() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// dropIdle closes the connections that nobody uses, for servers that have few workers, which stay
// with a connection.
func (p *peer) dropIdle() {
	for {
		select {
		case p.leave <- struct{}{}:
		default:
			return
		}
	}
}

// work makes connections and requests narinfos on them as long as that is of use.
func (p *peer) work() {
	for p.needed() {
		conn, err := p.connect(p.c.ctx)
		if err != nil {
			p.unreachable(err)
			return
		}
		if !p.use(conn) {
			return
		}
	}
}

// use requests narinfos on a connection and closes it; the result is that of run.
func (p *peer) use(conn *connection) (again bool) {
	x := &exchange{p: p, conn: conn, window: leastWindow}
	p.mu.Lock()
	p.open[x] = true
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.open, x)
		p.mu.Unlock()
		conn.close()
	}()
	again = x.run()
	resolveHeld(x.held)
	return again
}

// release gives the answers that are older than all that is under way.
func (x *exchange) release() {
	x.p.mu.Lock()
	n := max(0, len(x.held)-len(x.unanswered))
	x.p.mu.Unlock()
	resolveHeld(x.held[:n])
	x.held = x.held[n:]
}

func resolveHeld(all []held) {
	for _, h := range all {
		h.q.call.resolve(h.a, nil)
	}
}

// misread deals with an answer to a pipeline that says nothing about the question whose turn it is.
// Perhaps a proxy answers in another order than it was asked; then nothing in the pipeline can be
// told apart but narinfos. Or the server takes more than one request for a bad one. All else is
// requested again, without pipelines. It reports whether that is so.
func (x *exchange) misread(q *question) bool {
	p := x.p
	p.mu.Lock()
	defer p.mu.Unlock()
	if !x.piped {
		return false
	}
	p.refuses = true
	x.giveBack()
	p.putBack([]*question{q})
	for _, h := range x.held {
		p.putBack([]*question{h.q})
	}
	x.held = nil
	return true
}

// dropVain closes the connections on which nothing is under way that anybody waits for.
func (p *peer) dropVain() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for x := range p.open {
		wanted := slices.ContainsFunc(x.unanswered, func(q *question) bool { return !q.call.over() })
		if len(x.unanswered) > 0 && !wanted {
			x.vain = true
			x.conn.net.Close()
		}
	}
}

// needed reports whether a worker without a connection is of use; if not, it is counted no more.
func (p *peer) needed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.workers <= p.most && p.queued() > 0 && p.c.ctx.Err() == nil {
		return true
	}
	p.gone()
	return false
}

// gone counts a worker no more. What it has put back is for another one, which may be idle. The
// caller holds the lock.
func (p *peer) gone() {
	p.starting = max(0, p.starting-1) // or one of those is measured too early
	if p.workers--; p.workers == 0 {
		p.most, p.fewer, p.fewerRate = p.limit, 0, 0
	}
	if p.queued() > 0 {
		p.wakeOne()
	}
}

func (p *peer) queued() int { return len(p.queues[Wanted]) + len(p.queues[Ahead]) }

// unreachable ends a worker that could not connect. A server that has other connections takes no
// more than those, but is there.
func (p *peer) unreachable(err error) {
	p.mu.Lock()
	if p.workers > 1 || p.c.ctx.Err() != nil {
		p.most = max(1, p.workers-1)
		p.gone()
		p.mu.Unlock()
		return
	}
	p.abandon(err)
}

// abandon ends a worker together with all questions, and makes the server rest. The caller holds
// the lock, which is released.
func (p *peer) abandon(err error) {
	p.gone()
	err = p.fail(err)
	all := slices.Concat(p.queues[:]...)
	p.queues = [urgencies][]*question{}
	p.failures, p.good = 0, false
	p.mu.Unlock()
	resolve(all, err)
}

// take removes questions from the queues, as many as n. The caller holds the lock.
func (p *peer) take(n int) []*question {
	var taken []*question
	for u := range p.queues {
		for len(p.queues[u]) > 0 && len(taken) < n {
			q := p.queues[u][0]
			p.queues[u] = p.queues[u][1:]
			if !q.call.over() {
				taken = append(taken, q)
			}
		}
	}
	return taken
}

// putBack makes questions the next ones. The caller holds the lock.
func (p *peer) putBack(questions []*question) {
	var split [urgencies][]*question
	for _, q := range questions {
		split[q.urgency] = append(split[q.urgency], q)
	}
	for u := range split {
		p.queues[u] = append(split[u], p.queues[u]...)
	}
}

// An exchange is the use of one connection by its worker.
type exchange struct {
	p          *peer
	conn       *connection
	unanswered []*question // in the order of the responses; the lock of the peer guards it
	window     int
	served     int       // responses in all
	idle       bool      // there has been no response since it was idle
	sent       time.Time // since it was idle: when the first request was
	first      time.Time // and when the first response came
	answered   int       // and how many have come
	vain       bool      // it was closed because nobody waits for what is under way
	piped      bool      // there have been several requests under way
	held       []held    // what may belong to another request that was under way
}

// held is an answer that is not given yet.
type held struct {
	q *question
	a Answer
}

// run requests narinfos. It reports whether the worker makes another connection if need be; if not,
// it is counted no more.
func (x *exchange) run() (again bool) {
	for {
		x.p.mu.Lock()
		x.more()
		idle := len(x.unanswered) == 0
		x.p.mu.Unlock()
		if idle {
			if again, open := x.await(); !open {
				return again
			}
			continue
		}
		response, err := x.conn.response(x.timeout())
		var a Answer
		if err == nil {
			if a, err = readAnswer(response); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				x.cut()
			}
		}
		if err != nil {
			return x.broke(err)
		}
		q := x.responded()
		a.Hash = q.hash
		if (a.isOfAnother() || a.Status == http.StatusBadRequest) && x.misread(q) {
			return true
		}
		if x.narinfo(q, response, a) {
			x.again(q)
		}
		x.release()
		if response.Close {
			x.p.mu.Lock()
			x.giveBack()
			x.p.pipelined(x.served, len(x.unanswered) > 0)
			x.p.mu.Unlock()
			return true
		}
	}
}

// more sends as many requests as there may be under way. The caller holds the lock.
func (x *exchange) more() {
	p := x.p
	window := x.window
	if p.broken >= maxBroken || p.refuses {
		window = 1
	}
	if len(x.unanswered) > window/2 || x.conn.sending() || p.workers > p.most || p.busy.Rest(time.Now()) > 0 {
		return
	}
	questions := p.take(window - len(x.unanswered))
	var requests []byte
	for i, q := range questions {
		requests = append(requests, x.conn.request(q.location)...)
		if len(requests) > maxRequests {
			p.putBack(questions[i+1:])
			questions = questions[:i+1]
			break
		}
	}
	if len(questions) == 0 {
		return
	}
	if len(x.unanswered) == 0 && x.answered == 0 {
		x.sent = time.Now()
	}
	x.unanswered = append(slices.Clip(x.unanswered), questions...)
	x.piped = x.piped || len(x.unanswered) > 1
	x.conn.send(requests, p.c.o.NarinfoTimeout)
}

// giveBack puts back what has had no response, and lets nothing more be requested on the
// connection. The caller holds the lock.
func (x *exchange) giveBack() {
	delete(x.p.open, x)
	x.p.putBack(x.unanswered)
}

// await waits until there is something to request. It reports whether the connection stays open,
// and if not, whether the worker makes another one.
func (x *exchange) await() (again, open bool) {
	p := x.p
	p.mu.Lock()
	pause := p.busy.Rest(time.Now())
	queued := p.queued() > 0
	surplus := p.workers > p.most
	if surplus {
		p.gone()
	}
	x.idle, x.answered = x.served > 0, 0
	p.mu.Unlock()
	switch {
	case surplus:
		return false, false
	case !queued:
		pause = idleTime
	case x.conn.sending():
		<-x.conn.write // the responses have overtaken the end of it
		return false, true
	}
	select {
	case <-p.wake:
	case <-p.leave:
		return true, false
	case <-p.c.ctx.Done():
		return true, false
	case <-time.After(pause):
		if !queued {
			return true, false
		}
	}
	return false, true
}

// timeout is for how long the server may be silent. A connection beside others is given up soon:
// perhaps the server has no worker for it.
func (x *exchange) timeout() time.Duration {
	p := x.p
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.workers > 1 && x.served == 0 {
		return min(p.c.o.NarinfoTimeout, max(leastExtraTimeout, 10*p.firstAfter))
	}
	return p.c.o.NarinfoTimeout
}

// responded notes a response, and how fast they come. It returns what that answers.
func (x *exchange) responded() *question {
	p := x.p
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	p.failures, p.good, p.down = 0, true, nil
	p.rest.Succeed()
	if x.served++; x.served == 1 && p.starting > 0 {
		p.starting--
	}
	x.idle = false
	switch x.answered++; {
	case x.answered == 1:
		x.first = now
		p.firstAfter = now.Sub(x.sent)
	default:
		each := max(1, now.Sub(x.first)/time.Duration(x.answered-1))
		x.window = min(max(x.window, int(2*p.firstAfter/each)), mostWindow)
	}
	p.grow(now)
	q := x.unanswered[0]
	x.unanswered = x.unanswered[1:]
	return q
}

// grow adds connections while that makes the server faster, and takes them back if it does not. The
// caller holds the lock.
func (p *peer) grow(now time.Time) {
	if p.starting > 0 {
		return
	}
	if p.responses++; p.responses == 1 {
		p.since = now
	}
	if p.responses < measured*p.workers {
		return
	}
	rate := float64(p.responses-1) / max(now.Sub(p.since), time.Microsecond).Seconds()
	p.responses = 0
	if p.workers > p.fewer && rate < payingFactor*p.fewerRate {
		p.most = p.fewer
		return
	}
	// A connection costs some round trips.
	if float64(p.queued())/rate < 4*p.firstAfter.Seconds() {
		return
	}
	p.fewer, p.fewerRate = p.workers, rate
	p.spawn(2 * p.workers)
}

// again puts a question back that a busy server has not answered, which gets fewer connections.
func (x *exchange) again(q *question) {
	p := x.p
	p.mu.Lock()
	defer p.mu.Unlock()
	p.putBack([]*question{q})
	p.most = max(1, p.workers-1)
	x.window = 1
}

// refused lets nothing be requested of a busy server for a while. It reports whether it is to be
// asked again at all.
func (p *peer) refused(retryAfter time.Duration) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if retryAfter > maxRetryAfter || p.busy.Failures() >= maxBusy && p.busy.Rest(now) == 0 {
		return false
	}
	p.busy.Fail(now, retryAfter)
	return true
}

// works notes that the server is not busy. Answers to what was requested before it was say nothing.
func (p *peer) works() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.busy.Rest(time.Now()) == 0 {
		p.busy.Succeed()
	}
}

// cut deals with a response that has begun and broken off: the server is there, but busy perhaps.
func (x *exchange) cut() {
	again := x.p.refused(0)
	x.p.mu.Lock()
	defer x.p.mu.Unlock()
	x.p.good = again
}

// pipelined notes how many responses have come on a connection, and whether it broke while there
// were more to come. The caller holds the lock.
func (p *peer) pipelined(responses int, broke bool) {
	switch {
	case responses >= fewResponses:
		p.broken = 0
	case broke:
		p.broken++
	}
}

// broke deals with an error of the connection.
func (x *exchange) broke(err error) (again bool) {
	p, err := x.p, shortened(err)
	silent := errors.Is(err, os.ErrDeadlineExceeded)
	p.mu.Lock()
	x.giveBack()
	// It may have been closed while it was idle.
	if p.c.ctx.Err() == nil && !x.vain && !(x.idle && !silent) {
		if p.workers > 1 && x.served == 0 {
			// The server has no room for another connection.
			p.most = p.workers - 1
		} else if !x.survives(silent, &err) {
			p.abandon(err)
			return false
		}
	}
	p.mu.Unlock()
	return true
}

// survives decides after an error of a connection whether the server gets another one; if not, err
// is why. The caller holds the lock.
func (x *exchange) survives(silent bool, err *error) bool {
	p := x.p
	plain := p.broken >= maxBroken
	// Perhaps it only dislikes pipelines.
	if p.pipelined(x.served, len(x.unanswered) > 1); silent && p.broken > 0 {
		p.broken = maxBroken // it takes too long to find out by another one
	}
	if x.served > 0 && !silent {
		return true
	}
	p.failures++
	most := maxFailures
	if p.good {
		most = maxFailuresLater
	}
	if silent {
		*err = fmt.Errorf("no answer within %v: %w", p.c.o.NarinfoTimeout, os.ErrDeadlineExceeded)
	}
	if silent && (!p.good || p.failures > maxSilent) || p.failures >= most {
		return false
	}
	// Perhaps the server breaks at this item. Silence is not waited for again, unless it was about
	// a pipeline.
	q := x.unanswered[0]
	queue := slices.Clone(p.queues[q.urgency])
	i := slices.Index(queue, q)
	p.queues[q.urgency] = slices.Delete(queue, i, i+1)
	if q.breaks++; q.breaks == maxFailures || silent && (plain || q.breaks > 1) {
		q.call.resolve(Answer{}, &ServerError{Server: p.server, Err: fmt.Errorf("no answer about %s: %w", q.hash, *err)})
	} else {
		p.queues[q.urgency] = append(p.queues[q.urgency], q)
	}
	return true
}
