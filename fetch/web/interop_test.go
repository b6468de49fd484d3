// SPDX-License-Identifier: GPL-3.0-or-later

package web_test

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/httpserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/dir"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/web"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

// startNginx starts nginx with the given servers, one of which listens at the address, and returns
// its directory.
func startNginx(t *testing.T, address, servers string) (directory string) {
	nginx, err := exec.LookPath("nginx")
	if err != nil {
		t.Skip("nginx is not installed")
	}
	directory = t.TempDir()
	mustWriteCertificate(t, directory)
	configuration := `
daemon off; pid nginx.pid; error_log error.log; worker_processes 1; master_process off;
events { worker_connections 1024; }
http {
	access_log off; client_body_temp_path b; proxy_temp_path p; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
	` + servers + `
}`
	must(t, os.WriteFile(filepath.Join(directory, "nginx.conf"), []byte(configuration), 0o666))
	command := exec.Command(nginx, "-p", directory, "-c", "nginx.conf", "-e", filepath.Join(directory, "error.log"))
	must(t, command.Start())
	t.Cleanup(func() {
		command.Process.Kill()
		command.Wait()
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(directory, "error.log"))
			t.Logf("nginx says: %.4000s", log)
		}
	})
	for range 12000 {
		if conn, err := net.Dial("tcp", address); err == nil {
			conn.Close()
			return directory
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("nginx does not listen")
	return ""
}

func mustWriteCertificate(t *testing.T, directory string) {
	certificate := testhelp.Certificate()
	key, err := x509.MarshalPKCS8PrivateKey(certificate.PrivateKey)
	must(t, err)
	for name, block := range map[string]*pem.Block{
		"certificate.pem": {Type: "CERTIFICATE", Bytes: certificate.Certificate[0]},
		"key.pem":         {Type: "PRIVATE KEY", Bytes: key},
	} {
		must(t, os.WriteFile(filepath.Join(directory, name), pem.EncodeToMemory(block), 0o600))
	}
}

// roundTrips puts blocks into a store, many at a time, and gets them from another.
func roundTrips(t *testing.T, to fetch.Store, from fetch.Source) {
	t.Helper()
	for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
		var group sync.WaitGroup
		for i := range byte(200) {
			group.Go(func() {
				ref, block := newBlock(size, i)
				if err := to.Put(t.Context(), ref, block); err != nil {
					t.Error(err)
				}
				if got, err := fetch.Get(t.Context(), from, ref, size, nil); err != nil || !bytes.Equal(got, block) {
					t.Errorf("%v block from %v: %v", size, from, err)
				}
			})
		}
		group.Wait()
	}
	missing, _ := newBlock(eris.BlockSize1KiB, 250)
	if _, err := fetch.Get(t.Context(), from, missing, eris.BlockSize1KiB, nil); !errors.Is(err, eris.ErrNotFound) {
		t.Errorf("a block that is missing: %v", err)
	}
}

// TestNginxStatic has nginx serve a directory of blocks as docs/sources.md says: by HTTP/1.1 and
// HTTP/2, in both layouts, and with blocks put by WebDAV.
func TestNginxStatic(t *testing.T) {
	plain, secure := testhelp.FreeAddress(), testhelp.FreeAddress()
	directory := startNginx(t, plain, `
	server {
		listen `+plain+`;
		root blocks;
		location /dav/ { dav_methods PUT; create_full_put_path on; client_max_body_size 32k; }
	}
	server {
		listen `+secure+` ssl http2;
		ssl_certificate certificate.pem; ssl_certificate_key key.pem;
		root blocks;
	}`)
	blocks := filepath.Join(directory, "blocks")
	must(t, os.Mkdir(blocks, 0o777))
	for _, layout := range []string{"flat", "sharded"} {
		to, err := dir.Open("file:" + filepath.Join(blocks, layout) + "?layout=" + layout)
		must(t, err)
		defer to.Close()
		for _, url := range []string{"http://" + plain, "https://" + secure} {
			from := mustOpen(t, url+"/"+layout+"?static", web.Options{})
			roundTrips(t, to, from)
		}
		dav := mustOpen(t, "http://"+plain+"/dav/"+layout+"?static&layout="+layout, web.Options{})
		roundTrips(t, dav, dav)
	}
	readOnly := mustOpen(t, "https://"+secure+"/flat?static", web.Options{})
	ref, block := newBlock(eris.BlockSize1KiB, 1)
	if err := readOnly.Put(t.Context(), ref, block); !errors.Is(err, fetch.ErrReadOnly) {
		t.Errorf("Put: %v", err)
	}
}

// TestNginxProxy has nginx in front of our own server, as a site would have that offers TLS.
func TestNginxProxy(t *testing.T) {
	backend := sourcetest.NewBackend()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	server := httpserver.New(httpserver.Config{Source: newBackendSource(t, backend), Sink: backend.Put})
	var group sync.WaitGroup
	group.Go(func() { server.Serve(t.Context(), listener, httpserver.Access{Get: true, Put: true}) })
	t.Cleanup(group.Wait)
	plain, secure := testhelp.FreeAddress(), testhelp.FreeAddress()
	proxy := `location /eris/uri-res/ {
			proxy_pass http://` + listener.Addr().String() + `/uri-res/;
			proxy_http_version 1.1;
			proxy_set_header Connection "";
		}`
	startNginx(t, plain, `
	server { listen `+plain+`; `+proxy+` }
	server {
		listen `+secure+` ssl http2;
		ssl_certificate certificate.pem; ssl_certificate_key key.pem;
		`+proxy+`
	}`)
	for _, url := range []string{
		"http://" + plain + "/eris", "https://" + secure + "/eris/", "http://" + listener.Addr().String(), "http://" + listener.Addr().String() + "?h2c",
	} {
		store := mustOpen(t, url, web.Options{})
		roundTrips(t, store, store)
	}
}
