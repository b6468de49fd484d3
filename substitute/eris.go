// SPDX-License-Identifier: GPL-3.0-or-later

package substitute

import (
	"context"
	"fmt"
	"path"
	"strings"
	"sync/atomic"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
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
}

// listBlocks adds the read capabilities that narinfos offer, signed ones first. All these narinfos
// are equivalent to one that is authorised; what they denote is hashed, so that a capability that
// nobody has signed can do no more harm than a nar from anywhere.
func (j *job) listBlocks(records []record) {
	if j.s.Blocks == nil || j.s.Policy == HTTPOnly {
		return
	}
	for _, signed := range []bool{true, false} {
		if !signed && !j.s.UnsignedCapabilities {
			continue
		}
		for _, r := range records {
			for _, e := range r.narinfo.ERIS {
				c, err := eris.ParseURN(e.URN)
				if (e.Signed && r.authorised) != signed || err != nil || j.listed[c.URN()] {
					continue // a draft of the encoding, perhaps
				}
				j.listed[c.URN()] = true
				j.ways = append(j.ways, &candidate{way: &blocksWay{j, c}, from: r})
			}
		}
	}
}

func (w *blocksWay) String() string { return w.capability.URN() }

func (w *blocksWay) pace() pace { return pace{paceAfter, 0, preferFactor} }

func (w *blocksWay) limits() erisfs.Limits { return erisfs.Limits{NarSize: w.j.options().MaxBytes} }

func (w *blocksWay) expect(ctx context.Context) expectation {
	s := w.j.s
	size := int64(min(w.j.want.NarSize, 1<<62))
	missing := size
	if s.Nearby != nil && s.Policy == Fastest {
		within, cancel := context.WithTimeout(ctx, presentTime)
		missing = max(0, size-image.Present(within, s.Nearby, w.capability, w.limits(), s.NearbyStride))
		cancel()
	}
	speed := Speed{}
	if s.StoreSpeed != nil {
		speed = s.StoreSpeed()
	}
	speed = speed.orUnknown()
	e := expectation{bytes: missing, time: seconds(float64(size) / blocksRate), known: speed.Known || missing == 0}
	if missing > 0 && speed.None {
		e.time, e.known = longest, true
		if s.Probe != nil {
			s.Probe(eris.Pair{Reference: w.capability.Root, Key: w.capability.Key}, w.capability.BlockSize)
		}
	} else if missing > 0 {
		// One round trip after the other: the index, level by level, and a first block.
		depth := time.Duration(w.capability.Level + 2)
		e.time += depth*speed.Latency + seconds(float64(missing)/speed.Rate)
	}
	e.how = fmt.Sprintf("%s of %s missing, %s", megabytes(missing), megabytes(size), speed)
	return e
}

func (w *blocksWay) nodes(ctx context.Context, a *attempt) (nar.Nodes, func(ok bool), error) {
	s := w.j.s
	whole := int64(min(w.j.want.NarSize, 1<<62)) // blocks are some bytes more
	a.from(shownURN(w.capability, w.j.path), whole)
	var shown atomic.Int64
	blocks := fetch.Counted(s.Blocks, func(n int) {
		after := shown.Add(int64(n))
		a.countShown(n, int(min(after, whole)-min(after-int64(n), whole)))
	})
	var window fetch.Window
	if s.Window != nil {
		window = s.Window()
	}
	if !w.j.waited() {
		window.Requests, window.Bytes = window.Requests/aheadShare, window.Bytes/aheadShare
	}
	contents, err := image.Open(ctx, blocks, w.capability, w.limits(), window)
	if err != nil {
		return nil, nil, err
	}
	nodes, closeNodes, err := contents.Nodes(ctx)
	if err != nil {
		return nil, nil, err
	}
	return nodes, func(bool) { closeNodes() }, nil
}

// shownURN is what people are told that the item comes from: the URN, and the name of the item in
// the fragment, because the client of Guix shows what is behind the last slash beside its progress
// bar (Guix, guix/status.scm: print-build-event). A fragment is not a part of the name (RFC 8141,
// section 2.3.3).
func shownURN(c eris.ReadCapability, item string) string {
	name := path.Base(item)
	if _, after, ok := strings.Cut(name, "-"); ok {
		name = after
	}
	return c.URN() + "#/" + name
}
