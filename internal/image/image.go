// SPDX-License-Identifier: GPL-3.0-or-later

// Package image opens what a read capability denotes, in whatever form a file tree may be there: as
// ERIS-FS, as a nar, or as a compressed nar. Which one it is shows in the first bytes, for a
// capability does not tell. Start with [Open].
package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/content"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/decompress"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// A Form is what contents are.
type Form string

// The forms. A compressed nar has the form "nar." and the name of the compression.
const (
	ERISFS Form = "eris-fs"
	Nar    Form = "nar"
	Data   Form = "data" // no tree
)

// An Image is the contents of a read capability. It must be closed, by Close or by what Nodes
// returns.
type Image struct {
	// Content is the contents as they are, to be read by Nodes or by the caller, who must not close
	// it.
	Content *content.Reader
	// Form tells what they are.
	Form Form
	// Base, if it is set before Nodes is called, is where files of an ERIS-FS image are looked for
	// before they are requested, see [erisfs.Tree.Use].
	Base erisfs.Base
	// Total, if it is set before Nodes is called, is told how many bytes an ERIS-FS image should
	// have, which becomes known more and more exactly.
	Total func(bytes int64)

	source fetch.Source
	limits erisfs.Limits
	window fetch.Window
	method string // of compression
	cancel context.CancelFunc
}

// Open starts to read the contents of a read capability, which may make an archive of at most
// limits.NarSize bytes, and waits for the first ones. The window bounds the blocks in flight, and
// the context ends all reading. The source must verify its blocks; errors are those of
// [content.Open].
func Open(ctx context.Context, source fetch.Source, c eris.ReadCapability, limits erisfs.Limits, window fetch.Window) (*Image, error) {
	// Longer than both an index and a compressed nar may be.
	most := max(limits.IndexLength(), int64(min(limits.NarSize, 1<<61))*2)
	ctx, cancel := context.WithCancel(ctx)
	r, err := content.Open(ctx, source, c, most, window)
	if err != nil {
		cancel()
		return nil, err
	}
	x := &Image{Content: r, source: source, limits: limits, window: window, cancel: cancel}
	head, err := r.Peek(32)
	if err != nil {
		x.Close()
		return nil, err
	}
	x.Form, x.method = formOf(head)
	return x, nil
}

// Close cancels all requests in flight and waits for them. It may be called again.
func (x *Image) Close() {
	x.cancel()
	x.Content.Close()
}

// Index reads the index of a tree whose form is ERIS-FS, once, in place of Nodes.
func (x *Image) Index() (*erisfs.Index, error) {
	if size := x.Content.Size(); size > x.limits.IndexLength() {
		return nil, fmt.Errorf("index of %d bytes for an archive of %d", size, x.limits.NarSize)
	}
	return erisfs.ReadIndex(x.Content, x.limits)
}

// ReadIndex opens an image as [Open] does, and reads the index if its form is ERIS-FS; of another
// one there is none.
func ReadIndex(ctx context.Context, source fetch.Source, c eris.ReadCapability, limits erisfs.Limits, window fetch.Window) (form Form, index *erisfs.Index, err error) {
	x, err := Open(ctx, source, c, limits, window)
	if err != nil {
		return "", nil, err
	}
	defer x.Close()
	if x.Form == ERISFS {
		index, err = x.Index()
	}
	return x.Form, index, err
}

// formOf tells what contents are that begin with head, and how they are compressed.
func formOf(head []byte) (form Form, method string) {
	if erisfs.IsIndex(head) {
		return ERISFS, ""
	}
	for _, m := range []struct {
		magic  string
		form   Form
		method string
	}{
		{"\x0d\x00\x00\x00\x00\x00\x00\x00nix-archive-1", Nar, "none"},
		{"\x28\xb5\x2f\xfd", "nar.zstd", "zstd"},
		{"LZIP", "nar.lzip", "lzip"},
		{"\x1f\x8b", "nar.gzip", "gzip"},
	} {
		if strings.HasPrefix(string(head), m.magic) {
			return m.form, m.method
		}
	}
	return Data, ""
}

const (
	// readAheadBuffers and readAheadSize (bytes) are the memory between a decompressor and whoever
	// reads nodes.
	readAheadBuffers = 24
	readAheadSize    = 128 << 10
	leastReadAhead   = 4 << 10
)

// ReadNar returns the nodes of an archive that should have size bytes. A goroutine reads ahead,
// which close ends.
func ReadNar(ctx context.Context, archive io.Reader, size uint64) (nodes *nar.Reader, close func()) {
	ahead := nar.NewReadAhead(ctx, archive, readAheadBuffers, int(min(max(size, leastReadAhead), readAheadSize)), size)
	return nar.NewReader(ahead), ahead.Close
}

// Nodes returns the tree of the image, once. The caller must call close, which closes the image,
// too; if there is an error, it is closed already. Contents that look like a compressed nar may
// turn out to be something else; that is an error of the nodes.
func (x *Image) Nodes(ctx context.Context) (nodes nar.Nodes, close func(), err error) {
	if x.Form == ERISFS {
		index, err := x.Index()
		x.Close()
		if err != nil {
			return nil, nil, err
		}
		tree := index.Nodes(ctx, x.source, x.limits, x.window)
		if x.Base != nil {
			if err := tree.Use(ctx, x.Base); err != nil {
				tree.Close()
				return nil, nil, err
			}
		}
		if x.Total != nil {
			return newTotalled(tree, index, x.Total), tree.Close, nil
		}
		return tree, tree.Close, nil
	}
	if x.method == "" {
		x.Close()
		return nil, nil, errors.New("the contents are neither a tree nor a nar")
	}
	plain, err := decompress.OpenAtMost(x.method, x.Content, int64(min(x.limits.NarSize, 1<<62)))
	if err != nil {
		x.Close()
		return nil, nil, err
	}
	nodes, closeNodes := ReadNar(ctx, plain, x.limits.NarSize)
	return nodes, func() {
		x.cancel() // whoever reads ahead may wait for blocks
		closeNodes()
		plain.Close()
		x.Close()
	}, nil
}

// totalled is the nodes of a tree, and tells how many bytes its files should have in all. An index
// does not say how long they are, but how many levels of blocks they have, from which a guess of
// each follows; those that have come by say how far such guesses are off.
type totalled struct {
	nar.Nodes
	tell        func(bytes int64)
	guesses     []float64 // of the files still to come, in order
	come, left  float64   // sums of guesses
	bytesOfCome float64
}

func newTotalled(nodes nar.Nodes, index *erisfs.Index, tell func(bytes int64)) *totalled {
	t := &totalled{Nodes: nodes, tell: tell}
	for c := range index.Contents() {
		leaves := math.Pow(float64(c.BlockSize.Arity()), max(0, float64(c.Level)-0.5))
		t.guesses = append(t.guesses, leaves*float64(c.BlockSize))
		t.left += leaves * float64(c.BlockSize)
	}
	return t
}

// Next implements [nar.Nodes].
func (t *totalled) Next() (nar.Node, error) {
	node, err := t.Nodes.Next()
	if err == nil && node.Kind == nar.Regular {
		t.come, t.left = t.come+t.guesses[0], t.left-t.guesses[0]
		t.guesses = t.guesses[1:]
		t.bytesOfCome += max(float64(node.Size), 1<<10) // a block at least
		t.tell(int64(min(t.bytesOfCome*(1+t.left/t.come), 1<<60)))
	}
	return node, err
}
