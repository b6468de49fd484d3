// SPDX-License-Identifier: GPL-3.0-or-later

package substitute

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/throughput"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/reuse"
)

const (
	// leastLimit is the least bound on the length of an archive, in bytes. A NarSize that is too
	// small does occur and is harmless: NarHash decides.
	leastLimit = 1 << 20
	// A way is left for the next one, or for none, when less than leastRate bytes per second have
	// come for ratePeriod.
	leastRate  = 1 << 10
	ratePeriod = time.Minute
	// paceEvery is how often the pace is looked at.
	paceEvery = 250 * time.Millisecond
	// maxRounds is how often ways that have failed for a while are tried again.
	maxRounds = 5
	// maxRetryAfter is the longest time for which a server is waited for because it wants that.
	maxRetryAfter = 30 * time.Second
	// roundPause is the time until ways that have failed for a while are tried again, which
	// doubles, and maxPauses is what all of these may be together.
	roundPause = 250 * time.Millisecond
	maxPauses  = time.Minute
	// slowTime is how long a nar may come at any pace, and mostSilence for how long all servers
	// together may be silent about one item, if they are several.
	slowTime    = 5 * time.Second
	mostSilence = 28 * time.Second
	// maxServerFailures is after how many failures in a row a server is not waited for.
	maxServerFailures = 7
)

// A Status is the outcome of a substitution.
type Status uint8

// The outcomes.
const (
	// NotFound: there is no authorised narinfo, or no way has worked.
	NotFound Status = iota
	// Success: the item is at its destination.
	Success
	// HashMismatch: ways have worked, but no one has had the right contents.
	HashMismatch
	// Full: the file system of the destination takes no more.
	Full
)

// An Outcome is the result of a substitution.
type Outcome struct {
	Status Status
	// NarHash and NarSize are those of the narinfo, if Status is Success.
	NarHash string
	NarSize uint64
	// Expected and Actual are the hashes of the narinfo and of what was found instead, in
	// nix-base32, if Status is HashMismatch.
	Expected, Actual string
}

// Substitute restores a store item to destination. Whatever is there is removed first, and whatever
// has been written there is removed after a failure. Messages about failures have been shown when
// it returns.
//
// What has come from a cache, and turns out to be of no use, is requested from its server again,
// and tried again if it has changed.
func (s *Substituter) Substitute(ctx context.Context, path, destination string) Outcome {
	if _, err := narinfo.HashPart(s.StoreDir, path); err != nil {
		s.Log.Errorf("no valid substitute: %v", err)
		return Outcome{}
	}
	progress := s.Log.Download(destination)
	begin := s.Now()
	for renewed, madeRoom := false, false; ; {
		j := &job{s: s, path: path, destination: destination, log: s.Log, progress: progress}
		outcome, err := j.substitute(ctx, s.lookup(ctx, []string{path}))
		if outcome.Status == Success || ctx.Err() != nil {
			progress.Finish(outcome.Status == Success)
			return outcome
		}
		if outcome.Status == Full && !madeRoom && s.MakeRoom != nil && s.MakeRoom(destination) {
			madeRoom = true
			continue
		}
		if !s.renew(ctx, path, j.useless, begin, renewed) || renewed {
			progress.Finish(false)
			s.sayFailed(path, outcome, err)
			return outcome
		}
		renewed = true
	}
}

func (s *Substituter) sayFailed(path string, o Outcome, err error) {
	say := s.Log.Errorf
	if s.Failed != nil {
		say = s.Failed
	}
	switch {
	case o.Status == HashMismatch:
		say("hash mismatch for '%s': expected %s, got %s", path, o.Expected, o.Actual)
	case err != nil:
		say("no valid substitute for '%s': %v", path, err)
	default:
		say("failed to find alternative substitute for '%s'", path)
	}
}

var errNone = errors.New("no authorised narinfo describes it")

// substitute tries to get an item that alone has been looked up. The error is nil if there were
// ways, and room for it.
func (j *job) substitute(ctx context.Context, l *lookup) (Outcome, error) {
	if err := j.prepare(ctx, l); err != nil {
		return Outcome{}, err
	}
	j.show()
	if len(j.ways) == 0 && j.s.Policy == ERISOnly {
		return Outcome{}, fmt.Errorf("the policy is eris-only, and %s", j.notBlocks())
	}
	outcome := j.run(ctx)
	return outcome, j.full
}

// prepare lists the ways to an item that alone has been looked up.
func (j *job) prepare(ctx context.Context, l *lookup) error {
	f := l.found(l.items[0])
	if f == nil {
		j.useless = l.items[0].records
		return errNone
	}
	if err := f.authorised.narinfo.CheckHash(); err != nil {
		j.useless = []record{f.authorised}
		return err
	}
	j.want, j.listed, j.vain = f.authorised.narinfo, map[string]bool{}, map[string]int{}
	j.list(ctx, f.all)
	if j.wantsBlocks() || len(j.ways) > 0 && j.isLast(j.ways[0]) {
		j.moreRecords(ctx)
	}
	return nil
}

// A job is the substitution of one item.
type job struct {
	s           *Substituter
	path        string
	destination string
	want        *narinfo.Narinfo
	log         *protocol.Log
	progress    *protocol.Download
	ahead       atomic.Bool // the daemon does not wait for it yet

	records []record           // that have been listed
	listed  map[string]bool    // URLs and URNs
	ways    []*candidate       // still to be tried, in order
	bases   []*reuse.Candidate // old items in which blocks may stand
	later   []*candidate       // to be tried once more if nothing else works: slow or wrong ones
	failing []*candidate       // failed for a while
	vain    map[string]int     // how many ways of a kind have failed
	useless []record           // of which nothing comes, or whose nar is gone or has other contents

	full         error         // there is no room for it
	actual       *[32]byte     // the first wrong hash
	silence      time.Duration // that servers have kept
	retryAfter   time.Duration // that a failing server wants
	stopped      bool          // a block store is away that was there a moment ago
	blocksFailed string        // why blocks have been of no use
}

// run tries one way after the other. What fails for a while is tried again, some times, if the
// daemon waits for it.
func (j *job) run(ctx context.Context) Outcome {
	begin := time.Now()
	for round := 0; ; round++ {
		if o, ok := j.tryAll(ctx); ok {
			return o
		}
		if ctx.Err() != nil || round >= maxRounds && !j.stopped || !j.waited() || !j.pause(ctx, round, begin) {
			break
		}
	}
	if j.actual != nil {
		return Outcome{
			Status:   HashMismatch,
			Expected: strings.TrimPrefix(j.want.NarHash, "sha256:"),
			Actual:   nixbase32.EncodeToString(j.actual[:]),
		}
	}
	return Outcome{}
}

// isBlocks reports whether the way is blocks, of which all that are not near are fetched.
func isBlocks(c *candidate) bool { return c.kind == "blocks" }

// moreRecords asks the servers that had no need to be asked before, which may have the item too: in
// order, and without waiting for those that are slow. It reports whether there are further ways.
func (j *job) moreRecords(ctx context.Context) bool {
	before := len(j.ways)
	for ctx.Err() == nil && (len(j.ways) == before || j.wantsBlocks()) {
		l := j.s.newLookup([]string{j.path}, func(*record) {})
		l.servers = slices.DeleteFunc(slices.Clone(l.servers), func(server *server) bool {
			return slices.ContainsFunc(j.records, func(r record) bool { return r.server == server })
		})
		l.counts = func(r record) bool {
			return narinfo.Equivalent(r.narinfo, j.want) && (len(r.narinfo.ERIS) > 0 || !j.wantsBlocks())
		}
		l.run(ctx)
		if len(l.items[0].records) == 0 {
			break
		}
		j.list(ctx, l.items[0].records)
	}
	return len(j.ways) > before
}

// wantsBlocks reports whether blocks are to be tried first, and are not among the ways.
func (j *job) wantsBlocks() bool {
	return j.s.Blocks != nil && (j.s.Policy == ERISFirst || j.s.Policy == ERISOnly) && !slices.ContainsFunc(j.ways, isBlocks)
}

// tryAll tries the ways in the list, then those of further servers, and at last some once more.
func (j *job) tryAll(ctx context.Context) (Outcome, bool) {
	for ctx.Err() == nil {
		// The other ways of a server that is of no use now are the last, also after those of
		// others.
		j.sort()
		for (len(j.ways) == 0 || j.isLast(j.ways[0])) && j.moreRecords(ctx) {
		}
		if len(j.ways) == 0 {
			// Nars that have been silent only if there was not much of that.
			j.ways = slices.DeleteFunc(j.later, func(c *candidate) bool {
				c.patient = true
				return c.last.got.Load() == 0 && !isBlocks(c) && j.silence > mostSilence/2
			})
			j.later = nil
			if len(j.ways) == 0 {
				return Outcome{}, false
			}
		}
		c := j.ways[0]
		j.ways = j.ways[1:]
		size, err := j.try(ctx, c)
		if err == nil {
			if c.kind == "nar" {
				c.from.server.ended(true)
			}
			if c.kind == "nar" && j.s.Verbose {
				j.log.Notef("%s: not from blocks: %s", j.path, j.notBlocks())
			}
			// The daemon needs a number, and takes the one that the narinfo has.
			if j.want.NarSizeKnown {
				size = j.want.NarSize
			}
			return Outcome{Status: Success, NarHash: j.want.NarHash, NarSize: size}, true
		}
		var o Outcome
		if restore.IsFull(j.destination, err) { // no other way would do better
			o.Status, j.full = Full, err
		} else {
			j.failed(ctx, c, err)
		}
		if err = restore.Remove(j.destination); err != nil {
			j.log.Errorf("%v", err)
		}
		if err != nil || j.full != nil {
			return o, j.full != nil
		}
	}
	return Outcome{}, false
}

var (
	// errSlow is why a way is given up for another one.
	errSlow = errors.New("it comes too slowly; another way should be faster")
	// errContents is why a way is of no use that works.
	errContents = errors.New("wrong contents")
	errSilent   = fmt.Errorf("no answer, like from others before: %w", os.ErrDeadlineExceeded)
)

// failed notes why a way has failed, and tells it.
func (j *job) failed(ctx context.Context, c *candidate, err error) {
	j.vain[c.kind]++
	if isBlocks(c) {
		j.blocksFailed = err.Error()
	}
	if w, ok := c.way.(interface {
		failed(ctx context.Context, err error)
	}); ok {
		w.failed(ctx, err)
	}
	status, _ := errors.AsType[*mirror.StatusError](err)
	gone := status != nil && (status.Code == http.StatusNotFound || status.Code == http.StatusGone)
	if c.kind == "nar" && !gone && ctx.Err() == nil {
		c.from.server.ended(false)
	}
	if errors.Is(err, errSlow) {
		j.later = append(j.later, c)
		j.log.Notef("%s: %v", c, err)
		return
	}
	if c.kind != "blocks" && c.kind != "nar" {
		if status != nil && status.Temporary() {
			j.failing = append(j.failing, c) // the nar may be refused, too
		}
		if j.s.Verbose {
			j.log.Notef("%v; going on with another way", naming(c.String(), err))
		}
		return
	}
	var server *mirror.ServerError
	var busy *fetch.BusyError
	switch {
	case mayBeRight(c, err, status != nil && !status.Temporary()):
		c.again = true
		j.later = slices.Insert(j.later, 0, c)
	case errors.Is(err, errContents), gone:
		if !isBlocks(c) {
			j.useless = append(j.useless, c.from)
		}
	case status != nil && status.RetryAfter > maxRetryAfter, errors.As(err, &busy) && busy.After > maxRetryAfter:
	case status != nil && status.Temporary():
		j.failing = append(j.failing, c)
		j.retryAfter = max(j.retryAfter, status.RetryAfter)
	case busy != nil:
		j.failing = append(j.failing, c)
		j.retryAfter = max(j.retryAfter, busy.After)
		j.stopped = j.stopped || busy.Stopped
	case errors.As(err, &server) && !errors.Is(err, os.ErrDeadlineExceeded):
		if server.Failures < maxServerFailures {
			j.failing = append(j.failing, c)
			j.retryAfter = max(j.retryAfter, server.Rest)
		}
		if server.Rest > 0 {
			j.log.WarnOnce("down "+server.Server, "%v", naming(c.String(), err))
			return
		}
	}
	text := fmt.Sprintf("%v; trying to find an alternative", naming(c.String(), err))
	if isBlocks(c) && !errors.Is(err, errContents) && len(j.ways) > 0 && !j.s.Verbose {
		// Which many items may meet with that can be had nevertheless.
		for next := err; next != nil; next = errors.Unwrap(next) {
			err = next
		}
		j.log.WarnOnce("blocks "+err.Error(), "%s", text)
		return
	}
	if status != nil && status.RetryAfter <= maxRetryAfter && status.Temporary() {
		// Which a server that limits what one client gets says about many items.
		j.log.WarnOnce(fmt.Sprint(status.Code, " ", c.from.server.url), "%s", text)
		return
	}
	j.log.Warnf("%s", text)
}

// mayBeRight reports whether a way has brought wrong bytes, for the first time, that were perhaps
// right when they were sent, or was refused, as by a cache on the way that remembers what was there
// before, or a server that counts requests. What fails on this machine, or was cut off more than
// once, is not.
func mayBeRight(c *candidate, err error, refused bool) bool {
	w, ok := c.way.(*narWay)
	_, here := errors.AsType[syscall.Errno](err)
	came := !c.last.slow.Load() && !c.last.cut.Load() && c.last.got.Load() > 0
	return ok && !c.again && (came || refused) && !mirror.IsLocal(w.url) && !here
}

// pause waits before ways that have failed for a while are tried again. It reports whether there
// are any, and time.
func (j *job) pause(ctx context.Context, round int, begin time.Time) bool {
	if len(j.failing) == 0 {
		return false
	}
	wait := roundPause << min(round, maxRounds-1)
	wait += rand.N(wait/4 + 1)
	wait = max(wait, j.retryAfter)
	if time.Since(begin)+wait > maxPauses {
		return false
	}
	if wait >= time.Second {
		j.log.Notef("%s: trying again in %.1f s", j.path, wait.Seconds())
	}
	select {
	case <-time.After(wait):
	case <-ctx.Done():
		return false
	}
	j.ways, j.failing, j.retryAfter, j.stopped = j.failing, nil, 0, false
	return true
}

// naming makes sure that an error names the URL or URN that it is about.
func naming(url string, err error) error {
	if strings.Contains(err.Error(), url) {
		return err
	}
	return fmt.Errorf("%s: %w", url, err)
}

// An attempt is the use of one way.
type attempt struct {
	j       *job
	ctx     context.Context
	cancel  context.CancelCauseFunc
	url     string       // of what is downloaded, once it has begun
	again   bool         // what came the first time was wrong, or nothing
	records []record     // of the job when it began; watch may add to those of the job
	next    *candidate   // of another kind in the list then, which watch may change as well; nil if none is
	got     atomic.Int64 // bytes that have come over the network
	read    atomic.Int64 // bytes of files of an old item, and those that came a second time
	total   atomic.Int64 // bytes that will come, if the server says so
	ok      bool         // the right item was made
	slow    atomic.Bool  // it was given up for that
	cut     atomic.Bool  // the server has broken off
}

// left returns how many bytes are still to come, of so many that were expected.
func (a *attempt) left(expected int64) int64 {
	got := a.got.Load()
	if total := a.total.Load(); total > 0 {
		return max(0, total-got)
	}
	// It is a guess. When it has turned out to be too small, the end may be far all the same.
	return max(expected-got, got/8)
}

// countRead notes that a file of an old item is being read, so that the attempt is not taken for
// one that hangs.
func (a *attempt) countRead(size uint64) {
	a.read.Add(int64(min(size, math.MaxInt32)))
}

// countShown notes that n bytes have come over the network, of which fewer may be shown as
// progress.
func (a *attempt) countShown(n, shown int) {
	a.got.Add(int64(n))
	a.j.s.came.Add(int64(n))
	a.j.progress.Add(shown)
}

// try restores the item by one way. It returns the length of the archive.
func (j *job) try(ctx context.Context, c *candidate) (narSize uint64, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	a := &attempt{j: j, ctx: ctx, cancel: cancel, again: c.again, records: j.records}
	if i := slices.IndexFunc(j.ways, func(o *candidate) bool { return o.kind != c.kind }); i >= 0 {
		a.next = j.ways[i]
	}
	c.last = a
	stopped := j.watch(ctx, c, a)
	defer func() {
		cancel(nil)
		stopped()
	}()
	if err := restore.Remove(j.destination); err != nil {
		return 0, err
	}
	nodes, done, err := c.nodes(ctx, a)
	if err != nil {
		return 0, cmp.Or(context.Cause(ctx), j.unquoted(a, err))
	}
	result, err := restore.Restore(ctx, nodes, j.destination, j.options())
	if err != nil {
		err = cmp.Or(context.Cause(ctx), j.unquoted(a, err))
		cancel(err) // makes a read that is under way return
	} else {
		err = j.check(c, result)
	}
	a.ok = err == nil
	done()
	return result.NarSize, err
}

// check compares what was restored with what the narinfo says.
func (j *job) check(c *candidate, r restore.Result) error {
	if r.NarHash == j.want.NarDigest {
		return nil
	}
	if j.actual == nil && (isBlocks(c) || c.kind == "nar") { // or else the base may be to blame
		j.actual = &r.NarHash
	}
	return errContents
}

func (j *job) options() restore.Options {
	o := restore.Options{MaxBytes: max(j.want.NarSize, leastLimit)}
	// The links of a store are for what is in it.
	if j.s.Deduplicate && strings.HasPrefix(j.destination, j.s.StoreDir+"/") {
		o.LinksDirectory = j.s.StoreDir + "/.links"
		o.Damaged = func(file string) {
			j.log.WarnOnce("damaged "+file, "%s was damaged and is replaced; 'guix gc --verify=contents' finds the items that share it", file)
		}
	}
	return o
}

// watch gives the attempt up when it is slow: when it could never make an item, or, by its pace,
// when the next way would be there much earlier, although that begins from the start. If no other
// way is known that would be, it looks for one at further servers. It ends with ctx; the caller
// must call what it returns, which waits for that, before it uses the list again.
func (j *job) watch(ctx context.Context, c *candidate, a *attempt) (stopped func()) {
	begin := time.Now()
	w := watched{c: c, a: a, pace: c.pace, period: []sample{{begin, j.s.came.Load()}}, window: []sample{{begin, 0}}}
	if c.kind == "nar" { // ways that came too slowly leave less time, so that many silent servers do not add up
		slow := slices.DeleteFunc(slices.Clone(j.later), func(c *candidate) bool { return !c.last.slow.Load() })
		w.pace.after >>= min(len(slow), 2)
	}
	patient := c.patient || j.s.Limiter != nil
	var asked time.Time // when other servers were, which may rest for a while
	look := func() (goOn bool) {
		now := sample{time.Now(), a.got.Load()}
		// All items count, for it may be the line that is slow, which they share.
		err := w.tooSlow(sample{now.at, j.s.came.Load() + a.read.Load()})
		switch {
		case err != nil || patient:
		case len(j.ways) > 0 && w.slowerThan(now, j.ways[0].time):
			err = errSlow
		case now.at.Sub(asked) >= slowTime && w.slowerThan(now, 2*throughput.Unknown.Latency+throughput.Seconds(float64(c.bytes)/throughput.Unknown.Rate)):
			j.moreRecords(ctx)
			asked = time.Now()
		}
		if err != nil {
			a.slow.Store(true)
			a.cancel(err)
		}
		return err == nil
	}
	var wait sync.WaitGroup
	wait.Go(func() {
		ticker := time.NewTicker(min(paceEvery, w.pace.after/4))
		defer ticker.Stop()
		for goOn := true; goOn; {
			select {
			case <-ticker.C:
				goOn = look()
			case <-ctx.Done():
				return
			}
		}
	})
	return wait.Wait
}

// A sample is how many bytes there were at some time.
type sample struct {
	at  time.Time
	got int64
}

// watched is what is known of the pace of an attempt.
type watched struct {
	c      *candidate
	a      *attempt
	pace   pace
	period []sample // the last one that is older than ratePeriod, and later ones
	window []sample // the same, with the window of the pace
}

// since adds a sample to some and removes those that are not needed for a time before it. It
// returns the bytes since then, and since when that is.
func since(samples *[]sample, now sample, back time.Duration) (bytes int64, elapsed time.Duration) {
	*samples = append(*samples, now)
	for back > 0 && len(*samples) > 1 && now.at.Sub((*samples)[1].at) >= back {
		*samples = (*samples)[1:]
	}
	first := (*samples)[0]
	return now.got - first.got, now.at.Sub(first.at)
}

// tooSlow returns why the attempt could never make an item, or nil.
func (w *watched) tooSlow(now sample) error {
	bytes, elapsed := since(&w.period, now, ratePeriod)
	if elapsed < ratePeriod || bytes >= leastRate*int64(ratePeriod/time.Second) {
		return nil
	}
	return trickleError{bytes}
}

// trickleError is why an attempt is given up that could never make an item: so few bytes have come.
type trickleError struct{ bytes int64 }

func (e trickleError) Error() string { return fmt.Sprintf("only %d bytes in %v", e.bytes, ratePeriod) }

// slowerThan reports whether the attempt is given up, by its pace, for a way that takes some time.
func (w *watched) slowerThan(now sample, other time.Duration) bool {
	bytes, elapsed := since(&w.window, now, w.pace.window)
	elapsed -= w.pace.here
	left := float64(w.a.left(w.c.bytes))
	return elapsed >= w.pace.after && left > w.pace.factor*float64(bytes)/elapsed.Seconds()*(other+preferMargin).Seconds()
}
