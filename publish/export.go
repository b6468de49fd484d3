// SPDX-License-Identifier: GPL-3.0-or-later

package publish

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
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
	// Servers get narinfos, by hash part, of those items of which they have any. They are asked in
	// order, each for the items of which those before it have no authorised narinfo. Errors are
	// logged.
	Servers []func(ctx context.Context, hashParts []string) (map[string][]byte, error)
	// Keys are those whose signatures count.
	Keys narinfo.Verifier
	// Fetch restores an item, checked against an authorised narinfo, to a path that is not there
	// yet. It is for items that the local store does not have with the contents that were signed.
	Fetch func(ctx context.Context, storePath, to string) error
	// Closure exports everything that the items refer to, too.
	Closure bool
	// Log is where messages go.
	Log func(format string, a ...any)
}

// Exported tells what has been exported.
type Exported struct {
	Items, Blocks int64
	Bytes         int64 // of the blocks
}

// maxExported bounds the number of items, which narinfos from anywhere may make grow.
const maxExported = 1 << 20

// Export writes narinfos, as signed by whoever has signed them, and blocks of store items, so that
// they can be substituted from there alone.
//
// A narinfo that has no read capability under which we have put blocks gets a second one in a field
// ERIS below its signature, like those of an [Annotator]. It is written when the archive of the
// item has been found to have its NarHash, and all blocks are stored. An item without an authorised
// narinfo is exported with one that somebody else has signed, if the local store has its contents:
// whether that counts is for others to decide.
//
// The first item that cannot be exported ends it; what was written by then is complete.
func Export(ctx context.Context, items []string, o ExportOptions) (Exported, error) {
	if o.Root == "" {
		o.Root = o.StoreDir
	}
	e := exporter{o: o, seen: map[string]bool{}}
	err := e.run(ctx, items)
	return e.done, err
}

type exporter struct {
	o    ExportOptions
	seen map[string]bool
	done Exported
}

func (e *exporter) run(ctx context.Context, items []string) error {
	for _, path := range items {
		if err := narinfo.CheckStorePath(e.o.StoreDir, path); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(e.o.Directory, 0o755); err != nil {
		return err
	}
	info := cacheInfo(e.o.StoreDir)
	if err := writeFile(filepath.Join(e.o.Directory, "nix-cache-info"), info); err != nil {
		return err
	}
	// Level by level, so that narinfos are asked for many at a time.
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
			n := found[path]
			if n == nil {
				return fmt.Errorf("no server has a narinfo of %s that can be used", path)
			}
			if err := e.export(ctx, path, n); err != nil {
				return err
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
func (e *exporter) find(ctx context.Context, paths []string) (map[string]*narinfo.Narinfo, error) {
	byHash := map[string]string{}
	for _, path := range paths {
		hashPart, err := narinfo.HashPart(e.o.StoreDir, path)
		if err != nil {
			return nil, err
		}
		byHash[hashPart] = path
	}
	found := map[string]*narinfo.Narinfo{}
	authorised := map[string]bool{}
	for _, server := range e.o.Servers {
		var missing []string
		for _, path := range paths {
			if !authorised[path] {
				missing = append(missing, filepath.Base(path)[:32])
			}
		}
		if len(missing) == 0 {
			break
		}
		texts, err := server(ctx, missing)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err != nil {
			e.o.Log("%v", err)
		}
		for hashPart, text := range texts {
			path := byHash[hashPart]
			n, err := narinfo.Parse(text)
			if err == nil {
				err = n.CheckItem(e.o.StoreDir, path)
			}
			if err == nil {
				err = n.CheckHash()
			}
			if err != nil {
				e.o.Log("%s: %v", path, err)
				continue
			}
			good := n.Authorise(e.o.Keys) == nil
			_, signed := n.SignedText()
			if good && !authorised[path] || signed && found[path] == nil {
				found[path], authorised[path] = n, good
			}
		}
	}
	for path := range found {
		if !authorised[path] {
			e.o.Log("warning: nobody whose signature counts here has signed the narinfo of %s", path)
		}
	}
	return found, nil
}

// export writes one item.
func (e *exporter) export(ctx context.Context, path string, n *narinfo.Narinfo) error {
	tree := filepath.Join(e.o.Root, filepath.Base(path))
	if err := e.check(ctx, tree, n); err != nil {
		if e.o.Fetch == nil || ctx.Err() != nil {
			return err
		}
		if !errors.Is(err, fs.ErrNotExist) {
			e.o.Log("%v; fetching it", err)
		}
		private, err := os.MkdirTemp(e.o.Directory, ".fetch-")
		if err != nil {
			return err
		}
		defer restore.Remove(private)
		tree = filepath.Join(private, "item")
		if err := e.o.Fetch(ctx, path, tree); err != nil {
			return err
		}
	}
	pipeline := fetch.NewPipeline(ctx, e.o.Blocks)
	encoding, err := Encode(ctx, tree, pipeline.Put, eris.ConvergenceSecret{})
	if err2 := pipeline.Flush(); err == nil && err2 != nil {
		err = fmt.Errorf("storing the blocks of %s: %w", path, err2)
	}
	if err == nil && encoding.NarHash != n.NarDigest {
		err = otherContents(path, encoding.NarHash, n)
	}
	if err != nil {
		return err
	}
	blocks, bytes := pipeline.Stored()
	e.done.Items++
	e.done.Blocks += blocks
	e.done.Bytes += bytes
	return writeFile(filepath.Join(e.o.Directory, filepath.Base(path)[:32]+".narinfo"), withCapability(n, encoding.Capability))
}

// check hashes the archive of a tree, before any of its blocks is stored.
func (e *exporter) check(ctx context.Context, path string, n *narinfo.Narinfo) error {
	tree := nar.NewTree(path)
	defer tree.Close()
	h := sha256.New()
	if _, err := nar.Write(writerUntil{ctx, h}, tree); err != nil {
		return err
	}
	if sum := [sha256.Size]byte(h.Sum(nil)); sum != n.NarDigest {
		return otherContents(path, sum, n)
	}
	return nil
}

func otherContents(path string, sum [sha256.Size]byte, n *narinfo.Narinfo) error {
	return fmt.Errorf("%s: %w: hash sha256:%s instead of %s", path, errOtherContents, nixbase32.EncodeToString(sum[:]), n.NarHash)
}

// withCapability returns the text of a narinfo with a read capability below the signature, if it
// does not have it. The rest stays as it is but for empty lines at the end, which would end the
// record.
func withCapability(n *narinfo.Narinfo, c eris.ReadCapability) string {
	for _, e := range n.ERIS {
		if had, err := eris.ParseURN(e.URN); err == nil && had == c {
			return n.Text()
		}
	}
	return strings.TrimRight(n.Text(), "\n") + "\nERIS: " + c.URN() + "\n"
}

// writeFile writes a file so that it is old or new, also after a power failure.
func writeFile(path, text string) error {
	return files.Replace(path, 0o644, files.Options{Sync: true}, func(w io.Writer) error {
		_, err := io.WriteString(w, text)
		return err
	})
}

// writerUntil fails when a context ends.
type writerUntil struct {
	ctx context.Context
	w   io.Writer
}

// Write implements io.Writer.
func (w writerUntil) Write(p []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	return w.w.Write(p)
}
