// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// maxLinks is how many links are followed from a file to a store item.
const maxLinks = 40

// findItem returns the store item that a person means: by its path or that of a file in it, by its
// name or its hash part, or by a link into the store, of a profile for example. For a hash part,
// the store and then the servers are looked through for the name.
func (s *settings) findItem(ctx context.Context, sub *session, text string) (string, error) {
	path := strings.TrimRight(text, "/")
	if !strings.Contains(path, "/") && len(path) >= 32 && narinfo.CheckStoreName(path[:32]+"-x") == nil {
		if _, err := os.Lstat(path); err != nil {
			return s.itemByHash(ctx, sub, path)
		}
	}
	for range maxLinks {
		absolute, err := filepath.Abs(path)
		if err != nil {
			return "", err
		}
		if inside, ok := strings.CutPrefix(absolute, s.store+"/"); ok {
			item, _, _ := strings.Cut(inside, "/")
			item = s.store + "/" + item
			return item, narinfo.CheckStorePath(s.store, item)
		}
		if path, err = os.Readlink(absolute); err != nil {
			break
		}
		if !filepath.IsAbs(path) {
			path = filepath.Join(filepath.Dir(absolute), path)
		}
	}
	// A link may stand anywhere in the name.
	real, err := filepath.EvalSymlinks(text)
	if err == nil && strings.HasPrefix(real, s.store+"/") {
		return s.findItem(ctx, sub, real)
	}
	return "", fmt.Errorf("%q is neither an item of the store directory %q, nor a link to one, nor a hash part (32 letters and digits)", text, s.store)
}

// itemByHash returns the item with the given name or hash part.
func (s *settings) itemByHash(ctx context.Context, sub *session, text string) (string, error) {
	if narinfo.CheckStoreName(text) == nil {
		return s.store + "/" + text, nil
	}
	if len(text) != 32 {
		return "", fmt.Errorf("%q is no name of a store item", text)
	}
	if found, _ := filepath.Glob(s.store + "/" + text + "-*"); len(found) > 0 {
		return found[0], nil
	}
	var failed []error
	for _, server := range s.serverURLs() {
		texts, err := narinfosFrom(ctx, sub.Mirrors, server, []string{text})
		failed = append(failed, err)
		if n, err := narinfo.Parse(texts[text]); err == nil && strings.HasPrefix(n.StorePath, s.store+"/"+text+"-") {
			return n.StorePath, nil
		}
	}
	err := errors.Join(failed...)
	if err == nil {
		err = fmt.Errorf("no server has it, and the store has no item of that name: %w", errUnavailable)
	}
	return "", fmt.Errorf("hash part %s: %w", text, err)
}
