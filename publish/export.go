// SPDX-License-Identifier: GPL-3.0-or-later

package publish

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

// ExportOptions say how [Export] works.
type ExportOptions struct {
	// StoreDir is the store directory; Root is where it is, if not there.
	StoreDir, Root string
	// Directory is where narinfos are written, named HASH.narinfo, beside the file nix-cache-info;
	// it is made if need be. It is then a substitute server for "file" URLs.
	Directory string
	// Blocks is where the blocks go.
	Blocks fetch.Store
	// Servers are asked in order, each for the items of which those before it have no authorised
	// narinfo.
	Servers []ExportServer
	// Keys are those whose signatures count.
	Keys narinfo.Verifier
	// Fetch restores an item, checked against an authorised narinfo, to a path that is not there
	// yet, in the directory for temporary files ([os.TempDir]). It is for items that the local store
	// does not have with the contents that were signed.
	Fetch func(ctx context.Context, storePath, to string) error
	// Since is the directory of an earlier export, which whoever gets this one has in the store.
	// What is there is left out; an item of which an older version is there, and also in the local
	// store, is exported as a delta from that, in place of its blocks, where it is much smaller.
	// Empty is none.
	Since string
	// Closure exports everything that the items refer to, too.
	Closure bool
	// Nars writes compressed nars as well, for programs that know no blocks.
	Nars bool
	// Log is where messages go.
	Log func(format string, a ...any)
	// Total is told how many bytes the archives of the items should have, and Got that of each
	// block; the latter from any goroutine, and without waiting.
	Total func(bytes int64)
	Got   func(bytes int)
}

// An ExportServer has narinfos.
type ExportServer struct {
	// URL is its substitute URL without anything secret; empty if it is of no use to others.
	URL string
	// Narinfos gets narinfos, by hash part, of those items of which there are any. Errors are
	// logged.
	Narinfos func(ctx context.Context, hashParts []string) (map[string][]byte, error)
}

// Exported tells what has been exported.
type Exported struct {
	Items, Blocks int64
	Bytes         int64 // of blocks, nars and deltas
}

// MaxNarinfos bounds the narinfos of one export, in bytes.
const MaxNarinfos = 256 << 20

// maxExported bounds the number of items, which narinfos from anywhere may make grow.
const maxExported = 1 << 20

// Export writes narinfos, as signed by whoever has signed them, and blocks of store items, so that
// they can be substituted from there alone.
//
// What is below the signature of a narinfo says where the item is now: the read capability of its
// blocks, its nar, or its delta, all in Directory. A narinfo has to name a nar, so where that is
// not written it names those of the server that it came from, by absolute URLs; if there is no such
// server the nar is written in any case. An item without an authorised narinfo is exported with one
// that somebody else has signed, if the local store has its contents: whether that counts is for
// others to decide. Symbolic links in Directory do not lead out of it.
//
// It fails before anything is stored if the file system of Directory has less room than the items
// have bytes, and at the first item that cannot be exported. Narinfos are written when the blocks
// of all items are stored, and nix-cache-info is written last. After a failure the blocks stay, and
// need not be stored again.
func Export(ctx context.Context, items []string, o ExportOptions) (Exported, error) {
	o.Root = cmp.Or(o.Root, o.StoreDir)
	e := exporter{o: o, seen: map[string]bool{}}
	var err error
	if e.earlier, err = readEarlier(ctx, o.Since, o.StoreDir); err != nil {
		return Exported{}, err
	}
	err = e.run(ctx, items)
	return e.done, err
}

type exporter struct {
	o       ExportOptions
	seen    map[string]bool
	items   []*exportItem
	text    int // bytes of narinfos
	done    Exported
	earlier earlier
}

// A NoNarinfoError says that no server describes an item so that it counts.
type NoNarinfoError struct{ Path string }

// Error implements error.
func (e *NoNarinfoError) Error() string {
	return "no server has a narinfo of " + e.Path + " that counts"
}

// An exportItem is an item with its narinfo, in the end that with a read capability.
type exportItem struct {
	narinfo *narinfo.Narinfo
	good    bool   // that is authorised
	server  string // where it is from; may be empty
	text    string
}

func (e *exporter) run(ctx context.Context, items []string) error {
	for _, path := range items {
		if err := narinfo.CheckStorePath(e.o.StoreDir, path); err != nil {
			return err
		}
	}
	if err := e.collect(ctx, items); err != nil {
		return err
	}
	if err := e.checkRoom(ctx); err != nil {
		return err
	}
	if err := os.MkdirAll(e.o.Directory, 0o755); err != nil {
		return err
	}
	directory, err := os.Open(e.o.Directory)
	if err != nil {
		return err
	}
	defer directory.Close()
	// What is half-made has the same names in each export. Not all file systems have locks.
	if err := files.LockFile(directory, 0); errors.Is(err, files.ErrLocked) {
		return fmt.Errorf("another export writes to %s; wait for its end", e.o.Directory)
	}
	if err := e.subdirectory("blocks"); err != nil {
		return err
	}
	for _, it := range e.items {
		if err := e.export(ctx, it); err != nil {
			return err
		}
	}
	return e.write()
}

// collect gets the narinfos of all items, level by level, so that many are asked for at a time.
func (e *exporter) collect(ctx context.Context, items []string) error {
	for wanted := e.unseen(items); len(wanted) > 0; {
		if len(e.seen) > maxExported {
			return fmt.Errorf("more than %d items are too many", maxExported)
		}
		found, err := e.find(ctx, wanted)
		if err != nil {
			return err
		}
		var references []string
		for _, path := range wanted {
			it := found[path]
			if it == nil {
				return &NoNarinfoError{path}
			}
			n := it.narinfo
			if e.text += len(n.Text()); e.text > MaxNarinfos {
				return fmt.Errorf("narinfos of more than %d bytes are too many", MaxNarinfos)
			}
			if !e.earlier.has(n) {
				e.items = append(e.items, it)
			}
			if e.o.Closure {
				for _, name := range n.References {
					references = append(references, e.o.StoreDir+"/"+name)
				}
			}
		}
		wanted = e.unseen(references)
	}
	return nil
}

// checkRoom compares the free space with what the items that have not been exported before should
// need: about as much as their archives, in files of a block each, which take whole clusters.
func (e *exporter) checkRoom(ctx context.Context) error {
	directory := e.o.Directory
	room, err := files.RoomIn(directory)
	for ; errors.Is(err, fs.ErrNotExist); room, err = files.RoomIn(directory) {
		directory = filepath.Dir(directory) // what it will be made in
	}
	if err != nil {
		return err
	}
	needed, total := 0.0, int64(0)
	for _, it := range e.items {
		total += int64(it.narinfo.NarSize)
		size := float64(it.narinfo.NarSize)
		had, err := Directory(e.o.Directory).Item(ctx, hashPartOf(it.narinfo.StorePath))
		has := err == nil && had.NarDigest == it.narinfo.NarDigest
		if e.needsNar(it) && (!has || e.o.Nars) {
			needed += size
		}
		if has {
			continue // exported before, with all of its blocks
		}
		block := float64(eris.BlockSizeFor(int64(it.narinfo.NarSize)))
		needed += (size/block + 2) * max(block, float64(room.Cluster)) // with the last leaf and the root
	}
	if needed > float64(room.Free) {
		return fmt.Errorf("%s has too little room: the items need about %s, and %s are free", e.o.Directory, page.Size(int64(needed)), page.Size(room.Free))
	}
	e.o.Log("%s: about %s to write; %s are free in %s", page.Count(len(e.items), "item"), page.Size(int64(needed)), page.Size(room.Free), e.o.Directory)
	e.o.Total(total)
	return nil
}

// write writes the narinfos, and then what makes the directory a substitute server. What was found
// later is referred to by what was found earlier, mostly, and comes first.
func (e *exporter) write() error {
	for _, it := range slices.Backward(e.items) {
		if err := writeFile(filepath.Join(e.o.Directory, hashPartOf(it.narinfo.StorePath)+".narinfo"), 0o644, it.text); err != nil {
			return err
		}
	}
	return writeFile(filepath.Join(e.o.Directory, "nix-cache-info"), 0o644, cacheInfo(e.o.StoreDir))
}

// unseen returns the paths that have not been met before.
func (e *exporter) unseen(paths []string) []string {
	var unseen []string
	for _, path := range paths {
		if !e.seen[path] {
			e.seen[path] = true
			unseen = append(unseen, path)
		}
	}
	return unseen
}

// find gets the narinfos of items: the first authorised one of each, or else the first that has any
// signature.
func (e *exporter) find(ctx context.Context, paths []string) (map[string]*exportItem, error) {
	byHash := map[string]string{}
	for _, path := range paths {
		hashPart, err := narinfo.HashPart(e.o.StoreDir, path) // references may be anything
		if err != nil {
			return nil, err
		}
		byHash[hashPart] = path
	}
	found := map[string]*exportItem{}
	for _, server := range e.o.Servers {
		var missing []string
		for _, path := range paths {
			if it := found[path]; it == nil || !it.good {
				missing = append(missing, hashPartOf(path))
			}
		}
		if len(missing) == 0 {
			break
		}
		texts, err := server.Narinfos(ctx, missing)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err != nil {
			e.o.Log("%s", message.Plain(err))
		}
		for hashPart, text := range texts {
			path := byHash[hashPart]
			n, err := narinfo.Parse(text)
			if err == nil {
				err = cmp.Or(n.CheckItem(e.o.StoreDir, path), n.CheckHash())
			}
			if err != nil {
				e.o.Log("%s: %s", path, message.Plain(err))
				continue
			}
			good := n.Authorise(e.o.Keys) == nil // of what has been missing
			if _, signed := n.SignedText(); good || signed && found[path] == nil {
				found[path] = &exportItem{narinfo: n, good: good, server: server.URL}
			}
		}
	}
	for path, it := range found {
		if !it.good {
			e.o.Log("warning: nobody whose signature counts here has signed the narinfo of %s", path)
		}
	}
	return found, nil
}

// export stores the blocks of one item.
func (e *exporter) export(ctx context.Context, it *exportItem) error {
	n := it.narinfo
	tree := filepath.Join(e.o.Root, filepath.Base(n.StorePath))
	if err := check(ctx, tree, n); err != nil {
		if e.o.Fetch == nil || ctx.Err() != nil {
			return err
		}
		if !errors.Is(err, fs.ErrNotExist) {
			e.o.Log("%s; fetching it", message.Plain(err))
		}
		// Not on the stick: it may know no links, no modes and no upper beside lower case.
		private, remove, err := restore.Temporary(os.TempDir(), "guix-substitute-eris-export-")
		if err != nil {
			return err
		}
		defer remove()
		tree = filepath.Join(private, "item")
		if err := e.o.Fetch(ctx, n.StorePath, tree); err != nil {
			return err
		}
	}
	var urls []narinfo.URL
	if e.needsNar(it) {
		u, err := e.writeNar(ctx, it, tree)
		if err != nil {
			return err
		}
		urls = append(urls, u)
	}
	line, err := e.exportDelta(ctx, n, tree)
	if err == nil && line == "" {
		line, err = e.exportBlocks(ctx, n, tree)
	}
	if err == nil {
		it.text = listed(it, urls, line)
		e.done.Items++
	}
	return err
}

// exportBlocks stores the blocks of an item of which the tree is at hand, and returns the line of
// the narinfo for them.
func (e *exporter) exportBlocks(ctx context.Context, n *narinfo.Narinfo, tree string) (string, error) {
	var encoding Encoding
	pipeline, err := putBlocks(ctx, e.o.Blocks, n.StorePath, func(sink eris.Sink) (err error) {
		encoding, err = Encode(ctx, tree, func(ctx context.Context, ref eris.Reference, block []byte) error {
			e.o.Got(len(block))
			return sink(ctx, ref, block)
		}, erisfs.EncodeOptions{})
		return err
	})
	if err == nil && encoding.NarHash != n.NarDigest {
		err = otherContents(n.StorePath, encoding.NarHash, n)
	}
	if err != nil {
		return "", err
	}
	blocks, bytes := pipeline.Stored()
	e.done.Blocks += blocks
	e.done.Bytes += bytes
	return capabilityLine(n, encoding.Capability), nil
}

// check hashes the archive of a tree, before any of its blocks is stored.
func check(ctx context.Context, path string, n *narinfo.Narinfo) error {
	sum, _, err := nar.HashTree(ctx, path)
	if err == nil && sum != n.NarDigest {
		err = otherContents(path, sum, n)
	}
	return err
}

func otherContents(path string, sum [sha256.Size]byte, n *narinfo.Narinfo) error {
	return fmt.Errorf("%s: %w: hash sha256:%s instead of %s", path, errOtherContents, nixbase32.EncodeToString(sum[:]), n.NarHash)
}

// writeFile writes a file so that it is old or new, also after a power failure.
func writeFile(path string, mode fs.FileMode, text string) error {
	return files.Write(path, mode, files.Options{Sync: true}, []byte(text))
}
