// SPDX-License-Identifier: GPL-3.0-or-later

package substitute

import (
	"context"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/delta"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/throughput"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/reuse"
)

const (
	// deltaRate is how fast an item is made of a base and a delta, in bytes per second.
	deltaRate = 250e6
	// mostFailed is after how many deltas of an item, or ways by leaves, that have failed no others
	// are tried: whoever sends narinfos may list many, each of which costs time.
	mostFailed = 2
)

// A deltaWay is a delta, of which the base is in the store. What narinfos say of deltas is not
// signed, and the base may be broken: that it fails says nothing about the narinfo.
type deltaWay struct {
	j          *job
	base       string // file name
	size       int64  // of the delta, in bytes
	url        string // empty for a read capability
	capability eris.ReadCapability
}

// listDeltas adds the deltas that narinfos offer. No server learns which bases there are.
func (j *job) listDeltas(records []record) {
	if j.vain["delta"] >= mostFailed {
		return
	}
	for _, r := range records {
		for _, d := range r.narinfo.Deltas {
			w := &deltaWay{j: j, base: j.s.StoreDir + "/" + d.Base, size: int64(d.Size)}
			if _, err := os.Lstat(w.base); err != nil || w.base == j.path || !w.locate(r, d) || j.listed[w.key()] {
				continue
			}
			j.listed[w.key()] = true
			if j.s.Reuse != nil && j.s.Reuse.InVain(w.key(), j.want) {
				continue
			}
			j.ways = append(j.ways, &candidate{way: w, kind: "delta", pace: paceHere(j.want.NarSize, deltaRate), from: r})
		}
	}
}

// locate finds out where the delta is. It reports whether that may be used.
func (w *deltaWay) locate(r record, d narinfo.Delta) bool {
	s := w.j.s
	if strings.HasPrefix(d.URL, "urn:") {
		c, err := s.capability(d.URL, d.Signed && r.authorised)
		w.capability = c
		return err == nil
	}
	url, err := narURL(r, d.URL)
	w.url = url
	return err == nil && s.Policy != ERISOnly
}

// key tells deltas apart: one may be offered for several bases, if only by mistake.
func (w *deltaWay) key() string { return w.String() + " " + w.base }

// blocks reports whether the delta comes in blocks.
func (w *deltaWay) blocks() bool { return w.url == "" }

func (w *deltaWay) String() string {
	if w.blocks() {
		return w.capability.URN()
	}
	return mirror.WithoutUser(w.url)
}

func (w *deltaWay) expect(ctx context.Context) expectation {
	var e expectation
	if w.blocks() {
		e = w.j.expectBlocks(ctx, w.capability, w.size)
	} else {
		speed := w.j.s.serverSpeed(w.url)
		e = expectation{
			bytes: w.size, known: speed.Known, time: 2*speed.Latency + throughput.Seconds(float64(w.size)/speed.Rate),
			how: page.Size(w.size) + ", " + speed.String(),
		}
	}
	e.time += throughput.Seconds(float64(min(w.j.want.NarSize, 1<<62)) / deltaRate)
	e.how = "a delta from " + w.base + ", " + e.how
	return e
}

func (w *deltaWay) nodes(ctx context.Context, a *attempt) (nar.Nodes, func(), error) {
	body, done, err := w.open(ctx, a)
	if err != nil {
		return nil, nil, err
	}
	// What is longer than was said when it was chosen has not been the better way.
	nodes, err := delta.NewReader(ctx, io.LimitReader(body, w.size), w.base, delta.ReadOptions{MaxSize: w.j.options().MaxBytes, Link: w.valid(ctx)})
	if err != nil {
		done()
		return nil, nil, err
	}
	return &countedNodes{nodes, a}, func() {
		nodes.Close()
		done()
	}, nil
}

// open begins to read the delta.
func (w *deltaWay) open(ctx context.Context, a *attempt) (io.Reader, func(), error) {
	if w.blocks() {
		contents, err := w.j.openImage(ctx, a, w.capability, w.size, math.MaxInt64)
		if err != nil {
			return nil, nil, err
		}
		return contents.Content, contents.Close, nil
	}
	body, err := w.j.download(ctx, a, w.url, w.size)
	if err != nil {
		return nil, nil, err
	}
	return body, body.done, nil
}

// valid reports whether the daemon says that the base is complete, so that its files may be linked
// to.
func (w *deltaWay) valid(ctx context.Context) bool {
	if w.j.s.Reuse == nil {
		return false
	}
	_, err := w.j.s.Reuse.Database(ctx, filepath.Base(w.base)[:reuse.HashLength])
	return err == nil
}

func (w *deltaWay) failed(_ context.Context, err error) { w.j.failedOlder("delta", w.key(), err) }

// failedOlder notes that a way has made something else of an older item, or would have to fetch too
// much, which it would again. When enough ways of the kind have failed, it takes the others out of
// the list.
func (j *job) failedOlder(kind, key string, err error) {
	if j.s.Reuse != nil && (errors.Is(err, errContents) || errors.Is(err, errDiffers)) {
		j.s.Reuse.NoteInVain(key, j.want)
	}
	if j.vain[kind] == mostFailed {
		j.ways = slices.DeleteFunc(j.ways, func(c *candidate) bool { return c.kind == kind })
	}
}
