// SPDX-License-Identifier: GPL-3.0-or-later

package substitute

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"
	"sync/atomic"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

// untried returns the read capabilities that narinfos offer for the item and that
// have not been tried, signed ones first. All these narinfos are equivalent to one that is authorised;
// what they denote is hashed, so that a capability that nobody has signed can do
// no more harm than a nar from anywhere.
func (j *job) untried(records []record) []eris.ReadCapability {
	var found []eris.ReadCapability
	seen := map[eris.ReadCapability]bool{}
	for _, signed := range []bool{true, false} {
		if !signed && !j.s.UnsignedCapabilities {
			continue
		}
		for _, r := range records {
			for _, e := range r.narinfo.ERIS {
				if (e.Signed && r.authorised) != signed {
					continue
				}
				c, err := eris.ParseURN(e.URN)
				if err != nil || seen[c] || j.tried[c.URN()] {
					continue // a draft of the encoding, perhaps
				}
				seen[c] = true
				found = append(found, c)
			}
		}
	}
	return found
}

// fromBlocks tries the capabilities of the narinfos.
func (j *job) fromBlocks(ctx context.Context, records []record) (Outcome, bool) {
	if j.s.Blocks == nil || j.s.Policy == HTTPOnly {
		return Outcome{}, false
	}
	for _, c := range j.untried(records) {
		size, err := j.attemptBlocks(ctx, c)
		if err == nil {
			return j.success(size), true
		}
		if errors.Is(err, errSlower) {
			// It is tried again if the nar cannot be had.
			j.s.Log.Notef("%s: %v", c.URN(), err)
			if err := restore.Remove(j.destination); err != nil {
				j.s.Log.Errorf("%v", err)
			}
			return Outcome{}, false
		}
		j.tried[c.URN()] = true
		if !j.failed(ctx, fmt.Errorf("%s: %w", c.URN(), err)) {
			return Outcome{}, false
		}
	}
	return Outcome{}, false
}

// attemptBlocks restores the item from blocks. It returns the length of the
// archive.
func (j *job) attemptBlocks(ctx context.Context, c eris.ReadCapability) (narSize uint64, err error) {
	if err := restore.Remove(j.destination); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	limits := erisfs.Limits{NarSize: j.options().MaxBytes}
	var got atomic.Int64           // bytes of blocks
	shown := int64(j.want.NarSize) // as the whole; blocks are some bytes more
	blocks := fetch.Counted(j.s.Blocks, func(n int) {
		after := got.Add(int64(n))
		j.progress.Transferred(int(min(after, shown) - min(after-int64(n), shown)))
	})
	j.progress.From(shownURN(c, j.path), int64(min(j.want.NarSize, 1<<62)))
	defer watchRate(&got, cancel)()
	if j.choice != nil {
		defer j.choice.watchPace(got.Load, cancel)()
	}
	var window eris.Window
	if j.s.Window != nil {
		window = j.s.Window()
	}
	contents, err := image.Open(ctx, blocks, c, limits, window)
	if err != nil {
		return 0, prefer(ctx, err)
	}
	nodes, closeNodes, err := contents.Nodes(ctx)
	if err != nil {
		return 0, prefer(ctx, err)
	}
	result, err := restore.Restore(ctx, nodes, j.destination, j.options())
	if err != nil {
		cancel(err)
		err = context.Cause(ctx)
	}
	closeNodes()
	if err != nil {
		return 0, err
	}
	return result.NarSize, j.check(result)
}

// shownURN is what people are told that the item comes from: the URN, and the name of the item in the fragment, because the client
// of Guix shows what is behind the last slash beside its progress bar (Guix, guix/status.scm: print-build-event). A fragment is
// not a part of the name (RFC 8141, section 2.3.3).
func shownURN(c eris.ReadCapability, item string) string {
	name := path.Base(item)
	if _, after, ok := strings.Cut(name, "-"); ok {
		name = after
	}
	return c.URN() + "#/" + name
}

// prefer returns why a context was cancelled, rather than what followed from it.
func prefer(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}
