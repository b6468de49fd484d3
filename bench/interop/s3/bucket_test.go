// SPDX-License-Identifier: GPL-3.0-or-later

package interop

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"os"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/web"
)

func open(t *testing.T, url string) *web.Store {
	t.Helper()
	store, err := web.Open(url, web.Options{Getenv: func(string) string { return "" }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	return store
}

func get(t *testing.T, store *web.Store, ref eris.Reference, size eris.BlockSize) ([]byte, error) {
	return fetch.Get(t.Context(), store, ref, size, nil)
}

func newBlock(size eris.BlockSize, n byte) (eris.Reference, []byte) {
	block := bytes.Repeat([]byte{n, 1, 2, 3}, int(size)/4)
	return eris.Sum(block), block
}

// TestBucket uses the bucket that BUCKET_URL names, which is to be open for reading and writing.
func TestBucket(t *testing.T) {
	bucket := os.Getenv("BUCKET_URL")
	if bucket == "" {
		t.Skip("BUCKET_URL names no bucket; see .ci/interop-s3")
	}
	for _, query := range []string{"?static", "?static&layout=flat", "/prefix?static&layout=sharded"} {
		store := open(t, bucket+query)
		for n := range byte(20) {
			for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
				ref, block := newBlock(size, n)
				if err := store.Put(t.Context(), ref, block); err != nil {
					t.Fatalf("%s: Put: %v", query, err)
				}
				if got, err := get(t, store, ref, size); err != nil || !bytes.Equal(got, block) {
					t.Fatalf("%s: Get: %v", query, err)
				}
			}
		}
		missing, _ := newBlock(eris.BlockSize1KiB, 250)
		if _, err := get(t, store, missing, eris.BlockSize1KiB); !errors.Is(err, eris.ErrNotFound) {
			t.Errorf("%s: error is %v, not that the block is missing", query, err)
		}
	}
	// What another program has uploaded, as "aws s3 sync" does for each file of a directory.
	ref, block := newBlock(eris.BlockSize32KiB, 251)
	name := bucket + "/synced/" + ref.String()[:2] + "/" + ref.String()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPut, name, bytes.NewReader(block))
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(response.Body)
	response.Body.Close()
	if response.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s", response.Status, body)
	}
	if got, err := get(t, open(t, bucket+"/synced?static"), ref, eris.BlockSize32KiB); err != nil || !bytes.Equal(got, block) {
		t.Error(err)
	}
}
