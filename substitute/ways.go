// SPDX-License-Identifier: GPL-3.0-or-later

package substitute

import (
	"cmp"
	"context"
	"fmt"
	"net/url"
	"slices"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/throughput"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// This file has the list of the ways to an item, and their order. Today they are old items that are
// rewritten, deltas, blocks, those with an old item, and nars. Blocks are encrypted, so that they
// do not compress: those of ERIS-FS are as many bytes as the archive has, where a nar has a third
// or a quarter of them. From near or from several places at once, and when many are there already,
// blocks are the faster way all the same.

// A way is one way to get an item. Each kind is one file, which adds its ways to the list of a job;
// that sorts them, takes one after the other until one works, and checks what was restored.
type way interface {
	// expect returns what the way should cost. It may look at what is there already, for a fifth of
	// a second.
	expect(ctx context.Context) expectation
	// nodes returns the tree as nodes, for the restorer; they stop when ctx ends. It tells the
	// attempt from where they come, and all bytes that come over the network. done must be called
	// once the nodes are not used any more, and the attempt says whether it was of use.
	nodes(ctx context.Context, a *attempt) (nodes nar.Nodes, done func(), err error)
	// String names the way for messages, without anything secret.
	String() string
}

// An expectation is what a way should cost.
type expectation struct {
	bytes int64 // that come over the network
	time  time.Duration
	known bool   // it rests on what was measured
	how   string // the same for people
}

// A pace says that a way is given up once it is clear, after some time, that it needs factor times
// as long as another way, which begins from the start. What counts is how fast bytes have come over
// the network in the last window, or since its beginning if that is 0. The time for what is read
// here meanwhile does not count.
type pace struct {
	after, window time.Duration
	factor        float64
	here          time.Duration
}

// hereFactor is how many times longer than expected it may take to read what is here.
const hereFactor = 4

// paceHere is the pace of a way for which size bytes of an old item are read, at some rate.
func paceHere(size uint64, rate float64) pace {
	here := throughput.Seconds(hereFactor * float64(min(size, 1<<62)) / rate)
	return pace{slowTime, slowTime + here, 10, here}
}

// A candidate is a way in the list.
type candidate struct {
	way
	expectation
	kind    string   // "old item", "leaves" (of an old item, and blocks), "delta", "blocks" or "nar"
	pace    pace     // when it is given up for another one because it is slow
	from    record   // the narinfo that offers it
	last    *attempt // nil if it has not been tried
	patient bool     // it is not given up for being slow
	again   bool     // it has brought wrong bytes, perhaps changed on their way, or nothing
}

// list adds the ways of those records to the job's that describe the item. Earlier ones stay before
// later ones of the same rank.
func (j *job) list(ctx context.Context, records []record) {
	before := len(j.ways)
	if len(j.records) == 0 { // it is the first time
		j.listRewritten(ctx)
	}
	j.records = append(j.records, records...)
	records = equivalent(records, j.want)
	j.listDeltas(records)
	j.listBlocks(records)
	j.listNars(records)
	for _, c := range j.ways[before:] {
		c.expectation = c.expect(ctx)
	}
	j.sort()
}

// sort sorts the ways by their ranks, which change with what servers do.
func (j *job) sort() {
	slices.SortStableFunc(j.ways, func(a, b *candidate) int { return cmp.Compare(j.rank(a), j.rank(b)) })
}

// rank returns the place of a way in the list, as the policy has it.
func (j *job) rank(c *candidate) float64 {
	blocks := isBlocks(c) || c.kind == "leaves"
	if d, ok := c.way.(*deltaWay); ok {
		blocks = d.blocks()
	}
	// Where time does not count, fewer bytes are better: a compressed nar than ERIS-FS.
	fewer := float64(c.bytes) / (1 << 63)
	switch {
	case c.kind == "old item":
		return -2
	case j.isLast(c):
		return 1e6 + c.time.Seconds()
	case !blocks:
		// The order of the servers is the user's: a later one has to be faster by some factor.
		return c.time.Seconds() * (1 + float64(min(c.from.server.index, 8))/4)
	case j.s.Policy == HTTPFirst:
		return 1e12 * (1 + fewer)
	case j.s.Policy != Fastest || !c.known:
		return fewer - 1
	}
	return (c.time - preferMargin).Seconds() / preferFactor
}

// isLast reports whether the way is a nar of a server whose nars were of no use just now, or blocks
// where other capabilities of the item were: a narinfo may have many, none of which need be signed,
// and each may cost as much as the item.
func (j *job) isLast(c *candidate) bool {
	return c.kind == "nar" && c.from.server.rests(&c.from.server.vain) || isBlocks(c) && j.vain[c.kind] >= mostFailed
}

const (
	// Nars have to be faster by so much before they are preferred to blocks: what is measured is
	// not exact, and blocks relieve the servers.
	preferFactor = 1.5
	preferMargin = 500 * time.Millisecond
)

// show tells the list to people who want to know.
func (j *job) show() {
	if !j.s.Verbose {
		return
	}
	for i, c := range j.ways {
		took := fmt.Sprintf("%.1f s", c.time.Seconds())
		if c.time >= throughput.Longest {
			took = "nobody knows when"
		}
		j.log.Notef("%s: way %d of %d: %s: expected %s, %s (%s)", j.path, i+1, len(j.ways), c, took, page.Size(c.bytes), c.how)
	}
}

// A Speed is how fast bytes come.
type Speed = throughput.Speed

const (
	// nearRate is how fast files of this machine come, in bytes per second.
	nearRate = 1e9
	// LeastMeasured is how many bytes tell something about a speed.
	LeastMeasured = 64 << 10
)

// serverSpeed is how fast a server is, or is thought to be.
func (s *Substituter) serverSpeed(address string) Speed {
	if mirror.IsLocal(address) {
		return Speed{Rate: nearRate, Known: true}
	}
	r := s.State.Get(serverOf(address))
	return Speed{Rate: r.Rate, Latency: r.RoundTrip, Known: r.Rate > 0}.OrUnknown()
}

// serverOf is what the speed of a server is remembered by.
func serverOf(address string) string {
	u, err := url.Parse(address)
	if err != nil {
		return address
	}
	return u.Scheme + "://" + u.Host
}

// usable returns nil if Substitute has a way to what was found, or why it has none.
func (s *Substituter) usable(f *found) error {
	err := f.authorised.narinfo.CheckHash()
	if err != nil {
		return err
	}
	for _, r := range f.all {
		if len(r.narinfo.ERIS) > 0 {
			return nil
		}
		for _, u := range r.narinfo.PreferredURLs() {
			if _, err = narURL(r, u.URL); err == nil {
				return nil
			}
		}
	}
	return err
}

// notBlocks returns why an item does not come from blocks.
func (j *job) notBlocks() string {
	switch {
	case j.blocksFailed != "":
		return j.blocksFailed
	case j.s.Policy == HTTPOnly || j.s.Policy == HTTPFirst:
		return "the policy prefers nars"
	case j.s.Blocks == nil:
		return "there is no block store"
	case !slices.ContainsFunc(j.records, func(r record) bool { return len(r.narinfo.ERIS) > 0 }):
		return "no narinfo has a field ERIS"
	case j.s.StoreSpeed != nil && j.s.StoreSpeed().None:
		return "no block store can be reached"
	case slices.ContainsFunc(j.ways, isBlocks):
		return "they are expected to take longer"
	}
	return "no narinfo has a read capability that can be used"
}
