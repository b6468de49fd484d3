// SPDX-License-Identifier: GPL-3.0-or-later

package publish

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/delta"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// earlier is what an earlier export has: what is in a store that it was brought to.
type earlier map[string][]*narinfo.Narinfo // by name without version

// readEarlier reads the narinfos in a directory, which need not have any if it is one of an export;
// an empty one has nothing.
func readEarlier(ctx context.Context, directory, storeDir string) (earlier, error) {
	e := earlier{}
	if directory == "" {
		return e, nil
	}
	entries, err := os.ReadDir(directory)
	if err != nil {
		return nil, err
	}
	for i, entry := range entries {
		hash, ok := narinfoName(entry.Name())
		if !ok {
			continue
		}
		if i == maxExported {
			return nil, fmt.Errorf("%s: more than %d items are too many", directory, maxExported)
		}
		n, err := Directory(directory).Item(ctx, hash)
		if err != nil || narinfo.CheckStorePath(storeDir, n.StorePath) != nil || hashPartOf(n.StorePath) != hash {
			continue // it is no use there either
		}
		name := unversionedName(n)
		e[name] = append(e[name], n)
	}
	if _, err := os.Stat(filepath.Join(directory, "nix-cache-info")); err != nil && len(e) == 0 {
		return nil, fmt.Errorf("%s is no earlier export: it has no narinfos and no nix-cache-info", directory)
	}
	return e, nil
}

// has reports whether an item was there with the same contents.
func (e earlier) has(n *narinfo.Narinfo) bool {
	return slices.ContainsFunc(e[unversionedName(n)], func(had *narinfo.Narinfo) bool {
		return had.StorePath == n.StorePath && had.NarDigest == n.NarDigest
	})
}

func unversionedName(n *narinfo.Narinfo) string {
	return narinfo.UnversionedName(filepath.Base(n.StorePath))
}

// exportDelta exports an item of which the tree is at hand as a delta from an older one, in place
// of its blocks. It returns the line of the narinfo for the delta, or nothing if no delta is of
// use.
func (e *exporter) exportDelta(ctx context.Context, n *narinfo.Narinfo, tree string) (string, error) {
	limit := int64(0)
	for i, base := range e.earlier[unversionedName(n)] {
		baseTree := filepath.Join(e.o.Root, filepath.Base(base.StorePath))
		if i == maxBases {
			break
		}
		if base.StorePath == n.StorePath || check(ctx, baseTree, base) != nil {
			continue // it is not here, or is another one here
		}
		if limit == 0 {
			var err error
			if limit, err = usefulSize(ctx, tree); err != nil {
				return "", err
			}
		}
		place := "delta/" + hashPartOf(base.StorePath) + "/" + hashPartOf(n.StorePath)
		name := filepath.Join(e.o.Directory, place)
		if err := e.subdirectory(filepath.Dir(place)); err != nil {
			return "", err
		}
		size, err := writeDelta(ctx, name, baseTree, base, tree, n, limit)
		if errors.Is(err, delta.ErrTooLarge) {
			os.Remove(filepath.Dir(name)) // if it is empty
			continue
		} else if err != nil {
			return "", err
		}
		e.done.Bytes += size
		return narinfo.Delta{Base: filepath.Base(base.StorePath), Size: uint64(size), URL: place}.Text(), nil
	}
	return "", nil
}
