// SPDX-License-Identifier: GPL-3.0-or-later

package mirror

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// An Answer is what a server says about one store item.
type Answer struct {
	// Hash is the hash part of the item.
	Hash string
	// Status is the HTTP status; 200 means that Body is the narinfo. A directory
	// answers with 200 and 404.
	Status int
	// Body is the text of the narinfo, at most [MaxNarinfo] bytes, whatever it
	// may be. A longer one comes as nil.
	Body []byte
	// MaxAge is how long the answer may be kept; negative if the server has not
	// said.
	MaxAge time.Duration
	// Baking tells that the server has begun to make what it does not have yet.
	Baking bool
}

// MaxNarinfo is the length of the longest narinfo in bytes.
const MaxNarinfo = 1 << 20

const (
	// pipeline is how many requests may be under way on one connection, and
	// pipelineSize how many bytes they may have in all if they are more than one.
	// These fit the smallest socket buffers, so that writing them never waits for
	// a server that waits for us to read.
	pipeline     = 32
	pipelineSize = 16 << 10
	// modestShare is how many items are asked for at least on a connection where
	// connections are scarce.
	modestShare = 8
	// fewRequests is how many answers a server gives at least before it closes a
	// connection, if it is one that keeps connections open.
	fewRequests = 8
	// maxBroken is how many pipelines may break before the server gets no more.
	maxBroken = 2
	// fewConnections is how many connections a server gets that is not known to
	// take many: before it has answered, and when it closes each after an answer.
	fewConnections = 4
	// maxFailures is how many connections in a row may break without an answer
	// before a server counts as down, and how many may break at the same item.
	maxFailures = 3
	// maxFailuresLater is how many may break in a row at a server that has
	// answered before: perhaps there are only items that it breaks at.
	maxFailuresLater = 10
)

// Narinfos asks a server for the narinfos of the store items with the given hash
// parts, and calls answer for each that the server says something about; answer
// is called from several goroutines. server is the substitute URL. Narinfos
// returns nil when every item was answered for. It returns a [*ServerError] when
// the server cannot be reached or breaks off, and the cause of ctx when that is
// done; then some items have had no answer.
func (c *Client) Narinfos(ctx context.Context, server string, hashes []string, answer func(Answer)) error {
	return c.narinfos(ctx, server, hashes, answer, false)
}

// NarinfosAhead is like Narinfos for items that may be wanted later: it uses half
// of the connections at most, together with all other calls of it, so that what
// is wanted now does not have to wait.
func (c *Client) NarinfosAhead(ctx context.Context, server string, hashes []string, answer func(Answer)) error {
	return c.narinfos(ctx, server, hashes, answer, true)
}

func (c *Client) narinfos(ctx context.Context, server string, hashes []string, answer func(Answer), modest bool) error {
	l, err := parse(server)
	if err != nil {
		return err
	}
	if l.scheme == "file" {
		return narinfosFromDirectory(ctx, l, hashes, answer)
	}
	base, _, _ := strings.Cut(l.target, "?")
	b := &batch{
		c: c, l: l, peer: c.peer(l.server()), base: strings.TrimSuffix(base, "/") + "/",
		answer: answer, most: c.o.MaxConnections, modest: modest, todo: hashes, tries: map[string]int{},
	}
	b.shares = b.most
	if modest {
		b.most = max(1, b.most/2)
		b.shares = max(1, min(b.most, len(hashes)/modestShare))
	}
	return b.run(ctx)
}

// A batch is one call of Narinfos.
type batch struct {
	c      *Client
	l      *location
	peer   *peer
	base   string // path of the server with a slash at its end
	answer func(Answer)
	modest bool
	shares int // how many connections the items are spread over

	workers sync.WaitGroup

	mu       sync.Mutex
	most     int // connections at the same time
	active   int // workers
	todo     []string
	tries    map[string]int // of items that a connection broke at
	failures int            // connections without an answer since the last one
	good     bool           // there has been an answer
	skipped  error          // why an item was given up
	failed   error
}

func (b *batch) run(parent context.Context) error {
	ctx, stop := context.WithCancel(parent)
	defer stop()
	// More than once only if workers have left while another one gave items back.
	for again := true; again; {
		b.spawn(ctx, stop, max(1, b.c.pool.count(b.peer)))
		b.workers.Wait()
		again = len(b.todo) > 0 && ctx.Err() == nil
	}
	switch {
	case b.failed != nil:
		return b.failed
	case parent.Err() != nil:
		return context.Cause(parent)
	}
	return b.skipped
}

// spawn starts workers until there are as many as wanted, or as items.
func (b *batch) spawn(ctx context.Context, stop func(), wanted int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	wanted = min(wanted, b.most)
	for b.active < wanted && len(b.todo) > 0 {
		b.active++
		b.workers.Go(func() { b.work(ctx, stop) })
	}
}

// work asks for items until there are none left to ask for, or the server has
// failed. The more a server answers, the more connections it gets.
func (b *batch) work(ctx context.Context, stop func()) {
	left := false
	defer func() {
		if !left {
			b.mu.Lock()
			b.active--
			b.mu.Unlock()
		}
	}()
	for {
		share := b.take(0)
		if len(share) == 0 {
			return
		}
		conn, err := b.c.connect(ctx, b.l, wish{patient: b.alone(), modest: b.modest})
		if err != nil {
			b.giveBack(share)
			switch {
			case ctx.Err() != nil:
			case err == errBusy:
				left = b.leave(false)
			case b.peer.downError() == nil && b.leave(true):
				left = true // the server takes no more connections
			default:
				b.fail(err)
				stop()
			}
			return
		}
		b.spawn(ctx, stop, fewConnections)
		rest, answered, err := b.exchange(ctx, stop, conn, share)
		b.giveBack(rest)
		if ctx.Err() != nil {
			return
		}
		if err != nil && !b.survives(conn, rest, answered, err) {
			stop()
			return
		}
		if left = b.leaveIfTooMany(); left {
			return
		}
	}
}

// leaveIfTooMany makes a worker leave if there are more than the server takes.
func (b *batch) leaveIfTooMany() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.active > b.most {
		b.active--
		return true
	}
	return false
}

// alone tells whether there is only one worker.
func (b *batch) alone() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.active == 1
}

// leave makes a worker leave unless it is the only one; with fewer, there are
// never to be as many again.
func (b *batch) leave(fewer bool) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.active == 1 {
		return false
	}
	b.active--
	if fewer {
		b.most = b.active
	}
	return true
}

// survives decides after an error of a connection whether the server gets
// another one.
func (b *batch) survives(conn *connection, left []string, answered int, err error) bool {
	silent := errors.Is(err, os.ErrDeadlineExceeded)
	if conn.reused && answered == 0 && !silent {
		return true // it was closed while nobody used it
	}
	plain := b.peer.isPlain()
	b.peer.pipelined(conn.served, len(left) > 1) // perhaps it only dislikes pipelines
	if answered > 0 && !silent {
		return true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.failures++
	most := maxFailures
	if b.good {
		most = maxFailuresLater
	}
	if silent {
		err = fmt.Errorf("no answer within %v", b.c.o.NarinfoTimeout)
	}
	if silent && !b.good || b.failures >= most {
		if b.failed == nil {
			b.failed = b.peer.setDown(err)
		}
		return false
	}
	if len(left) > 0 {
		// Perhaps the server breaks at this item. Silence is not waited for again,
		// unless it was about a pipeline.
		b.tries[left[0]]++
		if tries := b.tries[left[0]]; tries == maxFailures || silent && (plain || tries > 1) {
			b.drop(left[0], err)
		} else {
			b.postpone(left[0])
		}
	}
	return true
}

// postpone makes an item the last one; the caller holds the lock.
func (b *batch) postpone(hash string) {
	if i := slices.Index(b.todo, hash); i >= 0 {
		b.todo = append(slices.Delete(slices.Clone(b.todo), i, i+1), hash)
	}
}

// drop gives one item up; the caller holds the lock.
func (b *batch) drop(hash string, err error) {
	if i := slices.Index(b.todo, hash); i >= 0 {
		b.todo = slices.Delete(slices.Clone(b.todo), i, i+1)
		b.skipped = &ServerError{b.peer.server, fmt.Errorf("no answer about %s: %w", hash, err)}
	}
}

func (b *batch) fail(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.failed == nil {
		b.failed = err
	}
}

// take returns the items to ask for next on a connection on which a number of
// requests are under way. The items are spread over all connections.
func (b *batch) take(underWay int) []string {
	most := min(pipeline, max(1, pipelineSize/len(b.request(&connection{}, ""))))
	if b.peer.isPlain() {
		most = 1
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	fair := (len(b.todo) + b.shares - 1) / b.shares
	n := min(len(b.todo), fair, most-underWay)
	if n <= 0 {
		return nil
	}
	share := b.todo[:n:n]
	b.todo = b.todo[n:]
	return share
}

func (b *batch) giveBack(hashes []string) {
	if len(hashes) == 0 {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.todo = append(hashes[:len(hashes):len(hashes)], b.todo...)
}

// exchange asks for the items of share, and for more as answers come, on one
// connection. It returns the items that have had no answer, and how many have.
func (b *batch) exchange(ctx context.Context, stop func(), conn *connection, share []string) (left []string, answered int, err error) {
	cancelled := context.AfterFunc(ctx, func() { conn.net.SetDeadline(time.Unix(1, 0)) })
	keep := false
	defer func() {
		b.c.release(conn, cancelled() && keep)
	}()
	left = share
	if err := b.ask(conn, share); err != nil {
		return left, 0, err
	}
	for len(left) > 0 {
		if ctx.Err() != nil {
			return left, answered, ctx.Err()
		}
		conn.await(b.c.o.NarinfoTimeout, 3*b.c.o.NarinfoTimeout)
		response, err := conn.header()
		if err != nil {
			return left, answered, err
		}
		a, err := readAnswer(response, left[0])
		if err != nil {
			return left, answered, err
		}
		b.answer(a)
		left = left[1:]
		answered++
		conn.served++
		b.mu.Lock()
		b.failures, b.good = 0, true
		if response.Close && conn.served < fewRequests {
			// Many connections at once are more than the backlog of such servers.
			b.most = min(b.most, fewConnections)
		}
		wanted := b.active + 1
		b.mu.Unlock()
		b.spawn(ctx, stop, wanted)
		if response.Close || a.Body == nil && a.Status == http.StatusOK {
			b.peer.pipelined(conn.served, len(left) > 0)
			return left, answered, nil
		}
		if len(left) <= pipeline/2 {
			if more := b.take(len(left)); len(more) > 0 {
				left = append(left[:len(left):len(left)], more...)
				if err := b.ask(conn, more); err != nil {
					return left, answered, err
				}
			}
		}
	}
	keep = true
	return nil, answered, nil
}

// request is a request for an item.
func (b *batch) request(conn *connection, hash string) string {
	return conn.requestLine(b.l, b.base+hash+".narinfo") + "User-Agent: " + b.c.o.UserAgent + "\r\n\r\n"
}

// ask sends a request for each item, all with one write.
func (b *batch) ask(conn *connection, hashes []string) error {
	var requests []byte
	for _, hash := range hashes {
		requests = append(requests, b.request(conn, hash)...)
	}
	if err := conn.net.SetWriteDeadline(time.Now().Add(b.c.o.NarinfoTimeout)); err != nil {
		return err
	}
	_, err := conn.net.Write(requests)
	return err
}

// readAnswer reads the rest of a response. An error means that the connection is
// of no more use and that there was no answer.
func readAnswer(response *http.Response, hash string) (Answer, error) {
	defer response.Body.Close()
	a := Answer{
		Hash:   hash,
		Status: response.StatusCode,
		MaxAge: maxAge(response.Header),
		Baking: response.Header.Get("X-Baking") == "1",
	}
	body, err := io.ReadAll(io.LimitReader(response.Body, MaxNarinfo+1))
	if err != nil {
		return a, err
	}
	if len(body) > MaxNarinfo {
		response.Close = true
	} else if a.Status == http.StatusOK {
		a.Body = body
	}
	return a, nil
}

// maxAge reads the directive max-age (RFC 9111, section 5.2.2.1). What is too
// large to count is a long time (section 1.2.2).
func maxAge(h http.Header) time.Duration {
	for _, field := range h.Values("Cache-Control") {
		for directive := range strings.SplitSeq(field, ",") {
			name, value, _ := strings.Cut(strings.TrimSpace(directive), "=")
			if !strings.EqualFold(name, "max-age") {
				continue
			}
			seconds, err := strconv.ParseUint(strings.Trim(value, `"`), 10, 31)
			if errors.Is(err, strconv.ErrRange) {
				seconds, err = 1<<31, nil
			}
			if err == nil {
				return time.Duration(seconds) * time.Second
			}
		}
	}
	return -1
}

// narinfosFromDirectory answers from the directory of a file: URL.
func narinfosFromDirectory(ctx context.Context, l *location, hashes []string, answer func(Answer)) error {
	directory := l.target
	if d, ok := decoded(directory); ok {
		if _, err := os.Stat(directory); errors.Is(err, fs.ErrNotExist) {
			directory = d
		}
	}
	var skipped error
	for _, hash := range hashes {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		a := Answer{Hash: hash, Status: http.StatusOK, MaxAge: -1}
		f, err := openRegular(directory + "/" + hash + ".narinfo")
		if err == nil {
			a.Body, err = io.ReadAll(io.LimitReader(f, MaxNarinfo+1))
			f.Close()
		}
		switch {
		case errors.Is(err, fs.ErrNotExist):
			a.Status = http.StatusNotFound
		case err != nil:
			// That is one file, not the others.
			if skipped == nil {
				skipped = &ServerError{"file:" + directory, err}
			}
			continue
		case len(a.Body) > MaxNarinfo:
			a.Body = nil
		}
		answer(a)
	}
	return skipped
}
