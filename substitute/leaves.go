// SPDX-License-Identifier: GPL-3.0-or-later

package substitute

import (
	"context"
	"errors"
	"math"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/throughput"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/reuse"
)

const (
	// leavesRate is how fast an item is made of an old one and some blocks, in bytes per second. It
	// is read twice and encoded.
	leavesRate = 250e6
	// leavesShare is the part of an item that is expected to differ where rewriting has failed,
	// beside leastMissing bytes for the index, inner nodes and whole leaves.
	leavesShare  = 64
	leastMissing = 128 << 10
)

// A leavesWay is a read capability of ERIS-FS of whose blocks most stand in an older item. It is
// behind the ways that rewrite this, which fetch nothing, but may fail for a few bytes.
type leavesWay struct {
	*blocksWay
	old *reuse.Candidate
}

// listLeaves adds the first old item with which the capability has not failed. Each capability has
// such a way: whoever lists one may lie, or have made another build.
func (j *job) listLeaves(w *blocksWay, r record) {
	for _, old := range j.bases {
		l := &leavesWay{w, old}
		if w.form == "" && j.vain["leaves"] < mostFailed && !j.s.Reuse.InVain(l.String(), j.want) {
			j.ways = append(j.ways, &candidate{way: l, kind: "leaves", pace: paceHere(uint64(w.size), leavesRate), from: r})
			return
		}
	}
}

var (
	// errDiffers is why it is given up: a nar has fewer bytes.
	errDiffers = errors.New("too much differs from the older item")
	errNoTree  = errors.New("not ERIS-FS, so that nothing can be found in the older item")
)

func (w *leavesWay) String() string { return w.blocksWay.String() + " with " + w.old.String() }

func (w *leavesWay) expect(context.Context) expectation {
	e := w.j.expectMissing(w.capability, w.size, w.missing())
	e.time += throughput.Seconds(float64(w.size) / leavesRate)
	e.how += ", the rest in an older item"
	return e
}

// missing is how many bytes should have to be fetched.
func (w *leavesWay) missing() int64 { return min(w.size, leastMissing+w.size/leavesShare) }

// most is how many bytes may be fetched before the next way is taken, unless that is blocks too.
func (w *leavesWay) most(next *candidate) int64 {
	if next == nil || isBlocks(next) {
		return math.MaxInt64
	}
	return max(leastMissing, next.bytes/2)
}

func (w *leavesWay) nodes(ctx context.Context, a *attempt) (nar.Nodes, func(), error) {
	contents, err := w.j.openImage(ctx, a, w.capability, w.missing(), w.most(a.next))
	if err != nil {
		return nil, nil, err
	}
	if contents.Form != image.ERISFS {
		contents.Close()
		return nil, nil, errNoTree
	}
	base, err := w.old.Base(ctx)
	if err != nil {
		contents.Close()
		return nil, nil, err
	}
	contents.Base = countedBase{base, a}
	return contents.Nodes(ctx)
}

func (w *leavesWay) failed(_ context.Context, err error) { w.j.failedOlder("leaves", w.String(), err) }

// countedBase counts the bytes of files that are read, as countedNodes does.
type countedBase struct {
	*reuse.Base
	a *attempt
}

func (b countedBase) File(path string, plain bool) (nar.Node, nar.Feeder, func() bool, error) {
	node, contents, done, err := b.Base.File(path, plain)
	b.a.countRead(node.Size)
	return node, contents, done, err
}
