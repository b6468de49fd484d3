// SPDX-License-Identifier: GPL-3.0-or-later

// Package image opens what a read capability denotes, in whatever form a file tree
// may be there: as ERIS-FS, as a nar, or as a compressed nar. Which one it is shows
// in the first bytes, for a capability does not tell. Start with [Open].
package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
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

// An Image is the contents of a read capability.
type Image struct {
	// Content is the contents as they are.
	Content *eris.Content
	// Form tells what they are.
	Form Form

	blocks eris.Blocks
	limits erisfs.Limits
	window eris.Window
	method string // of compression
}

// Open opens the contents of a read capability, which may make an archive of at
// most limits.NarSize bytes. The window bounds the blocks in flight. Errors are
// those of [eris.Open].
func Open(ctx context.Context, blocks eris.Blocks, c eris.ReadCapability, limits erisfs.Limits, window eris.Window) (*Image, error) {
	// Longer than both an index and a compressed nar may be.
	most := max(limits.IndexLength(), int64(min(limits.NarSize, 1<<61))*2)
	content, err := eris.Open(ctx, blocks, c, most, window)
	if err != nil {
		return nil, err
	}
	head := make([]byte, 32)
	n, err := content.ReadAt(ctx, head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	x := &Image{Content: content, blocks: blocks, limits: limits, window: window}
	x.Form, x.method = formOf(head[:n])
	return x, nil
}

// formOf tells what contents are that begin with head, and how they are
// compressed.
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

// The memory between a decompressor and whoever reads nodes.
const (
	readAheadBuffers = 24
	readAheadSize    = 128 << 10
)

// Nodes returns the tree of the image. The caller must call close. Contents that
// look like a compressed nar may turn out to be something else; that is an error
// of the nodes.
func (x *Image) Nodes(ctx context.Context) (nodes nar.Nodes, close func(), err error) {
	if x.Form == ERISFS {
		if size := x.Content.Size(); size > x.limits.IndexLength() {
			return nil, nil, fmt.Errorf("index of %d bytes for an archive of %d", size, x.limits.NarSize)
		}
		index, err := erisfs.ReadIndex(ctx, x.Content, x.limits)
		if err != nil {
			return nil, nil, err
		}
		tree := index.Nodes(ctx, x.blocks, x.limits, x.window)
		return tree, func() { tree.Close() }, nil
	}
	if x.method == "" {
		return nil, nil, errors.New("the contents are neither a tree nor a nar")
	}
	reader := x.Content.NewReader(ctx)
	plain, err := decompress.Open(x.method, reader)
	if err != nil {
		reader.Close()
		return nil, nil, err
	}
	ahead := nar.NewReadAhead(ctx, plain, readAheadBuffers, readAheadSize)
	return nar.NewReader(ahead), func() {
		ahead.Close()
		plain.Close()
		reader.Close()
	}, nil
}
