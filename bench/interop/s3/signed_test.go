// SPDX-License-Identifier: GPL-3.0-or-later

package interop

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/rclone/gofakes3"
	"github.com/rclone/gofakes3/s3mem"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/content"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/packs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/web"
)

// TestSigned puts a pack into a bucket of a server that verifies signatures, and gets it; with
// another key it does neither.
func TestSigned(t *testing.T) {
	memory := s3mem.New()
	if err := memory.CreateBucket(t.Context(), "blocks"); err != nil {
		t.Fatal(err)
	}
	faker := gofakes3.New(memory, gofakes3.WithV4Auth(map[string]string{"KEY": "the secret"}))
	server := httptest.NewServer(faker.Server())
	defer server.Close()
	store := "s3://blocks/a%20prefix/b?endpoint=" + url.QueryEscape(server.URL)
	random := make([]byte, 12e6)
	rand.NewChaCha8([32]byte{1}).Read(random)
	put := func() (c eris.ReadCapability, err error) {
		s, err := packs.Open(store, web.Options{})
		if err != nil {
			return c, err
		}
		defer s.Close()
		if c, err = eris.Encode(t.Context(), bytes.NewReader(random), s.Put, eris.EncodeOptions{}); err != nil {
			return c, err
		}
		return c, s.Finish(t.Context(), []eris.ReadCapability{c})
	}
	get := func(c eris.ReadCapability) ([]byte, error) {
		s, err := packs.Open(store, web.Options{})
		if err != nil {
			return nil, err
		}
		defer s.Close()
		r, err := content.Open(t.Context(), fetch.Within(s, c.Root, nil), c, int64(len(random)), fetch.Window{})
		if err != nil {
			return nil, err
		}
		defer r.Close()
		return io.ReadAll(r)
	}
	t.Setenv("AWS_ACCESS_KEY_ID", "KEY")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "the secret")
	c, err := put()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := get(c); err != nil || !bytes.Equal(got, random) {
		t.Errorf("%d of %d bytes: %v", len(got), len(random), err)
	}
	t.Setenv("AWS_SECRET_ACCESS_KEY", "wrong")
	if _, err := put(); err == nil || !strings.Contains(err.Error(), "SignatureDoesNotMatch") || strings.Contains(err.Error(), "prefix") {
		t.Errorf("with a wrong key: %v", err)
	}
	if _, err := get(c); err == nil {
		t.Error("a wrong key gets a pack")
	}
}
