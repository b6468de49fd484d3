// SPDX-License-Identifier: GPL-3.0-or-later

package complete

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/decompress"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// An Item is a store item in a directory of narinfos.
type Item struct {
	Path string `json:"path"` // the name of the narinfo if that cannot be read
	// Blocks is about the read capability of which the most is there.
	Blocks Report `json:"blocks"`
	// Faults say what else is wrong: nars and deltas in the directory.
	Faults []string `json:"faults,omitempty"`
}

// Complete reports whether nothing is wrong.
func (i *Item) Complete() bool {
	return len(i.Faults) == 0 && i.Blocks.Complete()
}

// Directory checks the items of a directory that is a substitute server, as "export" makes it:
// their blocks in the store, and nars and deltas in the directory. They are in the order of the
// names of the narinfos. Errors are those of [Check] and of reading the directory.
func Directory(ctx context.Context, directory string, o Options) (items []Item, err error) {
	entries, err := os.ReadDir(directory)
	for _, e := range entries {
		if filepath.Ext(e.Name()) != ".narinfo" {
			continue
		}
		item, err := checkItem(ctx, directory, e.Name(), o)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", item.Path, err)
		}
		items = append(items, item)
	}
	return items, err
}

func checkItem(ctx context.Context, directory string, name string, o Options) (Item, error) {
	n, err := readNarinfo(directory, name)
	if err != nil {
		return Item{Path: name, Faults: []string{err.Error()}}, nil
	}
	item := Item{Path: n.StorePath}
	if item.Blocks, err = checkBlocks(ctx, n, o); err != nil {
		return item, err
	}
	for _, u := range n.URLs {
		if strings.Contains(u.URL, ":") {
			continue // it is on a server
		}
		if err := checkNar(ctx, directory, u, n); ctx.Err() != nil {
			return item, context.Cause(ctx)
		} else if err != nil {
			item.Faults = append(item.Faults, fmt.Sprintf("%s: %v", u.URL, err))
		}
	}
	for _, d := range n.Deltas {
		if strings.Contains(d.URL, ":") {
			continue
		}
		if info, err := os.Stat(filepath.Join(directory, d.URL)); err != nil || info.Size() != int64(d.Size) {
			item.Faults = append(item.Faults, d.URL+": it is not there, or not whole")
		}
	}
	return item, nil
}

func readNarinfo(directory string, name string) (*narinfo.Narinfo, error) {
	text, err := files.ReadRegular(filepath.Join(directory, name), narinfo.MaxSize)
	if err != nil {
		return nil, err
	}
	n, err := narinfo.Parse(text)
	if err == nil {
		err = n.CheckHash()
	}
	if err == nil && filepath.Base(n.StorePath)[:32]+".narinfo" != name {
		err = errors.New("it is about another item: " + n.StorePath)
	}
	return n, err
}

// checkBlocks checks the read capabilities of an item, and if none is complete, mends the one of
// which the most is there.
func checkBlocks(ctx context.Context, n *narinfo.Narinfo, o Options) (best Report, err error) {
	var capability *eris.ReadCapability
	for _, e := range n.ERIS {
		c, err := eris.ParseURN(e.URN)
		if err != nil {
			continue
		}
		r, err := Check(ctx, c, Options{Store: o.Store, Got: o.Got})
		if err != nil || r.Complete() {
			return r, err
		}
		if capability == nil || r.Blocks > best.Blocks {
			best, capability = r, &c
		}
	}
	if capability != nil && o.From != nil {
		return Check(ctx, *capability, o)
	}
	return best, nil
}

func checkNar(ctx context.Context, directory string, u narinfo.URL, n *narinfo.Narinfo) error {
	f, _, err := files.OpenRegular(filepath.Join(directory, u.URL), os.O_RDONLY)
	if err != nil {
		return errors.New("it is not there")
	}
	defer f.Close()
	plain, err := decompress.Open(u.Compression, f)
	if err != nil {
		return err
	}
	defer plain.Close()
	h := sha256.New()
	if _, err := io.Copy(nar.Until(ctx, h), io.LimitReader(plain, int64(min(n.NarSize, 1<<62))+1)); err != nil {
		return fmt.Errorf("it is damaged: %w", err)
	}
	if [sha256.Size]byte(h.Sum(nil)) != n.NarDigest {
		return errors.New("it has another hash than the narinfo says")
	}
	return nil
}
