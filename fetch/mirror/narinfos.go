// SPDX-License-Identifier: GPL-3.0-or-later

package mirror

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
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
	// pipeline is how many requests may be under way on one connection. Their
	// bytes fit the smallest socket buffers, so that writing them never waits for
	// a server that waits for us to read.
	pipeline = 32
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
	u, err := parse(server)
	if err != nil {
		return err
	}
	if u.Scheme == "file" {
		return narinfosFromDirectory(ctx, u, hashes, answer)
	}
	b := &batch{
		c: c, u: u, server: serverOf(u), answer: answer,
		most: c.o.MaxConnections, todo: hashes, tries: map[string]int{},
	}
	b.base = strings.TrimSuffix(u.EscapedPath(), "/") + "/"
	return b.run(ctx)
}

// A batch is one call of Narinfos.
type batch struct {
	c      *Client
	u      *url.URL
	server string
	base   string // path of the server with a slash at its end
	answer func(Answer)

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
		b.spawn(ctx, stop, 1)
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
		conn, err := b.c.connect(ctx, b.u, false)
		if err != nil {
			b.giveBack(share)
			if ctx.Err() == nil {
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

// survives decides after an error of a connection whether the server gets
// another one.
func (b *batch) survives(conn *connection, left []string, answered int, err error) bool {
	if len(left) > 1 {
		b.c.setPlain(b.server) // perhaps it only dislikes pipelines
	}
	if answered > 0 || conn.reused {
		return true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.failures++
	most := maxFailures
	if b.good {
		most = maxFailuresLater
	}
	if silent := errors.Is(err, os.ErrDeadlineExceeded); silent || b.failures >= most {
		if silent {
			err = fmt.Errorf("no answer within %v", b.c.o.NarinfoTimeout)
		}
		if b.failed == nil {
			b.failed = b.c.setDown(b.server, err)
		}
		return false
	}
	if len(left) > 0 {
		// Perhaps the server breaks at this item.
		if b.tries[left[0]]++; b.tries[left[0]] == maxFailures {
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
		b.skipped = &ServerError{b.server, fmt.Errorf("no answer about %s: %w", hash, err)}
	}
}

func (b *batch) fail(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.failed == nil {
		b.failed = err
	}
}

func (c *Client) setPlain(server string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.plain) < maxServers {
		c.plain[server] = true
	}
}

// take returns the items to ask for next on a connection on which a number of
// requests are under way. The items are spread over all connections.
func (b *batch) take(underWay int) []string {
	b.c.mu.Lock()
	plain := b.c.plain[b.server]
	b.c.mu.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	most := pipeline
	if plain {
		most = 1
	}
	fair := (len(b.todo) + b.c.o.MaxConnections - 1) / b.c.o.MaxConnections
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
		if cancelled() && keep {
			b.c.pool.put(conn)
		} else {
			conn.net.Close()
		}
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
		b.mu.Lock()
		b.failures, b.good = 0, true
		if response.Close {
			// Many connections at once are more than the backlog of such servers.
			b.most = min(b.most, fewConnections)
		}
		wanted := b.active + 1
		b.mu.Unlock()
		b.spawn(ctx, stop, wanted)
		if response.Close || a.Body == nil && a.Status == http.StatusOK {
			if len(left) > 0 {
				b.c.setPlain(b.server)
			}
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

// ask sends a request for each item, all with one write.
func (b *batch) ask(conn *connection, hashes []string) error {
	var requests []byte
	for _, hash := range hashes {
		u := *b.u
		u.Path, u.RawPath = b.base+hash+".narinfo", ""
		if path, err := url.PathUnescape(u.Path); err == nil {
			u.Path, u.RawPath = path, u.Path
		}
		u.RawQuery, u.ForceQuery = "", false
		requests = append(requests, conn.requestLine(&u)...)
		requests = append(requests, "User-Agent: "+b.c.o.UserAgent+"\r\n\r\n"...)
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

// maxAge reads the max-age directive of RFC 9111, section 5.2.2.1.
func maxAge(h http.Header) time.Duration {
	for _, field := range h.Values("Cache-Control") {
		for directive := range strings.SplitSeq(field, ",") {
			name, value, _ := strings.Cut(strings.TrimSpace(directive), "=")
			if !strings.EqualFold(name, "max-age") {
				continue
			}
			seconds, err := strconv.ParseInt(strings.Trim(value, `"`), 10, 32)
			if err == nil && seconds >= 0 {
				return time.Duration(seconds) * time.Second
			}
		}
	}
	return -1
}

// narinfosFromDirectory answers from the directory of a file: URL.
func narinfosFromDirectory(ctx context.Context, u *url.URL, hashes []string, answer func(Answer)) error {
	directory, err := filePath(u)
	if err != nil {
		return err
	}
	for _, hash := range hashes {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		a := Answer{Hash: hash, Status: http.StatusOK, MaxAge: -1}
		f, err := openRegular(directory + "/" + hash + ".narinfo")
		switch {
		case errors.Is(err, fs.ErrNotExist):
			a.Status = http.StatusNotFound
		case err != nil:
			return &ServerError{"file:" + directory, err}
		default:
			a.Body, err = io.ReadAll(io.LimitReader(f, MaxNarinfo+1))
			f.Close()
			if err != nil {
				return &ServerError{"file:" + directory, err}
			}
			if len(a.Body) > MaxNarinfo {
				a.Body = nil
			}
		}
		answer(a)
	}
	return nil
}
