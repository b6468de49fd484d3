// SPDX-License-Identifier: GPL-3.0-or-later

package substitute

import (
	"context"
	"errors"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/throughput"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/reuse"
)

// rewriteRate is how fast an old item is rewritten, in bytes per second.
const rewriteRate = 500e6

// A rewrittenWay is an older item in the store, of which the new one may be made with nothing
// fetched. It is a guess: that it fails says nothing about the narinfo, and is nobody's fault.
type rewrittenWay struct {
	j   *job
	old *reuse.Candidate
}

// listRewritten adds the old items, by the references of the narinfo that is authorised. In all of
// them, even if they are hopeless, blocks may be looked for, see leavesWay.
func (j *job) listRewritten(ctx context.Context) {
	if j.s.Reuse == nil {
		return
	}
	for c := range j.s.Reuse.Find(ctx, j.want) {
		j.bases = append(j.bases, c)
		if !c.Hopeless {
			j.ways = append(j.ways, &candidate{way: &rewrittenWay{j, c}, kind: "old item", pace: pace{after: throughput.Longest, factor: 1}})
		}
	}
}

func (w *rewrittenWay) String() string { return w.old.String() }

func (w *rewrittenWay) expect(context.Context) expectation {
	return expectation{0, throughput.Seconds(float64(w.j.want.NarSize) / rewriteRate), true, "an older item, rewritten"}
}

func (w *rewrittenWay) nodes(ctx context.Context, a *attempt) (nar.Nodes, func(), error) {
	w.j.progress.From("file://"+w.old.String(), 0)
	nodes := w.old.Nodes(ctx)
	return &countedNodes{nodes, a}, nodes.Close, nil
}

// failed notes that the result has another hash.
func (w *rewrittenWay) failed(ctx context.Context, err error) {
	if !errors.Is(err, errContents) {
		return
	}
	if err := w.old.Missed(ctx); err != nil {
		w.j.log.Warnf("%v", err)
	}
}

// countedNodes counts the bytes of the files that come.
type countedNodes struct {
	nar.Nodes
	a *attempt
}

func (n *countedNodes) Next() (nar.Node, error) {
	node, err := n.Nodes.Next()
	n.a.countRead(node.Size)
	return node, err
}
