// SPDX-License-Identifier: GPL-3.0-or-later

package publish

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/delta"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/reuse"
)

// DeltaOptions say how [Deltas] are made.
type DeltaOptions struct {
	// Directory keeps them; it is created when there is something to keep. MaxBytes bounds their
	// lengths together: the oldest ones make room.
	Directory string
	MaxBytes  int64
	// StoreDir is the store directory that items name; Root is where it is, if not there.
	StoreDir, Root string
	// Items knows what is in the store.
	Items Items
	// Store gets the deltas in blocks too; nil is nothing.
	Store fetch.Store
	// Log is where messages go.
	Log func(format string, a ...any)
}

// Deltas makes deltas of the items of a store, in the background: of each that somebody wants from
// up to three that are older and have the same name without version. It is safe for concurrent use.
type Deltas struct {
	shelf   // makes by hash part
	o       DeltaOptions
	listing *reuse.Listing
}

const (
	// maxBases is of how many items deltas of one are made at most.
	maxBases = 3
	// leastItem is the length in bytes of the smallest archive of an item that deltas pay for.
	leastItem = 32 << 10
	// deltaQueue is how many items may wait for their deltas.
	deltaQueue = 1000
	// A delta must be so much smaller than the compressed nar.
	deltaGain = 2
)

// itemDeltas is what is kept of the deltas of an item, as JSON.
type itemDeltas struct {
	NarHash string      `json:"narHash"` // in hexadecimal
	Deltas  []keptDelta `json:"deltas"`
}

type keptDelta struct {
	Base string `json:"base"` // name
	Size uint64 `json:"size"`
	// URN is empty if the delta is not in blocks; Store tells which store has them.
	URN   string `json:"urn,omitempty"`
	Store string `json:"store,omitempty"`
}

// NewDeltas returns deltas that are made as o says. Close must be called at the end.
func NewDeltas(o DeltaOptions) *Deltas {
	o.Root = cmp.Or(o.Root, o.StoreDir)
	removeUnusedRecords(o.Directory)
	return &Deltas{shelf: newShelf(o.Directory, 1, o.Log), o: o, listing: &reuse.Listing{Directory: o.Root}}
}

// Known returns the deltas of an item, for its narinfo, of which the URLs are relative to that of
// the server. If they have not been made yet, that is put off to the background, if the item is in
// the store; complete reports that there is nothing to wait for.
func (d *Deltas) Known(item *narinfo.Narinfo) (list []narinfo.Delta, complete bool) {
	if item.NarSize < leastItem {
		return nil, true
	}
	hash := hashPartOf(item.StorePath)
	kept, ok := d.read(hash)
	if !ok || kept.NarHash != fmt.Sprintf("%x", item.NarDigest) {
		if _, err := os.Lstat(d.tree(item.StorePath)); err != nil || d.making.Waiting() >= deltaQueue {
			return nil, true // somebody will want it again
		}
		d.making.Start(hash, func(ctx context.Context) error { return d.make(ctx, item) })
		return nil, false
	}
	for _, k := range kept.Deltas {
		if k.URN != "" && k.Store == storeName(d.o.Store) {
			list = append(list, narinfo.Delta{Base: k.Base, Size: k.Size, URL: k.URN})
		}
		base := hashPartOf(k.Base)
		if _, err := os.Lstat(d.delta(base, hash)); err == nil {
			list = append(list, narinfo.Delta{Base: k.Base, Size: k.Size, URL: "delta/" + base + "/" + hash})
		}
	}
	return list, true
}

// hashPartOf returns the hash in the file name of a store item, which must have one.
func hashPartOf(path string) string { return filepath.Base(path)[:reuse.HashLength] }

// delta is where the delta of an item from another one is; both are hash parts.
func (d *Deltas) delta(base, hash string) string { return d.file(base + "-" + hash + ".delta") }

// read returns what is kept of an item. A record that is damaged counts as none.
func (d *Deltas) read(hash string) (kept itemDeltas, ok bool) {
	used(d.record(hash))
	text, err := files.ReadState(d.record(hash), maxKnownFile)
	if err != nil || json.Unmarshal(text, &kept) != nil {
		return kept, false
	}
	damaged := func(k keptDelta) bool { return narinfo.CheckStoreName(k.Base) != nil }
	return kept, !slices.ContainsFunc(kept.Deltas, damaged)
}

// make makes and records the deltas of an item. What fails is not tried again either.
func (d *Deltas) make(ctx context.Context, item *narinfo.Narinfo) error {
	bases, err := d.bases(ctx, item)
	if err != nil {
		return err
	}
	kept := itemDeltas{NarHash: fmt.Sprintf("%x", item.NarDigest)}
	if err := files.MakeDirectory(d.directory); err != nil {
		return err
	}
	tree := d.tree(item.StorePath)
	limit := int64(0)
	if len(bases) > 0 {
		if limit, err = usefulSize(ctx, tree); err != nil {
			return err
		}
	}
	var failures error
	for _, base := range bases {
		k, err := d.makeFrom(ctx, base, item, min(limit, d.o.MaxBytes))
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err == nil:
			kept.Deltas = append(kept.Deltas, k)
		case !errors.Is(err, delta.ErrTooLarge):
			failures = errors.Join(failures, err)
		}
	}
	failures = errors.Join(failures, d.clean())
	text, err := json.Marshal(kept)
	if err == nil {
		err = writeFile(d.record(hashPartOf(item.StorePath)), 0o600, string(text)+"\n")
	}
	return errors.Join(failures, err)
}

// tree is where a store item is.
func (d *Deltas) tree(path string) string { return filepath.Join(d.o.Root, filepath.Base(path)) }

// bases returns what is known of the items that deltas of an item are made of.
func (d *Deltas) bases(ctx context.Context, item *narinfo.Narinfo) ([]*narinfo.Narinfo, error) {
	names, err := d.listing.Like(filepath.Base(item.StorePath), true, func(name, item string) bool {
		return narinfo.UnversionedName(name) == narinfo.UnversionedName(item)
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s", ErrNoItem, item.StorePath)
	} else if err != nil {
		return nil, err
	}
	var bases []*narinfo.Narinfo
	for _, name := range names {
		n, err := d.o.Items.Item(ctx, hashPartOf(name))
		if err == nil && n.StorePath == d.o.StoreDir+"/"+name {
			bases = append(bases, n)
		}
		if len(bases) == maxBases {
			break
		}
	}
	return bases, nil
}

// makeFrom makes one delta.
func (d *Deltas) makeFrom(ctx context.Context, base, item *narinfo.Narinfo, limit int64) (keptDelta, error) {
	k := keptDelta{Base: filepath.Base(base.StorePath)}
	name := d.delta(hashPartOf(base.StorePath), hashPartOf(item.StorePath))
	size, err := writeDelta(ctx, name, d.tree(base.StorePath), base, d.tree(item.StorePath), item, limit)
	runtime.GC() // or the tables of the next encoder come on top of these
	k.Size = uint64(size)
	if err != nil || d.o.Store == nil {
		return k, err
	}
	c, err := encodeFile(ctx, name, d.o.Store)
	if err == nil {
		k.URN, k.Store = c.URN(), storeName(d.o.Store)
	} else if ctx.Err() == nil {
		d.log("%v", err) // it can be had as a file
	}
	return k, ctx.Err()
}

// writeDelta writes a delta to a file of the given name, if it makes the item. It returns the
// length in bytes.
func writeDelta(ctx context.Context, name, baseTree string, base *narinfo.Narinfo, tree string, item *narinfo.Narinfo, limit int64) (size int64, err error) {
	o := delta.WriteOptions{
		MaxSize: limit, Scratch: filepath.Dir(name),
		Replacements: reuse.Replacements(filepath.Base(base.StorePath), filepath.Base(item.StorePath), base.References, item.References),
	}
	err = files.Replace(name, 0o644, files.Options{Sync: true}, func(w io.Writer) error {
		size, err = delta.Write(ctx, w, tree, baseTree, o)
		return err
	})
	if err != nil {
		return 0, err
	}
	if err = checkDelta(ctx, name, baseTree, item); err != nil {
		os.Remove(name)
	}
	return size, err
}

// checkDelta reads a delta that has just been written.
func checkDelta(ctx context.Context, name, baseTree string, item *narinfo.Narinfo) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	r, err := delta.NewReader(ctx, f, baseTree, delta.ReadOptions{MaxSize: item.NarSize})
	if err != nil {
		return err
	}
	defer r.Close()
	sum, _, err := nar.Hash(ctx, r)
	if err == nil && sum != item.NarDigest {
		err = fmt.Errorf("delta of %s: %w", item.StorePath, errOtherContents)
	}
	return err
}

// encodeFile puts the blocks of a file into a store.
func encodeFile(ctx context.Context, name string, store fetch.Store) (c eris.ReadCapability, err error) {
	f, err := os.Open(name)
	if err != nil {
		return c, err
	}
	defer f.Close()
	_, err = putBlocks(ctx, store, name, func(sink eris.Sink) error {
		if c, err = eris.Encode(ctx, f, sink, eris.EncodeOptions{}); err != nil {
			err = fmt.Errorf("encoding %s: %w", name, err)
		}
		return err
	})
	return c, err
}

// usefulSize is how long a delta of a tree may be to be of use, in bytes.
func usefulSize(ctx context.Context, path string) (int64, error) {
	n := &skipper{w: io.Discard}
	err := writeNar(nar.Until(ctx, n), path, "zstd")
	return n.offset / deltaGain, err
}

// clean removes the oldest deltas where there are too many bytes of them, and what a process has
// left behind that was killed.
func (d *Deltas) clean() error {
	files.RemoveAbandoned(d.directory)
	all, err := oldestFirst(d.directory, func(name string) bool { return filepath.Ext(name) == ".delta" })
	sum := int64(0)
	for _, info := range all {
		sum += info.Size()
	}
	for _, info := range all {
		if sum <= d.o.MaxBytes {
			break
		}
		if err := os.Remove(d.file(info.Name())); err != nil {
			return err
		}
		sum -= info.Size()
	}
	return err
}

// serve answers a request for /delta/BASE/ITEM. It reports whether there is that delta; if not,
// nothing has been written.
func (d *Deltas) serve(w http.ResponseWriter, r *http.Request) bool {
	names, ok := strings.CutPrefix(r.URL.Path, "/delta/")
	base, hash, _ := strings.Cut(names, "/")
	if !ok || !isHashPart(base) || !isHashPart(hash) {
		return false
	}
	f, info, err := files.OpenRegular(d.delta(base, hash), os.O_RDONLY)
	if err != nil {
		return false
	}
	defer f.Close()
	w.Header().Set("Content-Type", "application/octet-stream")
	// A file is never changed, but another one may take its place.
	w.Header().Set("Etag", fmt.Sprintf(`"%x-%x"`, info.Size(), info.ModTime().UnixNano()))
	http.ServeContent(w, r, "", time.Time{}, f)
	return true
}

// addTo adds what Known returns to the text of the narinfo of an item. No deltas add nothing.
func (d *Deltas) addTo(text string, item *narinfo.Narinfo) (with string, complete bool) {
	if d == nil {
		return text, true
	}
	deltas, complete := d.Known(item)
	return withLines(text, deltas), complete
}
