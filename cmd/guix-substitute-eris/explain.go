// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

const explainUsage = `Usage: guix-substitute-eris explain [OPTION]... ITEM...
Say from where store items would come and why: what each substitute server says
of them and whether it counts, what each block store has, which ways there are,
what they should cost, and which one is taken. Nothing is restored.

An ITEM is a store path, a hash part, or a link into the store, of a profile for
example. What servers say is requested anew, and kept for later.

The exit status is 0 if all items can be had, 3 if one is not available, 4 if
one is not authorised, 5 if no server can be reached.
`

const (
	// sampledBlocks is how many blocks of an item each store is asked for.
	sampledBlocks = 32
	// maxBlocksAtOnce is how many of them at a time.
	maxBlocksAtOnce = 32
	// probeTimeout is how long a server or a store may take for an answer, and sampleTimeout for the
	// blocks.
	probeTimeout  = 5 * time.Second
	sampleTimeout = 20 * time.Second
)

// explainCommand says from where items would come.
func explainCommand(args []string) int {
	var s settings
	flags := flag.NewFlagSet("explain", flag.ContinueOnError)
	asJSON := flags.Bool("json", false, "print what is known as JSON")
	full := flags.Bool("full", false, "ask each store for all blocks of the items, and not only for some")
	s.flags(flags)
	if status, ok := parse(flags, args, explainUsage); !ok {
		return status
	}
	arguments := flags.Args()
	if len(arguments) == 0 {
		return usageError("explain takes store items: guix-substitute-eris explain /gnu/store/…")
	}
	s.load()
	ctx, stop := untilSignal()
	defer stop()
	sub := s.silentSession(false)
	defer sub.close()
	var all []explanation
	worst := s.forItems(ctx, sub, arguments, func(e explanation) int {
		s.examineStores(ctx, sub, &e, *full)
		all = append(all, e)
		return exitStatus[e.Availability]
	})
	if len(all) < len(arguments) {
		return worst
	}
	if *asJSON {
		if err := printJSON(all); err != nil {
			return fail("%w", err)
		}
		return worst
	}
	p := newPage()
	for i, e := range all {
		if i > 0 {
			p.line(0, "")
		}
		e.show(p)
	}
	if _, err := io.WriteString(os.Stdout, p.String()); err != nil {
		return fail("%w", err)
	}
	return worst
}

// exitStatus are the exit statuses of commands that are about items.
var exitStatus = map[substitute.Availability]int{
	substitute.Available: 0, substitute.NotAvailable: statusUnavailable,
	substitute.NotAuthorised: statusUnauthorised, substitute.NotReachable: statusUnreachable,
}

// silentSession returns a session that shows nothing by itself but the warnings of its beginning.
func (s *settings) silentSession(query bool) *session {
	log := s.log
	s.log = protocol.NewLog(io.Discard, protocol.LogStyle{})
	sub := s.session(query)
	s.log = log
	s.showNotes()
	sub.SetKeys(s.keys())
	return sub
}

// An explanation is what is known of an item.
type explanation struct {
	substitute.Explanation
	InStore bool `json:"inStore"`
	// Sampled is how many blocks of the item each store was asked for, of Blocks that were found.
	Sampled int           `json:"sampled"`
	Blocks  int           `json:"blocks"`
	Form    string        `json:"form,omitempty"` // of the contents, like "eris-fs"; empty if there is no block
	Stores  []storeReport `json:"stores"`
	keys    string        // file that lists them
}

// A storeReport is what is known of a block store.
type storeReport struct {
	URL     string        `json:"url"`
	Near    bool          `json:"near"`              // it is asked before others, and keeps what they have
	Latency time.Duration `json:"latencyNs"`         // of an answer
	Failure string        `json:"failure,omitempty"` // why it cannot be used
	Has     int           `json:"has"`               // of the sampled blocks
	Rate    float64       `json:"rate,omitempty"`    // bytes per second; 0 if it is not known
	Resting bool          `json:"resting"`           // it has failed lately, and is left alone for now
}

// forItems calls show with what is known of items but for the stores, and returns the exit status,
// the highest of those that show has returned.
func (s *settings) forItems(ctx context.Context, sub *session, items []string, show func(explanation) int) (worst int) {
	for _, text := range items {
		e := explanation{keys: s.keysFile()}
		item, err := s.findItem(ctx, sub, text)
		if err == nil {
			e.Explanation, err = sub.Explain(ctx, item)
		}
		if err != nil {
			return fail("%w", err)
		}
		_, err = os.Lstat(item)
		e.InStore = err == nil
		worst = max(worst, show(e))
	}
	return worst
}

// examineStores finds out what the stores have of an item.
func (s *settings) examineStores(ctx context.Context, sub *session, e *explanation, full bool) {
	if sub.blocks == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, sampleTimeout)
	defer cancel()
	var blocks []image.Block
	if c, ok := e.capability(); ok {
		var form image.Form
		all := lookInto(sub.blocks.members)
		defer all.Close()
		blocks, form = image.Blocks(ctx, all, c, erisfs.Limits{NarSize: max(e.NarSize, 1<<20)})
		e.Form = string(form)
	}
	e.Blocks = len(blocks)
	if !full {
		blocks = sample(blocks, sampledBlocks)
	}
	e.Sampled = len(blocks)
	stats := sub.blocks.Stats()
	e.Stores = make([]storeReport, len(sub.blocks.members))
	var wait sync.WaitGroup
	for i, m := range sub.blocks.members {
		wait.Go(func() { e.Stores[i] = reportStore(ctx, m, stats[i], blocks) })
	}
	wait.Wait()
}

// A looker gets blocks from whichever of some stores has them, and has none keep them: what is
// looked at must not change.
type looker struct {
	*fetch.Workers
	members []pool.Member
}

func lookInto(members []pool.Member) *looker {
	l := &looker{members: members}
	l.Workers = fetch.NewWorkers(maxBlocksAtOnce, l.get)
	return l
}

func (l *looker) String() string { return "all stores" }

// get returns the first block that comes, for any of them may be silent.
func (l *looker) get(ctx context.Context, ref eris.Reference, size eris.BlockSize, _ []byte) ([]byte, error) {
	type answer struct {
		block []byte
		err   error
	}
	answers := make(chan answer, len(l.members))
	var wait sync.WaitGroup
	defer wait.Wait()
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	for _, m := range l.members {
		wait.Go(func() {
			block, err := fetch.Get(ctx, m.Source, ref, size, nil)
			answers <- answer{block, err}
		})
	}
	for range l.members {
		if a := <-answers; a.err == nil {
			return a.block, nil
		}
	}
	return nil, eris.ErrNotFound
}

// capability returns the read capability that would be used, or one that is offered at all.
func (e *explanation) capability() (eris.ReadCapability, bool) {
	var urns []string
	for _, w := range e.Ways {
		urns = append(urns, w.Name)
	}
	for _, s := range e.Servers {
		for _, c := range s.Capabilities {
			urns = append(urns, c.URN)
		}
	}
	for _, urn := range urns {
		if c, err := eris.ParseURN(urn); err == nil {
			return c, true
		}
	}
	return eris.ReadCapability{}, false
}

// sample returns some of many blocks, from everywhere among them.
func sample(blocks []image.Block, most int) []image.Block {
	if len(blocks) <= most {
		return blocks
	}
	some := make([]image.Block, most)
	for i := range some {
		some[i] = blocks[i*len(blocks)/most]
	}
	return some
}

// reportStore asks a store for blocks.
func reportStore(ctx context.Context, m pool.Member, known pool.SourceStats, blocks []image.Block) storeReport {
	r := storeReport{URL: m.Source.String(), Near: m.Near, Rate: known.Rate, Resting: known.Resting}
	latency, err := probe(ctx, m.Source)
	if r.Latency = latency; err != nil {
		r.Failure = storeFailure(r.URL, err)
		return r
	}
	begin := time.Now()
	var has, bytes atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(maxBlocksAtOnce)
	for _, b := range blocks {
		group.Go(func() error {
			block, err := fetch.Get(ctx, m.Source, b.Reference, b.Size, nil)
			if err == nil {
				has.Add(1)
				bytes.Add(int64(len(block)))
			} else if !errors.Is(err, eris.ErrNotFound) {
				return err
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		r.Failure = storeFailure(r.URL, err)
	}
	r.Has = int(has.Load())
	if r.Rate == 0 && bytes.Load() >= leastMeasured {
		r.Rate = float64(bytes.Load()) / time.Since(begin).Seconds()
	}
	return r
}

// storeFailure says what is wrong with a store, which the caller names.
func storeFailure(url string, err error) string {
	text := strings.TrimPrefix(err.Error(), url+": ")
	return plainText(regexp.MustCompile(`^block [A-Z2-7]{52}: `).ReplaceAllString(text, ""))
}

// probe asks a store for a block that there cannot be. It returns how long the answer took, or why
// there was none.
func probe(ctx context.Context, source fetch.Source) (time.Duration, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, probeTimeout, fmt.Errorf("no answer in %v", probeTimeout))
	defer cancel()
	var ref eris.Reference
	rand.Read(ref[:])
	begin := time.Now()
	_, err := fetch.Get(ctx, source, ref, eris.BlockSize1KiB, nil)
	if errors.Is(err, eris.ErrNotFound) {
		err = nil
	}
	return time.Since(begin), err
}

func (e *explanation) show(p *page) {
	p.line(0, "%s", e.Path)
	facts := []string{"not in the store"}
	if e.InStore {
		facts[0] = "in the store already"
	}
	if e.NarHash != "" {
		facts = append(facts, shownSize(int64(e.NarSize))+" unpacked", count(e.References, "reference"))
	}
	p.line(2, "%s", strings.Join(facts, ", "))
	if e.NarHash != "" {
		p.line(2, "%s", e.NarHash)
	}
	p.heading("Substitute servers")
	if len(e.Servers) == 0 {
		p.say(2, bad, "none is known; name some by --substitute-urls")
	}
	for i, s := range e.Servers {
		p.line(2, "%d. %s", i+1, s.URL)
		e.showServer(p, s)
	}
	p.heading("Block stores")
	if len(e.Stores) == 0 {
		p.say(2, note, "none is used; name some by --eris-store-url, by %s or in %s", storeVariable, configurationFile())
	}
	for i, s := range e.Stores {
		p.line(2, "%d. %s", i+1, s.URL)
		e.showStore(p, s)
	}
	switch {
	case e.Form != "":
		p.say(2, note, "the blocks hold the item in the form %s", e.Form)
	case e.Blocks > 0:
		p.say(2, bad, "its first block is in none of them, or in none that answers")
	}
	p.heading("Ways to it, in the order in which they are tried")
	if len(e.Ways) == 0 {
		p.say(2, bad, "none")
	}
	for i, w := range e.Ways {
		showWay(p, i+1, w)
	}
	for _, n := range e.Notes {
		p.say(2, bad, "%s", plainText(n))
	}
	p.line(0, "")
	m := arrow
	if e.Availability != substitute.Available {
		m = bad
	}
	p.say(0, m, "%s.", capitalised(plainText(e.Reason)))
	e.mend(p)
}

func (e *explanation) showServer(p *page, s substitute.ServerReport) {
	if s.Narinfo == nil {
		showNoNarinfo(p, s)
		return
	}
	what := "has a narinfo"
	if s.Vouches {
		what = "has a narinfo, which the others are compared with"
	}
	p.say(5, good, "%s (%s)", what, shownTime(s.Latency))
	e.showSignature(p, s)
	if e.NarHash != "" && !s.Vouches {
		if len(s.Differs) > 0 {
			p.say(5, bad, "not used: it differs from the authorised narinfo in %s", strings.Join(s.Differs, ", "))
			return
		}
		p.say(5, good, "used: it says the same as the authorised narinfo")
	}
	for _, n := range s.Nars {
		m, why := note, ""
		if n.Unused != "" {
			m, why = bad, "not used ("+n.Unused+"): "
		}
		size := shownSize(n.Size)
		if n.Size < 0 {
			size = "made while it is sent"
		}
		p.say(5, m, "%snar, compression %s, %s: %s", why, n.Compression, size, n.URL)
	}
	for _, c := range s.Capabilities {
		signed := "not signed"
		if c.Signed {
			signed = "signed"
		}
		if c.Unused != "" {
			p.say(5, bad, "%s; not used: %s", shownCapability(c.URN), c.Unused)
		} else {
			p.say(5, note, "%s, %s, blocks of %d KiB", shownCapability(c.URN), signed, c.BlockSize>>10)
		}
	}
}

// showNoNarinfo says what a server answers instead of a narinfo.
func showNoNarinfo(p *page, s substitute.ServerReport) {
	took := shownTime(s.Latency)
	switch {
	case s.Failure != "":
		p.say(5, bad, "%s", plainText(strings.TrimPrefix(s.Failure, s.URL+": ")))
	case s.Baking:
		p.say(5, note, "does not have it yet, and has begun to make it (%s)", took)
	case s.Status == 404 || s.Status == 410 || s.Status == 0:
		p.say(5, note, "does not have it (%s)", took)
	case s.Status == 200:
		p.say(5, bad, "answers with something else than a narinfo of the item (%s)", took)
	default:
		p.say(5, bad, "answers with status %d (%s)", s.Status, took)
	}
}

// showSignature says what the signature of a narinfo is worth.
func (e *explanation) showSignature(p *page, s substitute.ServerReport) {
	signer := fmt.Sprintf("%s, key %s", s.Signer, fingerprint(s.Key))
	switch {
	case s.Authorised && s.Refused == "":
		p.say(5, good, "signed by %s, which %s authorises", signer, e.keys)
	case s.Authorised:
		p.say(5, bad, "its signature does not count (%s), but the settings want none", s.Refused)
	case s.UnknownKey:
		p.say(5, bad, "signed by %s, which %s does not authorise", signer, e.keys)
	case s.Key == "":
		p.say(5, note, "not signed")
	default:
		p.say(5, bad, "signed by %s: %s", signer, s.Refused)
	}
}

func (e *explanation) showStore(p *page, s storeReport) {
	if s.Failure != "" {
		p.say(5, bad, "%s", s.Failure)
		return
	}
	near := ""
	if s.Near {
		near = "; it is asked first, and keeps what others have"
	}
	p.say(5, good, "answers (%s)%s", shownTime(s.Latency), near)
	if s.Resting {
		p.say(5, bad, "it has failed lately, and is left alone for a while")
	}
	rate := ""
	if s.Rate > 0 {
		rate = fmt.Sprintf(", at %.1f MB/s", s.Rate/1e6)
	}
	switch {
	case e.Sampled == 0:
	case s.Has == e.Sampled && e.Sampled == e.Blocks:
		p.say(5, good, "has all of the %s of it%s", count(e.Blocks, "block"), rate)
	case s.Has == e.Sampled:
		p.say(5, good, "has all of %d sampled blocks, of %d of it%s", e.Sampled, e.Blocks, rate)
	case s.Near:
		p.say(5, note, "has %d of the %s that were looked for, of %d of it%s", s.Has, count(e.Sampled, "block"), e.Blocks, rate)
	default:
		p.say(5, bad, "has %d of the %s that were looked for, of %d of it%s", s.Has, count(e.Sampled, "block"), e.Blocks, rate)
	}
}

func showWay(p *page, i int, w substitute.WayReport) {
	name := w.Name
	if w.Kind == "blocks" {
		name = shownCapability(name)
	}
	p.line(2, "%d. %s %s", i, w.Kind, name)
	took := "about " + shownTime(w.Time)
	if w.Time >= 24*time.Hour {
		took = "nobody knows how long"
	}
	p.say(5, note, "%s for %s: %s", took, shownSize(w.Bytes), w.How)
}

// mend says what to do if an item cannot be had.
func (e *explanation) mend(p *page) {
	switch e.Availability {
	case substitute.NotAuthorised:
		for _, s := range e.Servers {
			if s.UnknownKey {
				p.line(2, "If you trust %s, authorise its key:", s.Signer)
				p.command(4, "guix-substitute-eris narinfo --key "+e.Path+" | sudo guix archive --authorize")
				return
			}
		}
		p.line(2, "Name a server that signs its narinfos by --substitute-urls.")
	case substitute.NotAvailable:
		p.line(2, "Name a server that has it by --substitute-urls, or build it:")
		p.command(4, "guix build --no-substitutes …")
	case substitute.NotReachable:
		p.line(2, "Look at the network and at the addresses:")
		p.command(4, "guix-substitute-eris doctor")
	}
}

// shownCapability is a read capability, short enough to be compared by eye.
func shownCapability(urn string) string {
	if len(urn) < 40 {
		return urn
	}
	return urn[:25] + "…" + urn[len(urn)-4:]
}

// fingerprint is the beginning of the number that makes a public key, as files of Guix have it, so
// that it can be searched for there.
func fingerprint(key string) string {
	_, after, ok := strings.Cut(key, "#")
	number, _, closed := strings.Cut(after, "#")
	if !ok || !closed {
		return "unknown"
	}
	return "#" + number[:min(16, len(number))] + "…"
}

func shownTime(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%d ms", max(d.Milliseconds(), 1))
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

func capitalised(text string) string {
	if text == "" {
		return text
	}
	return strings.ToUpper(text[:1]) + text[1:]
}
