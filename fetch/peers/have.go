// SPDX-License-Identifier: GPL-3.0-or-later

package peers

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

const (
	// joinTime is how long others are waited for that may be in the same question, and answerTime
	// how long for the answers.
	joinTime, answerTime = 10 * time.Millisecond, 250 * time.Millisecond
	// mostDoubts is how many more answers of a peer may be late, or turn out to be wrong, than turn
	// out to be right: then it is not asked any more what it has. From one on it is not waited for.
	mostDoubts = 8
)

// question is one to many peers about the blocks that are looked for at the same time, which are
// fewer than one can hold, because workers are.
type question struct {
	refs    []eris.Reference
	answers []map[*peer]bool // for each, who has said to have it, or not to; once done is closed
	done    chan struct{}    // closed when nobody answers any more
}

// inquire returns what peers say about a block, unless they are so few that all can be asked for
// it. The first to come asks for all who come within joinTime.
func (g *Group) inquire(ctx context.Context, ref eris.Reference) map[*peer]bool {
	g.mu.Lock()
	if len(g.peers) <= MaxAsked {
		g.mu.Unlock()
		return nil
	}
	q, first := g.question, g.question == nil
	if first {
		q = &question{done: make(chan struct{})}
		g.question = q
	}
	n := len(q.refs)
	q.refs = append(q.refs, ref)
	g.mu.Unlock()
	if first {
		time.Sleep(joinTime)
		g.put(q)
	}
	select {
	case <-q.done:
		return q.answers[n]
	case <-ctx.Done():
		return nil
	}
}

// put asks all peers that may answer, and notes what they say.
func (g *Group) put(q *question) {
	var to []*peer
	var trusted []bool
	g.mu.Lock()
	g.question = nil
	now := time.Now()
	for _, p := range g.peers {
		if p.doubts < mostDoubts && p.backoff.Rest(now) == 0 && now.Sub(g.liars[p.host]) >= lieTime {
			to, trusted = append(to, p), append(trusted, p.doubts == 0)
		}
	}
	g.mu.Unlock()
	prefixes, none := fetch.Question(q.refs)
	said := make([][]byte, len(to))
	ctx, cancel := context.WithTimeout(context.Background(), answerTime)
	defer cancel()
	var group, others sync.WaitGroup
	for i, p := range to {
		w := &others
		if trusted[i] || !slices.Contains(trusted, true) {
			w = &group
		}
		w.Go(func() { said[i] = g.have(ctx, p, prefixes, none) })
	}
	group.Wait() // others have the time that these take
	cancel()
	others.Wait()
	q.answers = make([]map[*peer]bool, len(q.refs))
	for n := range q.refs {
		q.answers[n] = map[*peer]bool{}
		at := n
		if n >= none {
			at++
		}
		for i, p := range to {
			if has, known := fetch.Has(said[i], at); known {
				q.answers[n][p] = has
			}
		}
	}
	close(q.done)
}

// have returns the answer of a peer to a question, nil if it is of no use. Nobody has the block at
// the place none.
func (g *Group) have(ctx context.Context, p *peer, question []byte, none int) []byte {
	size := (len(question)/fetch.HavePrefix + 7) / 8
	r := &fetch.Request{Have: question, Size: eris.BlockSize(size), Dst: make([]byte, 0, size)}
	fetch.Await(ctx, p.store, r)
	lies, _ := fetch.Has(r.Block, none)
	if r.Err == nil && !lies {
		return r.Block
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if lies || errors.Is(r.Err, fetch.ErrCannotSay) {
		p.doubts = mostDoubts
	} else if ctx.Err() != context.Canceled {
		p.doubts++
	}
	return nil
}

// claims takes note of whether a peer had a block that it had said to have.
func (g *Group) claims(p *peer, had bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if p.doubts++; had {
		p.doubts = max(0, p.doubts-2)
	}
}
