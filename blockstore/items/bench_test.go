// SPDX-License-Identifier: GPL-3.0-or-later

package items

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
)

// BenchmarkServe restores an item over a Unix socket, by turns from the database and from the
// files. The result is what the files take, by what the database takes (ratio), and the memory and
// disk that the table takes.
func BenchmarkServe(b *testing.B) {
	for size, files := range map[string][2]int{"32KiB": {64, 4 << 20}, "1KiB": {8000, 8000}} {
		b.Run(size, func(b *testing.B) {
			root := b.TempDir()
			for i := range files[0] {
				name := filepath.Join(root, "item", fmt.Sprint(i))
				if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
					b.Fatal(err)
				}
				if err := os.WriteFile(name, random(uint64(i), files[1]), 0o644); err != nil {
					b.Fatal(err)
				}
			}
			store, err := blockstore.Open(b.TempDir(), blockstore.Options{})
			if err != nil {
				b.Fatal(err)
			}
			defer store.Close()
			pipeline := fetch.NewPipeline(b.Context(), store)
			encoding, err := publish.Encode(b.Context(), filepath.Join(root, "item"), pipeline.Put, erisfs.EncodeOptions{})
			if err != nil {
				b.Fatal(err)
			}
			if err := pipeline.Flush(); err != nil {
				b.Fatal(err)
			}
			directory := b.TempDir()
			table, err := Open(directory, root, b.Logf)
			if err != nil {
				b.Fatal(err)
			}
			before := memory()
			begin := time.Now()
			if err := table.Update(b.Context(), []string{"item"}); err != nil {
				b.Fatal(err)
			}
			b.Logf("made in %v; %d bytes of memory and %d on disk", time.Since(begin), memory()-before, table.Stats().Bytes)
			table.Close()
			begin = time.Now()
			table, err = Open(directory, root, b.Logf)
			if err != nil {
				b.Fatal(err)
			}
			defer table.Close()
			if err := table.Update(b.Context(), []string{"item"}); err != nil {
				b.Fatal(err)
			}
			b.Logf("opened in %v", time.Since(begin))
			sources := map[string]fetch.Source{"files": serve(b, table), "database": serve(b, store)}
			taken := map[string]time.Duration{}
			for b.Loop() {
				for name, source := range maps.All(sources) {
					begin := time.Now()
					restore(b, source, encoding)
					taken[name] += time.Since(begin)
				}
			}
			for name, t := range taken {
				b.ReportMetric(float64(encoding.NarSize)*float64(b.N)/t.Seconds()/1e6, name+"-MB/s")
			}
			b.ReportMetric(float64(taken["database"])/float64(taken["files"]), "ratio")
		})
	}
}

func memory() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// serve serves a source at a Unix socket, and returns a client of it.
func serve(b *testing.B, source fetch.Source) fetch.Source {
	server, err := coapserver.New(coapserver.Config{Resources: []coapserver.Resource{{Source: source}}})
	if err != nil {
		b.Fatal(err)
	}
	path := filepath.Join(b.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		b.Fatal(err)
	}
	go server.Serve(l, coapserver.Access{Get: true})
	b.Cleanup(func() { server.Close() })
	client, err := coap.Open("coap+unix://"+path, coap.Options{})
	if err != nil {
		b.Fatal(err)
	}
	p := pool.New([]pool.Member{{Source: client, Local: true}}, pool.Options{})
	b.Cleanup(func() { p.Close() })
	return p
}

// restore reads an item as who restores it does: it verifies and decrypts blocks, and hashes nodes.
func restore(b *testing.B, source fetch.Source, e publish.Encoding) {
	i, err := image.Open(b.Context(), source, e.Capability, erisfs.Limits{NarSize: e.NarSize}, fetch.Window{Requests: 256, Bytes: 8 << 20})
	if err != nil {
		b.Fatal(err)
	}
	nodes, closeNodes, err := i.Nodes(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	defer closeNodes()
	hash := sha256.New()
	if _, err := nar.Write(hash, nodes); err != nil {
		b.Fatal(err)
	}
	if !bytes.Equal(hash.Sum(nil), e.NarHash[:]) {
		b.Fatal("other contents")
	}
}
