// SPDX-License-Identifier: GPL-3.0-or-later

package inspect

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/session"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

const (
	// sampledBlocks is how many blocks of an item each store is asked for.
	sampledBlocks = 32
	// maxBlocksAtOnce is how many of them at a time.
	maxBlocksAtOnce = 32
	// probeTimeout is how long a server or a store may take for an answer, and sampleTimeout for
	// the blocks.
	probeTimeout  = 5 * time.Second
	sampleTimeout = 20 * time.Second
)

// Explain is the command that says from where items would come.
func Explain() *cobra.Command {
	var s session.Settings
	c := &cobra.Command{
		Use:   "ITEM...",
		Short: "say from where items would come, and why",
		Long: `Say from where store items would come and why: what each substitute server says
of them and whether it counts, what each block store has, which ways there are,
what they should cost, and which one is taken. Nothing is restored.

An ITEM is a store path, a hash part, or a link into the store, of a profile for
example. What servers say is requested anew, and kept for later.`,
	}
	asJSON := c.Flags().Bool("json", false, "print what is known as JSON")
	full := c.Flags().Bool("full", false, "ask each store for all blocks of the items, and not only for some")
	s.Flags(c.Flags())
	c.RunE = func(_ *cobra.Command, items []string) error {
		if len(items) == 0 {
			return message.Usage("explain takes store items: guix-substitute-eris explain /gnu/store/…")
		}
		return explain(c.Context(), &s, items, *asJSON, *full)
	}
	return c
}

func explain(ctx context.Context, s *session.Settings, items []string, asJSON, full bool) error {
	guessed, err := Load(s)
	if err != nil {
		return err
	}
	s.LookAround()
	sub := s.SilentSession(false)
	defer sub.Close()
	ctx, stop := context.WithCancel(ctx)
	stores := askStores(ctx, sub)
	defer func() { stop(); stores() }()
	all := []explanation{}
	worst := forItems(ctx, s, sub, items, func(e explanation) message.Status {
		e.Stores, e.guessed = stores(), guessed
		e.examineStores(ctx, sub, full)
		all = append(all, e)
		return session.ExitStatus(e.Availability)
	})
	if asJSON {
		return cmp.Or(page.JSON(all), worst.Err())
	}
	p := page.New()
	for i, e := range all {
		if i > 0 {
			p.Line(0, "")
		}
		e.show(p)
	}
	return cmp.Or(p.Print(), worst.Err())
}

type explanation struct {
	substitute.Explanation
	InStore bool `json:"inStore"`
	// Sampled is how many blocks of the item each store was asked for, of Blocks that are known of;
	// Missing are those that none of them has given.
	Sampled int           `json:"sampled"`
	Blocks  int           `json:"blocks"`
	Missing int           `json:"missing"`
	Form    string        `json:"form,omitempty"` // of the contents, like "eris-fs"; empty if there is no block
	Stores  []storeReport `json:"stores"`
	keys    string        // file that lists them
	guessed bool          // the servers are
	policy  substitute.Policy
}

type storeReport struct {
	URL     string        `json:"url"`
	Near    bool          `json:"near"`              // it is asked before others, and keeps what they have
	Latency time.Duration `json:"latencyNs"`         // of an answer
	Failure string        `json:"failure,omitempty"` // why it cannot be used
	Has     int           `json:"has"`               // of the sampled blocks
	Rate    float64       `json:"rate,omitempty"`    // bytes per second; 0 if it is not known
	Resting bool          `json:"resting"`           // it has failed lately, and is left alone for now
	Found   bool          `json:"found"`             // on the local network
}

// forItems calls show with what is known of items but for the stores, once for each, and reports of
// which nothing can be known. It returns the highest of the exit statuses.
func forItems(
	ctx context.Context, s *session.Settings, sub *session.Session, items []string, show func(explanation) message.Status,
) (worst message.Status) {
	shown := map[string]bool{}
	for _, text := range session.Names(items) {
		e := explanation{keys: s.KeysFile(), policy: s.Policy}
		item, err := s.FindItem(ctx, sub, text)
		if err == nil && shown[item] {
			continue
		} else if err == nil {
			shown[item] = true
			e.Explanation, err = sub.Explain(ctx, item)
		}
		if err != nil {
			worst = max(worst, message.Status(message.Report(err)))
		} else {
			_, err = os.Lstat(item)
			e.InStore = err == nil
			worst = max(worst, show(e))
		}
		if ctx.Err() != nil {
			break
		}
	}
	return worst
}

// examineStores asks the stores that answer for blocks.
func (e *explanation) examineStores(ctx context.Context, sub *session.Session, full bool) {
	members, _ := sub.Stores()
	if len(members) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, sampleTimeout)
	defer cancel()
	var blocks []image.Block
	if c, ok := e.capability(); ok {
		var form image.Form
		all := together(members)
		defer all.Close()
		blocks, form = image.Blocks(ctx, all, c, erisfs.Limits{NarSize: max(e.NarSize, 1<<20)})
		e.Form = string(form)
	}
	e.Blocks = len(blocks)
	if !full && len(blocks) > sampledBlocks {
		for i := range sampledBlocks { // from everywhere among them
			blocks[i] = blocks[i*len(blocks)/sampledBlocks]
		}
		blocks = blocks[:sampledBlocks]
	}
	e.Sampled = len(blocks)
	given := make([]atomic.Bool, len(blocks))
	var wait sync.WaitGroup
	for i, m := range members {
		if r := &e.Stores[i]; r.Failure == "" {
			wait.Go(func() { r.sample(ctx, m.Source, blocks, given) })
		}
	}
	wait.Wait()
	for i := range given {
		if !given[i].Load() {
			e.Missing++
		}
	}
	e.concludeMissing()
}

// askStores begins to ask all stores whether they are there, and returns what waits for their
// answers.
func askStores(ctx context.Context, sub *session.Session) (reports func() []storeReport) {
	members, stats := sub.Stores()
	asked := make([]storeReport, len(members))
	var wait sync.WaitGroup
	for i, m := range members {
		wait.Go(func() {
			r := storeReport{URL: m.Source.String(), Near: m.Near, Rate: stats[i].Rate, Resting: stats[i].Resting}
			latency, err := probe(ctx, m.Source)
			if r.Latency, r.Found = latency, sub.Found(r.URL); err != nil {
				r.Failure = message.OfStore(r.URL, err)
			}
			asked[i] = r
		})
	}
	return func() []storeReport {
		wait.Wait()
		return slices.Clone(asked)
	}
}

// concludeMissing says what becomes of an item that is to come from blocks of which some are
// missing.
func (e *explanation) concludeMissing() {
	if e.Missing == 0 || len(e.Ways) == 0 || e.Ways[0].Kind != "blocks" {
		return
	}
	why := fmt.Sprintf("no store that answers has %d of the %s that were looked for", e.Missing, page.Count(e.Sampled, "block"))
	if e.Form == "" {
		why = "no store that answers has its first block"
	}
	if other := slices.IndexFunc(e.Ways, func(w substitute.WayReport) bool { return w.Kind != "blocks" }); other >= 0 {
		e.Reason = fmt.Sprintf("blocks are tried first, and then it comes by way %d: %s", other+1, why)
	} else {
		e.Availability, e.Reason = substitute.NotAvailable, why
	}
}

// together returns some stores as one, of which none keeps what others have: what is looked at must
// not change. They stay open when that is closed.
func together(members []pool.Member) *pool.Pool {
	var all []pool.Member
	for _, m := range members {
		all = append(all, pool.Member{Source: borrowed{m.Source}, Local: m.Near || m.Local})
	}
	return pool.New(all, pool.Options{})
}

// borrowed is a source that somebody else closes.
type borrowed struct{ fetch.Source }

// Close implements [fetch.Source].
func (borrowed) Close() error { return nil }

// capability returns the read capability that would be used, or one that is offered at all.
func (e *explanation) capability() (eris.ReadCapability, bool) {
	for _, w := range e.Ways {
		if c, err := eris.ParseURN(w.Name); err == nil {
			return c, true
		}
	}
	for _, s := range e.Servers {
		for _, offered := range s.Capabilities {
			if c, err := eris.ParseURN(offered.URN); err == nil {
				return c, true
			}
		}
	}
	return eris.ReadCapability{}, false
}

// sample asks a store for blocks, and notes which it has given.
func (r *storeReport) sample(ctx context.Context, source fetch.Source, blocks []image.Block, given []atomic.Bool) {
	begin := time.Now()
	var has, bytes atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(maxBlocksAtOnce)
	for i, b := range blocks {
		group.Go(func() error {
			block, err := fetch.Get(ctx, source, b.Reference, b.Size, nil)
			if err == nil {
				given[i].Store(true)
				has.Add(1)
				bytes.Add(int64(len(block)))
			} else if !errors.Is(err, eris.ErrNotFound) {
				return err
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		r.Failure = message.OfStore(r.URL, err)
	}
	r.Has = int(has.Load())
	if r.Rate == 0 && bytes.Load() >= substitute.LeastMeasured {
		r.Rate = float64(bytes.Load()) / time.Since(begin).Seconds()
	}
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

func (e *explanation) show(p *page.Page) {
	p.Line(0, "%s", e.Path)
	facts := []string{"not in the store"}
	if e.InStore {
		facts[0] = "in the store already"
	}
	if e.NarHash != "" {
		facts = append(facts, page.Size(int64(e.NarSize))+" unpacked", page.Count(e.References, "reference"))
	}
	p.Line(2, "%s", strings.Join(facts, ", "))
	if e.NarHash != "" {
		p.Line(2, "%s", e.NarHash)
	}
	p.Heading("Substitute servers")
	if len(e.Servers) == 0 {
		p.Say(2, page.Bad, "none is known; name some by --substitute-urls")
	}
	for i, s := range e.Servers {
		p.Item(2, i+1, "%s", s.URL)
		e.showServer(p, s)
	}
	if e.guessed {
		p.Say(2, page.Note, "guix-daemon does not run, so that its servers are not known; the usual ones are asked")
	}
	p.Heading("Block stores")
	if len(e.Stores) == 0 {
		p.Say(2, page.Note, "none is used; name some by --eris-store-url, by %s or in %s", settings.StoreVariable, settings.FileName())
	}
	for i, s := range e.Stores {
		p.Item(2, i+1, "%s", s.URL)
		e.showStore(p, s)
	}
	switch {
	case e.Form != "":
		p.Say(2, page.Note, "the blocks hold the item in the form %s", e.Form)
	case e.Blocks > 0:
		p.Say(2, page.Bad, "its first block is in none of them, or in none that answers")
	}
	p.Heading("Ways to it, in the order in which they are tried")
	if len(e.Ways) == 0 {
		p.Say(2, page.Bad, "none")
	}
	for i, w := range e.Ways {
		showWay(p, i+1, w)
	}
	for _, n := range e.Notes {
		p.Say(2, page.Bad, "%s", message.Text(n))
	}
	p.Line(0, "")
	m := page.Arrow
	if e.Availability != substitute.Available {
		m = page.Bad
	}
	reason := message.Text(e.Reason)
	p.Say(0, m, "%s.", strings.ToUpper(reason[:1])+reason[1:])
	e.mend(p)
}

func (e *explanation) showServer(p *page.Page, s substitute.ServerReport) {
	if s.Narinfo == nil {
		mark, why := noNarinfo(s)
		p.Say(5, mark, "%s", why)
		return
	}
	what := "has a narinfo"
	if s.Vouches {
		what = "has a narinfo, which the others are compared with"
	}
	p.Say(5, page.Good, "%s (%s)", what, page.Duration(s.Latency))
	mark, signature := worth(s, e.keys)
	p.Say(5, mark, "%s", signature)
	if e.NarHash != "" && !s.Vouches {
		if len(s.Differs) > 0 {
			p.Say(5, page.Bad, "not used: it differs from the authorised narinfo in %s", strings.Join(s.Differs, ", "))
			return
		}
		p.Say(5, page.Good, "used: it says the same as the authorised narinfo")
	}
	for _, n := range s.Nars {
		m, why := page.Note, ""
		if n.Unused != "" {
			m, why = page.Bad, "not used ("+n.Unused+"): "
		}
		size := page.Size(n.Size)
		if n.Size < 0 {
			size = "made while it is sent"
		}
		p.Say(5, m, "%snar, compression %s, %s: %s", why, n.Compression, size, n.URL)
	}
	for _, c := range s.Capabilities {
		signed := "not signed"
		if c.Signed {
			signed = "signed"
		}
		if c.Unused != "" {
			p.Say(5, page.Bad, "%s; not used: %s", shownCapability(c.URN), c.Unused)
		} else {
			p.Say(5, page.Note, "%s, %s, blocks of %d KiB", shownCapability(c.URN), signed, c.BlockSize>>10)
		}
	}
	for _, d := range s.Narinfo.Deltas {
		where := ""
		if _, err := os.Lstat(filepath.Join(filepath.Dir(e.Path), d.Base)); err != nil {
			where = ", which is not in the store"
		}
		p.Say(5, page.Note, "delta, %s, from %s%s", page.Size(int64(min(d.Size, 1<<62))), d.Base, where)
	}
}

func noNarinfo(s substitute.ServerReport) (page.Mark, string) {
	took := "(" + page.Duration(s.Latency) + ")"
	switch {
	case s.Failure != "":
		return page.Bad, message.Text(unnamed(s.URL, s.Failure))
	case missing(s.URL):
		return page.Bad, "nothing is there; is the medium plugged in?"
	case s.Baking:
		return page.Note, "does not have it yet, and has begun to make it " + took
	case s.Status == 404 || s.Status == 410 || s.Status == 0:
		return page.Note, "does not have it " + took
	case s.Status == 200:
		return page.Bad, "answers with something else than a narinfo of the item " + took
	}
	return page.Bad, fmt.Sprintf("answers with status %d %s", s.Status, took)
}

// unnamed returns why a server gives nothing without its name, for where its URL has been shown,
// with its path.
func unnamed(url, why string) string {
	if server, after, ok := strings.Cut(why, ": "); ok && strings.HasPrefix(url, server) {
		return after
	}
	return why
}

// missing reports whether a server is a directory that is not there, or has nothing.
func missing(url string) bool {
	directories := mirror.LocalDirectories(url)
	return len(directories) > 0 && !slices.ContainsFunc(directories, func(directory string) bool {
		entries, err := os.ReadDir(directory)
		return len(entries) > 0 || err != nil && !errors.Is(err, fs.ErrNotExist)
	})
}

func (e *explanation) showStore(p *page.Page, s storeReport) {
	if s.Found {
		p.Say(5, page.Note, "found on the local network")
	}
	if s.Failure != "" {
		p.Say(5, page.Bad, "%s", s.Failure)
		if settings.IsSocket(s.URL) && os.Geteuid() != 0 && strings.HasSuffix(s.Failure, syscall.EACCES.Error()) {
			p.Say(5, page.Note, "to you, that is; sudo shows what the daemon may")
		}
		return
	}
	near := ""
	if s.Near {
		near = "; it is asked first, and keeps what others have"
	}
	p.Say(5, page.Good, "answers (%s)%s", page.Duration(s.Latency), near)
	if s.Resting {
		p.Say(5, page.Bad, "it has failed lately, and is left alone for a while")
	}
	rate := ""
	if s.Rate > 0 {
		rate = fmt.Sprintf(", at %.1f MB/s", s.Rate/1e6)
	}
	switch {
	case e.Sampled == 0:
	case e.Form == "":
		p.Say(5, page.Note, "does not have its first block")
	case s.Has == e.Sampled && e.Sampled == e.Blocks:
		p.Say(5, page.Good, "has all of the %s of it%s", page.Count(e.Blocks, "block"), rate)
	case s.Has == e.Sampled:
		p.Say(5, page.Good, "has all of %d sampled blocks, of %d of it%s", e.Sampled, e.Blocks, rate)
	default:
		m := page.Bad
		if s.Near {
			m = page.Note
		}
		p.Say(5, m, "has %d of the %s that were looked for, of %d of it%s", s.Has, page.Count(e.Sampled, "block"), e.Blocks, rate)
	}
}

func showWay(p *page.Page, i int, w substitute.WayReport) {
	name := w.Name
	if w.Kind == "blocks" {
		name = shownCapability(name)
	}
	p.Item(2, i, "%s %s", w.Kind, name)
	took := "about " + page.Duration(w.Time)
	if w.Time >= 24*time.Hour {
		took = "nobody knows how long"
	}
	p.Say(5, page.Note, "%s for %s: %s", took, page.Size(w.Bytes), w.How)
}

func (e *explanation) mend(p *page.Page) {
	switch e.Availability {
	case substitute.NotAuthorised:
		for _, s := range e.Servers {
			if s.UnknownKey {
				p.Line(2, "If you trust %s, authorise its key:", s.Signer)
				p.Command(4, "guix-substitute-eris narinfo --key --substitute-urls="+page.Quote(s.URL)+" "+page.Quote(e.Path)+" | sudo guix archive --authorize")
				return
			}
		}
		p.Line(2, "Name a server that signs its narinfos by --substitute-urls.")
	case substitute.NotAvailable:
		if e.Missing > 0 || e.NarHash != "" && e.policy == substitute.ERISOnly {
			p.Line(2, "Name a store that has the blocks by --eris-store-url, or allow nars by --policy.")
			return
		}
		p.Line(2, "Name a server that has it by --substitute-urls, or build it:")
		p.Command(4, "guix build --no-substitutes …")
	case substitute.NotReachable:
		p.Line(2, "Look at the network and at the addresses:")
		p.Command(4, "guix-substitute-eris doctor")
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
