// SPDX-License-Identifier: GPL-3.0-or-later

package publish_test

import (
	"bytes"
	"compress/gzip"
	"encoding/hex"
	"os"
	"path/filepath"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
)

// TestRawFile gets a source by its hash. Its name in the store is that of the manual of Guix, and
// what "nix-store --print-fixed-path" says.
func TestRawFile(t *testing.T) {
	const (
		name = "hello-2.10.tar.gz"
		hash = "0ssi1wpaf7plaswqqjwigppsg5fyh99vdlb9kzl7c9lng89ndq1i"
		base = "hbdalsf5lpf01x4dcknwx6xbn6n5km6k-" + name
	)
	root := t.TempDir()
	items := manifest(t, "StorePath: /gnu/store/"+base+"\nReferences: \n")
	s := server(t, publish.ServerOptions{Root: root, Items: items, TTL: time.Hour})
	file := filepath.Join(root, base)
	url := s.URL + "/file/" + name + "/sha256/" + hash
	wantStatus(t, url, 404) // it has been deleted
	must(t, os.Symlink("/etc/passwd", file))
	wantStatus(t, url, 404)
	os.Remove(file)
	must(t, os.WriteFile(file, []byte("a source"), 0o444))
	header, body := wantStatus(t, url, 200)
	if header.Get("Content-Type") != "application/octet-stream" || header.Get("Cache-Control") != "max-age=3600" || body != "a source" {
		t.Errorf("header %v, body %q", header, body)
	}
	for _, path := range []string{
		"/file/" + name + "/sha256/1" + hash[1:], "/file/other/sha256/" + hash, "/file/" + name + "/sha256/" + hash[1:], "/file/" + name + "/sha256/x",
		"/file/..%2f" + name + "/sha256/" + hash, "/file/%00/sha256/" + hash, "/file/" + name + "/md5/" + hash, "/file/%2e%2e/sha256/" + hash,
	} {
		wantStatus(t, s.URL+path, 404)
	}
}

// TestLog gets build logs of an item and of a derivationtion.
func TestLog(t *testing.T) {
	const (
		item       = "00000000000000000000000000000001-hello"
		other      = "00000000000000000000000000000002-source"
		derivation = "abcdfghijklmnpqrsvwxyz0123456789-hello.drv"
	)
	items := manifest(t, "StorePath: /gnu/store/"+item+"\nReferences: \nDeriver: "+derivation+"\n\nStorePath: /gnu/store/"+other+"\nReferences: \n")
	logs := t.TempDir()
	s := server(t, publish.ServerOptions{Root: t.TempDir(), Items: items, LogDirectory: logs})
	wantStatus(t, s.URL+"/log/"+item, 404)
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	z.Write([]byte("it was built\n"))
	z.Close()
	must(t, os.Mkdir(logs+"/ab", 0o755))
	must(t, os.WriteFile(logs+"/ab/"+derivation[2:]+".gz", packed.Bytes(), 0o644))
	for _, name := range []string{item, derivation} {
		if _, body := wantStatus(t, s.URL+"/log/"+name, 200); body != "it was built\n" { // whatever the client could unpack
			t.Errorf("%s: %q", name, body)
		}
	}
	old, err := hex.DecodeString("425a6839314159265359c7c7a9c900000351800010400030240e80200031003020069ea250599c8937c5dc914e142431f1ea7240")
	must(t, err)
	os.Remove(logs + "/ab/" + derivation[2:] + ".gz")
	must(t, os.WriteFile(logs+"/ab/"+derivation[2:]+".bz2", old, 0o644))
	if _, body := wantStatus(t, s.URL+"/log/"+item, 200); body != "it was built\n" {
		t.Errorf("by bzip2: %q", body)
	}
	for _, name := range []string{other, "00000000000000000000000000000001-other", "x", "..%2f..%2fetc%2fpasswd", "00000000000000000000000000000000-x.drv"} {
		wantStatus(t, s.URL+"/log/"+name, 404)
	}
	wantStatus(t, server(t, publish.ServerOptions{Items: items}).URL+"/log/"+derivation, 404)
}

// TestRSA publishes with an RSA key, as old machines have.
func TestRSA(t *testing.T) {
	secret, err := os.ReadFile("../acl/testdata/rsa.sec")
	must(t, err)
	key, err := acl.ParseSigningKey(secret, nil)
	must(t, err)
	root, items := aStore(t)
	s := server(t, publish.ServerOptions{Root: root, Items: items, Key: key, Host: "old"})
	_, _, text := request(t, "GET", s.URL+"/00000000000000000000000000000001.narinfo")
	authorised(t, key, text)
	_, _, public := request(t, "GET", s.URL+"/signing-key.pub")
	if published, err := acl.ParsePublicKey([]byte(public)); err != nil || !acl.NewACL(key.PublicKey()).Contains(published) {
		t.Errorf("the key that is published is %q, error %v", public, err)
	}
}
