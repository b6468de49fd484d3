// SPDX-License-Identifier: GPL-3.0-or-later

package publish

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/guixdb"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// Items knows what is in a store: a [guixdb.Database], for example. It is safe for concurrent use.
type Items interface {
	// Item returns the item whose file name has the given hash part. The error wraps [ErrNoItem] if
	// there is none.
	Item(ctx context.Context, hashPart string) (*narinfo.Narinfo, error)
	// Names returns the file names of all items, in any order.
	Names(ctx context.Context) ([]string, error)
}

// ErrNoItem is returned for a store item that there is not.
var ErrNoItem = guixdb.ErrNoItem

// A Directory is a directory of narinfos, named HASH.narinfo, as [Items]: what a server has once
// said about items that are in a store.
type Directory string

// Item implements [Items].
func (d Directory) Item(_ context.Context, hashPart string) (*narinfo.Narinfo, error) {
	name := filepath.Join(string(d), hashPart+".narinfo")
	text, err := files.ReadRegular(name, narinfo.MaxSize)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s", ErrNoItem, hashPart)
	} else if err != nil {
		return nil, err
	}
	n, err := narinfo.Parse(text)
	if err == nil {
		err = n.CheckHash()
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return n, nil
}

// Names implements [Items].
func (d Directory) Names(ctx context.Context) (names []string, err error) {
	entries, err := os.ReadDir(string(d))
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if hashPart, ok := strings.CutSuffix(e.Name(), ".narinfo"); ok {
			n, err := d.Item(ctx, hashPart)
			if err != nil {
				return nil, err
			}
			names = append(names, filepath.Base(n.StorePath))
		}
	}
	return names, nil
}

// A Manifest is a list of items as [Items].
type Manifest map[string]*narinfo.Narinfo

// ParseManifest reads a manifest: records like those of narinfos, separated by empty lines, with
// the fields StorePath and References and, if they are known, NarHash, NarSize and Deriver. What is
// not known of an item is found out when the item is published.
func ParseManifest(text []byte) (Manifest, error) {
	m := Manifest{}
	for i, record := range bytes.Split(text, []byte("\n\n")) {
		record = bytes.TrimLeft(record, "\n")
		if len(record) == 0 {
			continue
		}
		// A narinfo says where the nar is too.
		record = append(bytes.TrimRight(record, "\n"), "\nURL: x\nCompression: none\n"...)
		n, err := narinfo.Parse(record)
		if err == nil && n.NarHash != "" {
			err = n.CheckHash()
		}
		if err != nil {
			return nil, fmt.Errorf("record %d: %w", i+1, err)
		}
		hashPart, _, _ := strings.Cut(filepath.Base(n.StorePath), "-")
		m[hashPart] = n
	}
	return m, nil
}

// Item implements [Items].
func (m Manifest) Item(_ context.Context, hashPart string) (*narinfo.Narinfo, error) {
	if n := m[hashPart]; n != nil {
		return n, nil
	}
	return nil, fmt.Errorf("%w: %s", ErrNoItem, hashPart)
}

// Closure returns the paths of items and of everything that they refer to, each after those that it
// refers to itself. Errors are those of items, which wrap [ErrNoItem] for what is not known.
func Closure(ctx context.Context, items Items, storeDir string, paths []string) ([]string, error) {
	var closure []string
	seen := map[string]bool{}
	var visit func(path string) error
	visit = func(path string) error {
		if seen[path] {
			return nil
		}
		if len(seen) == maxExported {
			return fmt.Errorf("more than %d items are too many", maxExported)
		}
		seen[path] = true
		hashPart, err := narinfo.HashPart(storeDir, path)
		if err != nil {
			return err
		}
		n, err := items.Item(ctx, hashPart)
		if err != nil {
			return err
		}
		for _, name := range n.References {
			if err := visit(storeDir + "/" + name); err != nil {
				return err
			}
		}
		closure = append(closure, path)
		return nil
	}
	for _, path := range paths {
		if err := visit(path); err != nil {
			return nil, err
		}
	}
	return closure, nil
}

// Names implements [Items].
func (m Manifest) Names(context.Context) (names []string, err error) {
	for _, n := range m {
		names = append(names, filepath.Base(n.StorePath))
	}
	return names, nil
}
