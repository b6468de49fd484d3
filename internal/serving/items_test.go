// SPDX-License-Identifier: GPL-3.0-or-later

package serving

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/items"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
)

var must = testhelp.Must

// TestSharing has a block in the store, one in an item, and one nowhere.
func TestSharing(t *testing.T) {
	root := t.TempDir()
	must(t, os.WriteFile(filepath.Join(root, "item"), []byte("contents"), 0o644))
	store, err := blockstore.Open(t.TempDir(), blockstore.Options{})
	must(t, err)
	table, err := items.Open(t.TempDir(), root, t.Logf)
	must(t, err)
	defer table.Close()
	s := sharing{store, table}
	defer s.Close()
	must(t, table.Update(t.Context(), []string{"item"}))
	block := make([]byte, eris.BlockSize1KiB)
	stored := eris.Sum(block)
	must(t, s.Put(t.Context(), stored, block))
	e, err := publish.Encode(t.Context(), filepath.Join(root, "item"), nil, erisfs.EncodeOptions{})
	must(t, err)
	var question []byte
	for i, ref := range []eris.Reference{stored, e.Capability.Root, {1}} {
		_, err := fetch.Get(t.Context(), s, ref, eris.BlockSize1KiB, nil)
		if i < 2 && err != nil || i == 2 && !errors.Is(err, eris.ErrNotFound) {
			t.Errorf("block %d: %v", i, err)
		}
		question = append(question, ref[:fetch.HavePrefix]...)
	}
	if answer := s.Have(question); len(answer) != 1 || answer[0] != 0b1100_0000 {
		t.Errorf("it says that it has %b", answer)
	}
}
