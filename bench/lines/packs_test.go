// SPDX-License-Identifier: GPL-3.0-or-later

package lines

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/bench/lines/link"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/content"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/packs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/web"
)

// startNginx serves a directory, and returns the address and the log of requests.
func startNginx(b *testing.B, root string) (address, log string) {
	program, err := exec.LookPath("nginx")
	if err != nil {
		b.Skip("nginx is not installed")
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	address = free.Addr().String()
	free.Close()
	directory := b.TempDir()
	log = filepath.Join(directory, "access.log")
	configuration := filepath.Join(directory, "nginx.conf")
	text := fmt.Sprintf(`daemon off; worker_processes 1; pid %[1]s/pid; error_log /dev/null;
events {}
http {
	access_log %[1]s/access.log; sendfile on; client_body_temp_path %[1]s; proxy_temp_path %[1]s; fastcgi_temp_path %[1]s;
	uwsgi_temp_path %[1]s; scgi_temp_path %[1]s;
	server { listen %[2]s; root %[3]s; }
}`, directory, address, root)
	if os.Geteuid() == 0 { // or it would serve as a user who may not read temporary directories
		text = "user root; " + text
	}
	if err := os.WriteFile(configuration, []byte(text), 0o666); err != nil {
		b.Fatal(err)
	}
	server := exec.Command(program, "-p", directory, "-c", configuration)
	if err := server.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		server.Process.Signal(os.Interrupt)
		server.Wait()
	})
	for range 500 {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
			return address, log
		}
		time.Sleep(10 * time.Millisecond)
	}
	b.Fatal("nginx does not listen")
	return "", ""
}

// BenchmarkPack reads a content of 200 MB from a pack that nginx serves at the other end of a line
// of 1 Gbit/s with 100 ms, cold. It reports the share of the line, connecting included, and the
// requests.
func BenchmarkPack(b *testing.B) {
	const length, rate = 200e6, 125e6
	directory := b.TempDir()
	store, err := packs.Open("file:"+directory+"?packed", web.Options{})
	if err != nil {
		b.Fatal(err)
	}
	random := io.LimitReader(rand.NewChaCha8([32]byte{7}), length)
	c, err := eris.Encode(b.Context(), random, store.Put, eris.EncodeOptions{})
	if err == nil {
		err = store.Finish(context.Background(), []eris.ReadCapability{c})
	}
	if err != nil {
		b.Fatal(err)
	}
	store.Close()
	address, log := startNginx(b, directory)
	up, down := link.Symmetric(100*time.Millisecond, rate)
	line, err := link.New("tcp", "", address, up, down)
	if err != nil {
		b.Fatal(err)
	}
	defer line.Close()
	share := func(b *testing.B, read func(b *testing.B) (int64, error)) {
		before, _ := os.ReadFile(log)
		for b.Loop() {
			if n, err := read(b); n < length || err != nil {
				b.Fatal(n, err)
			}
		}
		after, _ := os.ReadFile(log)
		b.ReportMetric(length/rate/(b.Elapsed().Seconds()/float64(b.N)), "of-line")
		b.ReportMetric(float64(bytes.Count(after[len(before):], []byte("\n")))/float64(b.N), "requests/op")
	}
	b.Run("pack", func(b *testing.B) {
		share(b, func(b *testing.B) (int64, error) { return readPack(b, "http://"+line.Addr()+"?packed", c, length) })
	})
	// What the machine can do: one request for the file.
	b.Run("plain", func(b *testing.B) {
		share(b, func(b *testing.B) (int64, error) {
			r, err := http.Get("http://" + line.Addr() + "/" + c.Root.String() + ".cbor")
			if err != nil {
				return 0, err
			}
			defer http.DefaultClient.CloseIdleConnections()
			defer r.Body.Close()
			return io.Copy(io.Discard, r.Body)
		})
	})
}

// readPack reads a content from a pack, and returns its length.
func readPack(b *testing.B, url string, c eris.ReadCapability, length int64) (int64, error) {
	source, err := packs.Open(url, web.Options{})
	if err != nil {
		return 0, err
	}
	blocks := pool.New([]pool.Member{{Source: source}}, pool.Options{})
	defer blocks.Close()
	r, err := content.Open(b.Context(), fetch.Within(blocks, c.Root, nil), c, length, blocks.Window())
	if err != nil {
		return 0, err
	}
	defer r.Close()
	return io.Copy(io.Discard, r)
}
