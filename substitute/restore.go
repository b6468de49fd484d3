// SPDX-License-Identifier: GPL-3.0-or-later

package substitute

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/decompress"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

const (
	// leastLimit is the least bound on the length of an archive, in bytes. A
	// NarSize that is too small does occur and is harmless: NarHash decides.
	leastLimit = 1 << 20
	// readAheadBuffers and readAheadSize (bytes) are the memory between a
	// decompressor and the restorer.
	readAheadBuffers = 24
	readAheadSize    = 128 << 10
	leastReadAhead   = 4 << 10
	// shortArchive is the length in bytes of an archive up to which it is not read
	// ahead.
	shortArchive = 64 << 10
	// A source that brings less than leastRate bytes per second for ratePeriod is
	// left for the next one.
	leastRate  = 1 << 10
	ratePeriod = time.Minute
)

// A Status is the outcome of a substitution.
type Status uint8

// The outcomes.
const (
	// NotFound: there is no authorised narinfo, or no source has worked.
	NotFound Status = iota
	// Success: the item is at its destination.
	Success
	// HashMismatch: sources have worked, but no one has had the right contents.
	HashMismatch
)

// An Outcome is what has become of a substitution.
type Outcome struct {
	Status Status
	// NarHash and NarSize are those of the narinfo, if Status is Success.
	NarHash string
	NarSize uint64
	// Expected and Actual are the hashes of the narinfo and of what was found
	// instead, in nix-base32, if Status is HashMismatch.
	Expected, Actual string
}

// Substitute restores a store item to destination. Whatever is there is removed
// first, and whatever has been written there is removed after a failure. Messages
// about failures have been shown when it returns.
func (s *Substituter) Substitute(ctx context.Context, path, destination string) Outcome {
	if _, err := narinfo.HashPart(s.StoreDir, path); err != nil {
		s.Log.Errorf("no valid substitute for %.300q: %v", path, err)
		return Outcome{}
	}
	f := s.lookup(ctx, []string{path})[path]
	if f == nil {
		s.Log.Errorf("no valid substitute for '%s'", path)
		return Outcome{}
	}
	if err := f.authorised.narinfo.CheckHash(); err != nil {
		s.Log.Errorf("no valid substitute for '%s': %v", path, err)
		return Outcome{}
	}
	j := &job{
		s:           s,
		path:        path,
		destination: destination,
		want:        f.authorised.narinfo,
		progress:    s.Log.Download(destination),
		tried:       map[string]bool{},
	}
	outcome := j.run(ctx, f)
	j.progress.Finish(outcome.Status == Success)
	switch outcome.Status {
	case NotFound:
		s.Log.Errorf("failed to find alternative substitute for '%s'", path)
	case HashMismatch:
		s.Log.Errorf("hash mismatch for '%s': expected %s, got %s", path, outcome.Expected, outcome.Actual)
	}
	return outcome
}

// A job is the substitution of one item.
type job struct {
	s           *Substituter
	path        string
	destination string
	want        *narinfo.Narinfo
	progress    *protocol.Download
	tried       map[string]bool // URLs
	choice      *choice         // what blocks are compared with while they come; nil if they are not
	actual      *[32]byte       // the first wrong hash
}

// run tries one source after the other.
func (j *job) run(ctx context.Context, f *found) Outcome {
	known := append([]record{f.chosen}, f.others...)
	blocksFirst := j.s.Policy != HTTPFirst
	if j.s.Policy == Fastest {
		j.choice = j.choose(ctx, known)
		j.choice.show(j)
		blocksFirst = j.choice.blocksFirst()
	}
	if blocksFirst {
		if o, ok := j.fromBlocks(ctx, known); ok {
			return o
		}
	}
	j.choice = nil // what is tried last is given its time
	if o, ok := j.fromServers(ctx, known); ok {
		return o
	}
	if o, ok := j.fromBlocks(ctx, known); ok { // those that have not been tried
		return o
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

// fromServers tries the URLs of the narinfos that are known, and then those of
// the servers that have not been asked.
func (j *job) fromServers(ctx context.Context, known []record) (Outcome, bool) {
	for _, r := range known {
		if o, ok := j.record(ctx, r); ok {
			return o, true
		}
	}
	// Servers that had no need to be asked for a narinfo may have the bytes.
	asked := map[*server]bool{}
	for _, r := range known {
		asked[r.server] = true
	}
	for _, server := range j.s.servers {
		if asked[server] {
			continue
		}
		if ctx.Err() != nil {
			break
		}
		if r := j.ask(ctx, server); r != nil && narinfo.Equivalent(r.narinfo, j.want) {
			if o, ok := j.record(ctx, *r); ok {
				return o, true
			}
			if o, ok := j.fromBlocks(ctx, []record{*r}); ok {
				return o, true
			}
		}
	}
	return Outcome{}, false
}

// success is the outcome of an item that is there, with an archive of the given
// length.
func (j *job) success(size uint64) Outcome {
	// The daemon needs a number, and takes the one that the narinfo has.
	if j.want.NarSizeKnown {
		size = j.want.NarSize
	}
	return Outcome{Status: Success, NarHash: j.want.NarHash, NarSize: size}
}

// failed deals with a source that has failed. It returns false if there is no
// point in trying another one.
func (j *job) failed(ctx context.Context, err error) bool {
	j.s.Log.Warnf("%v; trying to find an alternative", err)
	return j.wiped(ctx)
}

// wiped removes what a source has left behind. It returns false if there is no
// point in trying another one.
func (j *job) wiped(ctx context.Context) bool {
	if err := restore.Remove(j.destination); err != nil {
		j.s.Log.Errorf("%v", err)
		return false
	}
	return ctx.Err() == nil
}

// check compares what was restored with what the narinfo says.
func (j *job) check(r restore.Result) error {
	if r.NarHash == j.want.NarDigest {
		return nil
	}
	if j.actual == nil {
		j.actual = &r.NarHash
	}
	return fmt.Errorf("wrong contents: hash %s instead of %s",
		nixbase32.EncodeToString(r.NarHash[:]), strings.TrimPrefix(j.want.NarHash, "sha256:"))
}

// ask asks one server for the item's narinfo.
func (j *job) ask(ctx context.Context, server *server) *record {
	hash, err := narinfo.HashPart(j.s.StoreDir, j.path)
	if err != nil {
		return nil
	}
	var result atomic.Pointer[record]
	j.s.ask(ctx, server, []*item{{path: j.path, hash: hash}}, false, func(_ *item, r *record) { result.Store(r) })
	return result.Load()
}

// record tries the URLs of one narinfo.
func (j *job) record(ctx context.Context, r record) (Outcome, bool) {
	if j.s.Policy == ERISOnly {
		return Outcome{}, false
	}
	for _, u := range r.narinfo.PreferredURLs(j.s.order) {
		if ctx.Err() != nil {
			return Outcome{}, false
		}
		url, err := narinfo.ResolveURL(r.server.url, u.URL)
		if err != nil {
			j.s.Log.Warnf("%s: %v", j.path, err)
			continue
		}
		if j.tried[url] {
			continue
		}
		j.tried[url] = true
		// Whoever sends narinfos over a network has no business with our files.
		if mirror.IsLocal(url) && !mirror.IsLocal(r.server.url) {
			j.s.Log.Warnf("%s: %s names a local file, %.300q", j.path, r.server.name, url)
			continue
		}
		if err := j.s.Mirrors.Down(url); err != nil {
			j.s.sayDown(mirror.WithoutUser(url), err, false)
			continue
		}
		size, err := j.attempt(ctx, url, u.Compression)
		if err == nil {
			return j.success(size), true
		}
		goOn := false
		if down := j.s.Mirrors.Down(url); down != nil {
			j.s.sayDown(mirror.WithoutUser(url), down, false)
			goOn = j.wiped(ctx)
		} else {
			goOn = j.failed(ctx, naming(mirror.WithoutUser(url), err))
		}
		if !goOn {
			return Outcome{}, false
		}
	}
	return Outcome{}, false
}

// naming makes sure that an error names the URL that it is about.
func naming(url string, err error) error {
	if strings.Contains(err.Error(), url) {
		return err
	}
	return fmt.Errorf("%s: %w", url, err)
}

// attempt restores the item from one URL. It returns the length of the archive.
func (j *job) attempt(ctx context.Context, url, compression string) (narSize uint64, err error) {
	if err := restore.Remove(j.destination); err != nil {
		return 0, err
	}
	before := usage()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	begin := time.Now()
	body, err := j.s.Mirrors.OpenNar(ctx, url)
	if err != nil {
		return 0, err
	}
	defer body.Close()
	latency := time.Since(begin)
	size := body.Size
	if size < 0 && compression == "none" {
		size = int64(j.want.NarSize)
	}
	j.progress.From(body.URL, size)
	var bounded io.Reader = body
	if !mirror.IsLocal(url) {
		bounded = ratelimit.Reader(ctx, body, j.s.Limiter)
	}
	counted := &counter{r: bounded, progress: j.progress}
	stop := watchRate(&counted.n, cancel)
	defer stop()
	plain, err := decompress.Open(compression, counted)
	if err != nil {
		return 0, err
	}
	nodes, closeNodes := j.reader(ctx, plain)
	result, err := restore.Restore(ctx, nodes, j.destination, j.options())
	if err != nil {
		cancel(err) // makes a read that is under way return
		err = context.Cause(ctx)
	}
	closeNodes()
	plain.Close()
	if err != nil {
		return 0, err
	}
	body.Drain()
	if err := j.check(result); err != nil {
		return 0, err
	}
	j.s.noteServer(url, counted, latency)
	j.s.adapt(before)
	return result.NarSize, nil
}

// reader reads the archive, in a goroutine of its own unless it is short.
func (j *job) reader(ctx context.Context, plain io.Reader) (nodes *nar.Reader, done func()) {
	if j.want.NarSize <= shortArchive {
		return nar.NewReader(nar.FeedReader(plain, int(max(j.want.NarSize, leastReadAhead)))), func() {}
	}
	ahead := nar.NewReadAhead(ctx, plain, readAheadBuffers, int(min(j.want.NarSize, readAheadSize)))
	return nar.NewReader(ahead), ahead.Close
}

func (j *job) options() restore.Options {
	o := restore.Options{MaxBytes: max(j.want.NarSize, leastLimit)}
	// The links of a store are for what is in it.
	if j.s.Deduplicate && strings.HasPrefix(j.destination, j.s.StoreDir+"/") {
		o.LinksDirectory = j.s.StoreDir + "/.links"
	}
	return o
}

// A counter counts what is read through it.
type counter struct {
	r        io.Reader
	progress *protocol.Download
	n        atomic.Int64
	waited   atomic.Int64 // in Read, in nanoseconds
}

func (c *counter) Read(p []byte) (int, error) {
	begin := time.Now()
	n, err := c.r.Read(p)
	c.waited.Add(int64(time.Since(begin)))
	c.n.Add(int64(n))
	c.progress.Transferred(n)
	return n, err
}

// watchRate cancels when the bytes that n counts come too slowly to ever make an
// item. The caller must call what it returns.
func watchRate(n *atomic.Int64, cancel context.CancelCauseFunc) (stop func()) {
	before := int64(0)
	return every(ratePeriod, func() bool {
		now := n.Load()
		if now-before < leastRate*int64(ratePeriod/time.Second) {
			cancel(fmt.Errorf("only %d bytes in %v", now-before, ratePeriod))
			return false
		}
		before = now
		return true
	})
}

// every calls f after each period, until that returns false or stop is called, as
// the caller must.
func every(period time.Duration, f func() bool) (stop func()) {
	done := make(chan struct{})
	var wait sync.WaitGroup
	wait.Go(func() {
		ticker := time.NewTicker(period)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
			case <-done:
				return
			}
			if !f() {
				return
			}
		}
	})
	return func() { close(done); wait.Wait() }
}

// cpu is how much of the processor has been used until when.
type cpu struct {
	at   time.Time
	user time.Duration
}

func usage() cpu {
	var r unix.Rusage
	unix.Getrusage(unix.RUSAGE_SELF, &r)
	return cpu{time.Now(), time.Duration(r.Utime.Nano())}
}

// adapt chooses the compression for the next item: one that is fast to decompress
// if that was what took the time, and one that is small if it was the network
// (Guix, guix/scripts/substitute.scm: guix-substitute).
func (s *Substituter) adapt(before cpu) {
	after := usage()
	wall := after.at.Sub(before.at)
	if wall <= 0 {
		return
	}
	switch share := float64(after.user-before.user) / float64(wall); {
	case share > 0.8:
		s.order = narinfo.Fast
	case share < 0.2:
		s.order = narinfo.Small
	}
}
