// SPDX-License-Identifier: GPL-3.0-or-later

package publish

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/compress"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/tasks"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// An Encoding is a file tree that has been encoded.
type Encoding struct {
	// Capability denotes the tree as ERIS-FS, or, if Form is "nar", its archive.
	Capability eris.ReadCapability
	// Form is "eris-fs" or "nar".
	Form string
	// NarHash is the SHA-256 of the archive, and NarSize its length in bytes.
	NarHash [sha256.Size]byte
	NarSize uint64
}

// Encode encodes the file tree at path, which may be a single file, and puts its blocks into sink;
// nil is nowhere. A tree that ERIS-FS cannot express, because it has empty directories or names
// that are not UTF-8, is encoded as the archive that it makes, so that each store item has a
// capability; all of its blocks are put into sink then, whatever the options say of leaves. The
// zero options are those of everything that is published.
func Encode(ctx context.Context, path string, sink eris.Sink, o erisfs.EncodeOptions) (Encoding, error) {
	tree := nar.NewTree(path)
	defer tree.Close()
	r, err := erisfs.Encode(ctx, tree, sink, o)
	e := Encoding{r.Capability, "eris-fs", r.NarHash, r.NarSize}
	if errors.Is(err, erisfs.ErrNotRepresentable) {
		hash := sha256.New()
		e.Form = "nar"
		e.Capability, e.NarSize, err = encodeWritten(ctx, sink, o.Secret, func(w io.Writer) error {
			return writeNar(io.MultiWriter(hash, w), path, "none")
		})
		hash.Sum(e.NarHash[:0])
	}
	if err != nil {
		return Encoding{}, fmt.Errorf("encoding %s: %w", path, err)
	}
	return e, nil
}

// encodeWritten encodes what write writes, and returns how many bytes that is.
func encodeWritten(ctx context.Context, sink eris.Sink, secret eris.ConvergenceSecret, write func(io.Writer) error) (c eris.ReadCapability, size uint64, err error) {
	r, w := io.Pipe()
	n := &skipper{w: w}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		err := write(n)
		w.CloseWithError(err)
		return err
	})
	group.Go(func() (err error) {
		c, err = eris.Encode(ctx, r, sink, eris.EncodeOptions{Secret: secret})
		r.CloseWithError(err) // a writer that is under way ends
		return err
	})
	err = group.Wait()
	return c, uint64(n.offset), err
}

// encode encodes the compressed nar, byte for byte as write writes it.
func (n *knownNar) encode(ctx context.Context, sink eris.Sink, write func(io.Writer) error) error {
	c, size, err := encodeWritten(ctx, sink, eris.ConvergenceSecret{}, write)
	n.URN, n.Size = c.URN(), size
	return err
}

// Capabilities finds the read capabilities of store items: from a directory of those that are
// known, or by encoding them. It is safe for concurrent use.
type Capabilities struct {
	// Nar is a compression as in [ServerOptions], but not none: of the nar that is compressed so
	// there is a capability too. Empty is none. It is set before anything else is done, and is not
	// for an [Annotator].
	Nar string

	upstreamNar narEncoder // in place of Nar; nil is none

	shelf             // of records; encodes by path and hash
	store fetch.Store // nil: blocks are kept nowhere

	mu sync.Mutex
	// For how long requests may wait, as it was when one began to.
	waiting time.Duration
	waited  time.Time
	unkept  map[string]known // by hash part: what could not be written down
}

// maxUnkept is how many items are remembered of which nothing could be written down.
const maxUnkept = 256

// A narEncoder encodes the compressed nar of the item at path that another server has. What it
// returns has no URN if there is none.
type narEncoder func(ctx context.Context, path string, narHash [sha256.Size]byte, sink eris.Sink) (*knownNar, error)

// known is what is on disk of an item, as JSON.
type known struct {
	StorePath string `json:"storePath"`
	NarHash   string `json:"narHash"` // in hexadecimal
	URN       string `json:"urn"`
	// Store names the store that has the blocks; empty for none.
	Store string `json:"store"`
	// Nar is what is known of the compressed nar, if that is encoded too.
	Nar *knownNar `json:"nar,omitempty"`
	// Narinfo is the last one of the item, for when the item has gone from the store but its blocks
	// have not.
	Narinfo string `json:"narinfo,omitempty"`
	// Sum is the SHA-256 of the rest, so that damage is noticed.
	Sum string `json:"sum"`
}

// text returns what is on disk.
func (k known) text() ([]byte, error) {
	k.Sum = ""
	text, err := json.Marshal(k)
	if err != nil {
		return nil, err
	}
	k.Sum = fmt.Sprintf("%x", sha256.Sum256(text))
	text, err = json.Marshal(k)
	return append(text, '\n'), err
}

// knownNar is what is known of a compressed nar.
type knownNar struct {
	URN         string `json:"urn"`
	Size        uint64 `json:"size"` // in bytes
	Compression string `json:"compression"`
	// Form is [compress.Form], as it was, or upstreamForm.
	Form string `json:"form"`
}

// upstreamForm is the form of nars that another server has made.
const upstreamForm = "upstream"

// current reports whether a nar is what there is to be a capability of.
func (c *Capabilities) current(n *knownNar) bool {
	if c.upstreamNar != nil {
		return n != nil && n.Form == upstreamForm
	}
	return n != nil && n.Compression == c.Nar && n.Form == compress.Form
}

// maxKnownFile is how long a file with what is known may be, in bytes.
const maxKnownFile = 2 * narinfo.MaxSize

// NewCapabilities returns the capabilities that directory knows, but for those that nobody has
// asked for in 30 days, which are removed; it is created when there is something to keep. Blocks of
// items that are encoded, workers at a time, at least 1, are put into store; nil is nowhere.
// Messages go to log. Close must be called at the end.
func NewCapabilities(directory string, store fetch.Store, workers int, log func(format string, a ...any)) *Capabilities {
	removeUnusedRecords(directory)
	return &Capabilities{
		shelf: newShelf(directory, workers, log), store: store,
		waiting: maxWait, waited: time.Now(), unkept: make(map[string]known),
	}
}

// storeName tells stores apart without naming them: a store's URL may be secret. It is empty for no
// store.
func storeName(store fetch.Store) string {
	if store == nil {
		return ""
	}
	sum := sha256.Sum256([]byte(store.String()))
	return fmt.Sprintf("%x", sum[:16])
}

// encodesNars reports whether there is to be a capability of the compressed nar, too.
func (c *Capabilities) encodesNars() bool { return c.Nar != "" || c.upstreamNar != nil }

// lookUp returns what is known of a store item, if that is all that there is to be.
func (c *Capabilities) lookUp(path string, narHash [sha256.Size]byte) (k known, ok bool) {
	k, err := c.read(hashPartOf(path))
	switch {
	case err != nil:
		if !errors.Is(err, fs.ErrNotExist) {
			c.log("%v", err)
		}
		return known{}, false
	case k.StorePath != path, k.NarHash != fmt.Sprintf("%x", narHash), c.store != nil && k.Store != storeName(c.store),
		c.encodesNars() && !c.current(k.Nar):
		return known{}, false
	}
	return k, true
}

// values returns what narinfos say of an item of which something is known; nothing of others.
func (c *Capabilities) values(k known) (values []narinfo.ERIS) {
	if k.URN != "" {
		values = []narinfo.ERIS{{URN: k.URN}}
	}
	if c.encodesNars() && k.Nar != nil && k.Nar.URN != "" {
		kind, _, _ := compress.Split(k.Nar.Compression)
		values = append(values, narinfo.ERIS{URN: k.Nar.URN, Form: "nar." + kind, Size: k.Nar.Size})
	}
	return values
}

// read returns what is known of an item.
func (c *Capabilities) read(hashPart string) (k known, err error) {
	c.mu.Lock()
	k, ok := c.unkept[hashPart]
	c.mu.Unlock()
	if ok {
		return k, nil
	}
	used(c.record(hashPart))
	text, err := files.ReadState(c.record(hashPart), maxKnownFile)
	if err != nil {
		return k, err
	}
	if err = json.Unmarshal(text, &k); err == nil {
		var same []byte
		if same, err = k.text(); err == nil && !bytes.Equal(same, text) {
			err = errors.New("does not have the sum that it states")
		}
	}
	if err != nil {
		err = fmt.Errorf("%s is damaged: %w", c.record(hashPart), err)
	}
	return k, err
}

// keepNarinfo records the narinfo of an item whose blocks are put into a store, for gone.
func (c *Capabilities) keepNarinfo(k known, text string) {
	if c.store == nil || k.Narinfo == text {
		return
	}
	k.Narinfo = text
	c.keep(k)
}

// gone returns the narinfo of an item that is not in the store any more, if it can still be had
// from the blocks that were put into our store: as far as the root block, which it asks for, can
// tell.
func (c *Capabilities) gone(ctx context.Context, hashPart string) (text string, ok bool) {
	k, err := c.read(hashPart)
	if err != nil || k.Narinfo == "" || c.store == nil || k.Store != storeName(c.store) {
		return "", false
	}
	capability, err := eris.ParseURN(k.URN)
	if err != nil {
		return "", false
	}
	ctx, cancel := context.WithTimeout(ctx, maxWait)
	defer cancel()
	_, err = fetch.Get(ctx, c.store, capability.Root, capability.BlockSize, nil)
	return k.Narinfo, err == nil
}

// keep writes what is known of an item to disk. If that fails it is remembered, so that an item
// need not be encoded again and again, and has a capability, as long as the disk is full.
func (c *Capabilities) keep(k known) {
	hashPart := hashPartOf(k.StorePath)
	text, err := k.text()
	if err == nil {
		err = files.MakeDirectory(c.directory)
	}
	if err == nil {
		err = writeFile(c.record(hashPart), 0o600, string(text))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.unkept, hashPart)
	if err != nil {
		c.log("what is known of %s cannot be kept: %v", k.StorePath, err)
		if len(c.unkept) == maxUnkept {
			clear(c.unkept)
		}
		c.unkept[hashPart] = k
	}
}

const (
	// maxWait is for how long requests may be kept waiting for items to be encoded. A client that
	// asks for many items on one connection gives up before long.
	maxWait = 5 * time.Second
	// What of it has been used comes back, a second for every so many.
	refillAfter = 4
)

// FindSoon finds the capability of a store item, so that it is known, encoding the item if need be.
// The item's archive must have the hash narHash. Several calls for an item encode it once, and no
// more items are encoded at a time than there may be. It waits only as long as is bearable, all who
// wait taken together. If that is too short, or ctx ends, found is false, and the encoding goes on:
// somebody will ask again. Failures are logged, too.
func (c *Capabilities) FindSoon(ctx context.Context, path string, narHash [sha256.Size]byte) (found bool, err error) {
	e := c.FindLater(path, narHash)
	begin := time.Now()
	c.mu.Lock()
	c.waiting = min(maxWait, c.waiting+begin.Sub(c.waited)/refillAfter)
	c.waited = begin
	enough := time.After(max(0, c.waiting))
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.waiting = max(0, c.waiting-time.Since(begin))
	}()
	select {
	case <-e.Done:
		return e.Err == nil, e.Err
	case <-enough:
		return false, nil
	case <-ctx.Done():
		return false, ctx.Err()
	}
}

// find returns what the narinfo of an item says of capabilities, encoding the item if need be, soon
// or, if its archive has more than waitFor bytes, later; it is not complete as long as that goes
// on.
func (c *Capabilities) find(ctx context.Context, path string, n *narinfo.Narinfo, waitFor uint64) (k known, complete bool, err error) {
	if k, complete = c.lookUp(path, n.NarDigest); complete {
		return k, true, nil
	}
	if n.NarSize > waitFor {
		c.FindLater(path, n.NarDigest)
		return k, false, nil
	}
	if found, err := c.FindSoon(ctx, path, n.NarDigest); !found {
		return k, false, err
	}
	k, complete = c.lookUp(path, n.NarDigest)
	return k, complete, nil
}

// FindLater has an item encoded in the background, unless it is being encoded, or could not be a
// short while ago. Failures are logged.
func (c *Capabilities) FindLater(path string, narHash [sha256.Size]byte) *tasks.Task {
	return c.making.Start(fmt.Sprintf("%s %x", path, narHash), func(ctx context.Context) error {
		if _, ok := c.lookUp(path, narHash); ok {
			return nil // another encoding has just ended
		}
		return c.encode(ctx, path, narHash)
	})
}

// errOtherContents is an item that is not what it should be.
var errOtherContents = fmt.Errorf("other contents than the narinfo says: %w", tasks.ErrHopeless)

// encode finds out the capability of an item and keeps it.
func (c *Capabilities) encode(ctx context.Context, path string, narHash [sha256.Size]byte) error {
	k := known{StorePath: path, NarHash: fmt.Sprintf("%x", narHash), Store: storeName(c.store)}
	encode := func(sink eris.Sink) error {
		e, err := Encode(ctx, path, sink, erisfs.EncodeOptions{})
		if err == nil && e.NarHash != narHash {
			err = fmt.Errorf("%s: %w: hash %x instead of %x", path, errOtherContents, e.NarHash, narHash)
		}
		k.URN = e.Capability.URN()
		switch {
		case err != nil:
		case c.upstreamNar != nil:
			k.Nar, err = c.upstreamNar(ctx, path, narHash, sink)
		case c.Nar != "":
			k.Nar = &knownNar{Compression: c.Nar, Form: compress.Form}
			err = k.Nar.encode(ctx, sink, func(w io.Writer) error { return writeNar(w, path, c.Nar) })
		}
		return err
	}
	var err error
	if c.store == nil {
		err = encode(nil)
	} else {
		_, err = putBlocks(ctx, c.store, path, encode)
	}
	if err == nil {
		c.keep(k)
	}
	return err
}

// putBlocks puts the blocks that encode makes of something into a store. Nobody may hear of them
// before it returns.
func putBlocks(ctx context.Context, store fetch.Store, of string, encode func(eris.Sink) error) (*fetch.Pipeline, error) {
	pipeline := fetch.NewPipeline(ctx, store)
	err := encode(pipeline.Put)
	if failed := pipeline.Flush(); err == nil && failed != nil {
		err = fmt.Errorf("storing the blocks of %s: %w", of, failed)
	}
	return pipeline, err
}
