// SPDX-License-Identifier: GPL-3.0-or-later

package substitute

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"path"
	"strings"
	"sync/atomic"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/throughput"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

const (
	// blocksRate is how fast blocks become a tree, in bytes per second on one core.
	blocksRate = 400e6
	// presentTime is how long it may take to find out which blocks are there.
	presentTime = 200 * time.Millisecond
	// paceAfter is for how long blocks may come at any pace.
	paceAfter = 2 * time.Second
)

// A blocksWay is a read capability.
type blocksWay struct {
	j          *job
	capability eris.ReadCapability
	form       string // of what it denotes, see [narinfo.ERIS]
	size       int64  // of that, in bytes
}

// listBlocks adds the read capabilities that narinfos offer, signed ones first. All these narinfos
// are equivalent to one that is authorised; what they denote is hashed, so that a capability that
// nobody has signed can do no more harm than a nar from anywhere.
func (j *job) listBlocks(records []record) {
	for _, signed := range []bool{true, false} {
		for _, r := range records {
			for _, e := range r.narinfo.ERIS {
				c, err := j.s.capability(e.URN, e.Signed && r.authorised)
				if (e.Signed && r.authorised) != signed || err != nil || j.listed[c.URN()] {
					continue // a draft of the encoding, perhaps
				}
				j.listed[c.URN()] = true
				w := &blocksWay{j, c, e.Form, int64(min(cmp.Or(e.Size, j.want.NarSize), 1<<62))}
				j.listLeaves(w, r)
				j.ways = append(j.ways, &candidate{way: w, kind: "blocks", pace: pace{paceAfter, 0, preferFactor, 0}, from: r})
			}
		}
	}
}

// capability returns the read capability that a narinfo offers, with an error if it cannot be used.
func (s *Substituter) capability(urn string, signed bool) (eris.ReadCapability, error) {
	c, err := eris.ParseURN(urn)
	switch {
	case err != nil:
	case s.Blocks == nil || s.Policy == HTTPOnly:
		err = errNoBlocks
	case !signed && !s.UnsignedCapabilities:
		err = errors.New("it is not signed, and the settings want that")
	}
	return c, err
}

var errNoBlocks = errors.New("no block store is used")

func (w *blocksWay) String() string { return w.capability.URN() }

func (j *job) limits() erisfs.Limits { return erisfs.Limits{NarSize: j.options().MaxBytes} }

func (w *blocksWay) expect(ctx context.Context) expectation {
	e := w.j.expectBlocks(ctx, w.capability, w.size)
	size := float64(min(w.j.want.NarSize, 1<<62))
	e.time += throughput.Seconds(size / blocksRate)
	if method, compressed := strings.CutPrefix(w.form, "nar."); compressed {
		e.how += ", compression " + method
		if rate := decompressRates[method]; rate > 0 {
			e.time += throughput.Seconds(size / rate)
		}
	}
	return e
}

// expectBlocks returns what it should cost to get contents of size bytes.
func (j *job) expectBlocks(ctx context.Context, c eris.ReadCapability, size int64) expectation {
	missing, s := size, j.s
	if s.Nearby != nil && s.Policy == Fastest {
		within, cancel := context.WithTimeout(ctx, presentTime)
		missing = max(0, size-image.Present(within, s.Nearby, c, j.limits()))
		cancel()
	}
	return j.expectMissing(c, size, missing)
}

// expectMissing returns what it should cost to get that of contents of size bytes which is missing.
func (j *job) expectMissing(c eris.ReadCapability, size, missing int64) expectation {
	s, speed := j.s, Speed{}
	if s.StoreSpeed != nil {
		speed = s.StoreSpeed()
	}
	speed = speed.OrUnknown()
	e := expectation{bytes: missing, known: speed.Known || missing == 0}
	if missing > 0 && speed.None {
		e.time, e.known = throughput.Longest, true
		if s.Probe != nil {
			s.Probe(eris.Pair{Reference: c.Root, Key: c.Key}, c.BlockSize)
		}
	} else if missing > 0 {
		// One round trip after the other: the index, level by level, and a first block.
		depth := time.Duration(c.Level + 2)
		e.time += depth*speed.Latency + throughput.Seconds(float64(missing)/speed.Rate)
	}
	e.how = fmt.Sprintf("%s of %s to fetch, %s", page.Size(missing), page.Size(size), speed)
	return e
}

func (w *blocksWay) nodes(ctx context.Context, a *attempt) (nar.Nodes, func(), error) {
	contents, err := w.j.openImage(ctx, a, w.capability, w.size, math.MaxInt64)
	if err != nil {
		return nil, nil, err
	}
	return contents.Nodes(ctx)
}

// openImage opens the contents of a read capability, of size bytes or some more. The attempt ends
// when more than most bytes have been fetched.
func (j *job) openImage(ctx context.Context, a *attempt, c eris.ReadCapability, size, most int64) (*image.Image, error) {
	j.progress.From(shownURN(c, j.path), size)
	var shown atomic.Int64
	blocks := fetch.Within(j.s.Blocks, c.Root, func(n int) {
		after := shown.Add(int64(n))
		a.countShown(n, int(min(after, size)-min(after-int64(n), size)))
		if after > most {
			a.cancel(errDiffers)
		}
	})
	var window fetch.Window
	if j.s.Window != nil {
		window = j.s.Window()
	}
	window.Waited = j.waited
	return image.Open(ctx, blocks, c, j.limits(), window)
}

// shownURN is what people are told that the item comes from: the URN, and the name of the item in
// the fragment, because the client of Guix shows what is behind the last slash beside its progress
// bar (Guix, guix/status.scm: print-build-event). A fragment is not a part of the name (RFC 8141,
// section 2.3.3).
func shownURN(c eris.ReadCapability, item string) string {
	_, name, _ := strings.Cut(path.Base(item), "-")
	return c.URN() + "#/" + name
}
