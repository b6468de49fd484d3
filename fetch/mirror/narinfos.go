// SPDX-License-Identifier: GPL-3.0-or-later

package mirror

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/backoff"
)

// An Answer is what a server says about one store item.
type Answer struct {
	// Hash is the hash part of the item.
	Hash string
	// Status is the HTTP status; 200 means that Body is the narinfo. A directory answers with 200
	// and 404. Redirections have been followed, and what was refused because the server is busy has
	// been requested again, if that was of any use.
	Status int
	// Unfollowed is why a redirection has not been followed, and where it leads; nil if none was.
	Unfollowed error
	// Body is the text of the narinfo, at most [MaxNarinfo] bytes, whatever it may be. A longer one
	// comes as nil.
	Body []byte
	// MaxAge is how long the answer may be kept; negative if the server has not said.
	MaxAge time.Duration
	// Baking tells that the server has begun to make what it does not have yet.
	Baking bool
}

// StatusText is the status in words, for people, with why a redirection has not been followed.
func (a *Answer) StatusText() string {
	text := fmt.Sprintf("status %d %s", a.Status, http.StatusText(a.Status))
	if a.Unfollowed != nil {
		text += fmt.Sprintf(": %v", a.Unfollowed)
	}
	return text
}

// isOfAnother reports whether an answer is the narinfo of another item than was asked for.
func (a *Answer) isOfAnother() bool {
	path, ok := bytes.CutPrefix(a.Body, []byte("StorePath: "))
	line, _, _ := bytes.Cut(path, []byte("\n"))
	return ok && !bytes.Contains(line, []byte("/"+a.Hash+"-"))
}

// MaxNarinfo is the length of the longest narinfo in bytes.
const MaxNarinfo = 1 << 20

// Narinfos asks a server for the narinfos of the store items with the given hash parts, and calls
// answer for each that the server says something about; answer is called from several goroutines,
// and must not call the Client, whose locks may be held until it returns. server is the substitute
// URL. Narinfos returns nil when every item was answered for. It returns a [*ServerError] when the
// server cannot be reached or breaks off, and the cause of ctx when that is done; then some items
// have had no answer. All calls share the connections to a server; the turn of what is [Ahead] is
// after all that is [Wanted].
func (c *Client) Narinfos(ctx context.Context, server string, hashes []string, u Urgency, answer func(Answer)) error {
	l, err := parse(server)
	switch {
	case err != nil:
		return err
	case l.scheme == "file":
		return c.narinfosFromDirectory(ctx, l, hashes, answer)
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case len(hashes) == 0:
		return nil
	}
	base, _, _ := strings.Cut(l.target, "?")
	base = strings.TrimSuffix(base, "/") + "/"
	call := &call{answer: answer, left: len(hashes), done: make(chan struct{}), server: l.shown()}
	call.group.SetLimit(runtime.GOMAXPROCS(0))
	questions := make([]*question, len(hashes))
	for i, hash := range hashes {
		at := *l
		at.target = base + hash + ".narinfo"
		questions[i] = &question{call: call, location: &at, hash: hash, urgency: u}
	}
	p := c.peer(l)
	p.add(questions)
	select {
	case <-call.done:
	case <-ctx.Done():
	case <-c.ctx.Done():
	}
	err = call.end()
	if ctx.Err() != nil {
		p.dropVain()
		return context.Cause(ctx)
	}
	return err
}

// A call is one call of Narinfos.
type call struct {
	answer func(Answer)
	server string
	done   chan struct{}  // closed when nothing is left
	group  errgroup.Group // runs answer

	mu    sync.Mutex
	left  int // questions; negative when nobody waits any more
	error error
}

// resolve ends a question, with an answer unless err says why there is none.
func (c *call) resolve(a Answer, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.left < 0 {
		return
	}
	if err != nil {
		c.error = err
	} else {
		c.group.Go(func() error {
			c.answer(a)
			return nil
		})
	}
	if c.left--; c.left == 0 {
		close(c.done)
	}
}

// over reports whether nobody waits any more.
func (c *call) over() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.left < 0
}

// end waits for the answers that are being given, and lets no more be given.
func (c *call) end() error {
	c.mu.Lock()
	if c.left > 0 && c.error == nil {
		c.error = &ServerError{Server: c.server, Err: errors.New("client is closed")}
	}
	c.left = -1
	c.mu.Unlock()
	c.group.Wait()
	return c.error
}

// A question is a narinfo that is requested. It has one owner: a queue, a connection or whoever
// waits to put it back into a queue.
type question struct {
	call     *call
	location *location // of the narinfo, after redirections
	hash     string
	urgency  Urgency

	redirects int
	breaks    int // how often the connection broke when it was the next to be answered, or the server failed
}

// narinfo deals with a response: a redirection is followed, and all else is an answer, unless the
// server is busy or fails, and is to be asked again.
func (x *exchange) narinfo(q *question, header *http.Response, a Answer) (again bool) {
	p := x.p
	switch {
	case isTemporary(a.Status):
		if !isOverload(a.Status) {
			q.breaks++ // perhaps the server fails at this item
		}
		if q.breaks < maxFailures && p.refused(backoff.RetryAfter(header.Header.Get("Retry-After"), time.Now())) {
			return true
		}
	case a.Status == http.StatusOK, a.Status == http.StatusNotFound:
		p.works()
	case isRedirection(a.Status):
		if a.Unfollowed = p.c.follow(q, header.Header.Get("Location")); a.Unfollowed == nil {
			return false
		}
	}
	if a.Status == http.StatusOK {
		q.call.resolve(a, nil)
	} else {
		x.held = append(x.held, held{q, a})
	}
	return false
}

// follow has a narinfo requested where a redirection leads.
func (c *Client) follow(q *question, value string) error {
	to, err := q.location.redirected(value)
	q.redirects++
	switch {
	case err != nil:
		return err
	case q.redirects > maxRedirects:
		return fmt.Errorf("more than %d redirections", maxRedirects)
	case !c.hasRoom(to):
		return fmt.Errorf("redirected to %.300q: too many servers", to)
	}
	q.location = to
	c.peer(to).add([]*question{q})
	return nil
}

const (
	// maxBusy is how often in a row a server may say that it is busy.
	maxBusy = 5
	// busyDelay is about the time until a busy server is asked again; it doubles with each time.
	busyDelay = 100 * time.Millisecond
	// maxRetryAfter is the longest time for which a server is waited for because it wants that;
	// with one that wants more, for maintenance perhaps, all who ask would wait in vain.
	maxRetryAfter = 30 * time.Second
)

// readAnswer reads the rest of a response. An error means that the connection is of no more use and
// that there was no answer.
func readAnswer(response *http.Response) (Answer, error) {
	a := Answer{
		Status: response.StatusCode,
		MaxAge: maxAge(response.Header),
		Baking: response.Header.Get("X-Baking") == "1",
	}
	plain, err := decoded(response)
	if err != nil {
		return a, err
	}
	body, err := io.ReadAll(io.LimitReader(plain, MaxNarinfo+1))
	if err != nil {
		return a, err
	}
	if len(body) <= MaxNarinfo && a.Status == http.StatusOK {
		a.Body = bytes.Clone(body) // without what was read in vain
	}
	// The body is not closed: that would read all of it, and it may be endless.
	if _, err := io.CopyN(io.Discard, response.Body, maxDrain); err != io.EOF {
		response.Close = true
	}
	return a, nil
}

// maxAge reads the directive max-age (RFC 9111, section 5.2.2.1). What is too large to count is a
// long time (section 1.2.2).
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
