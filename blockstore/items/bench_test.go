// SPDX-License-Identifier: GPL-3.0-or-later

package items

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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

// BenchmarkServe gets an item, by turns from the database and from the files, over a Unix socket
// and by TCP, as who restores it does. The result is the throughput of the files by that of the
// database (ratio), and the memory and disk that the table takes.
func BenchmarkServe(b *testing.B) {
	for size, files := range map[string][2]int{"32KiB": {64, 4 << 20}, "1KiB": {8000, 8000}} {
		b.Run(size, func(b *testing.B) {
			root := b.TempDir()
			for i := range files[0] {
				name := filepath.Join(root, "item", fmt.Sprint(i))
				must(b, os.MkdirAll(filepath.Dir(name), 0o755))
				must(b, os.WriteFile(name, random(uint64(i), files[1]), 0o644))
			}
			store, err := blockstore.Open(b.TempDir(), blockstore.Options{})
			must(b, err)
			defer store.Close()
			pipeline := fetch.NewPipeline(b.Context(), store)
			encoding, err := publish.Encode(b.Context(), filepath.Join(root, "item"), pipeline.Put, erisfs.EncodeOptions{})
			must(b, err)
			must(b, pipeline.Flush())
			directory := b.TempDir()
			table, err := Open(directory, root, b.Logf)
			must(b, err)
			before := memory()
			begin := time.Now()
			must(b, table.Update(b.Context(), []string{"item"}))
			b.Logf("made in %v; %d bytes of memory and %d on disk", time.Since(begin), memory()-before, table.Stats().Bytes)
			table.Close()
			begin = time.Now()
			table, err = Open(directory, root, b.Logf)
			must(b, err)
			defer table.Close()
			must(b, table.Update(b.Context(), []string{"item"}))
			b.Logf("opened in %v", time.Since(begin))
			for _, network := range []string{"unix", "tcp"} {
				files, database := serve(b, network, table), serve(b, network, store)
				b.Run(network, func(b *testing.B) {
					compare(b, encoding.NarSize, files, database, func(s fetch.Source) { restore(b, s, encoding) })
				})
			}
		})
	}
}

// compare measures what both sources take, by turns.
func compare(b *testing.B, bytes uint64, files, database fetch.Source, get func(fetch.Source)) {
	var taken, used [2]time.Duration
	for b.Loop() {
		for i, source := range []fetch.Source{files, database} {
			begin, before := time.Now(), processorTime()
			get(source)
			taken[i] += time.Since(begin)
			used[i] += processorTime() - before
		}
	}
	for i, unit := range []string{"files-MB/s", "database-MB/s"} {
		b.ReportMetric(float64(bytes)*float64(b.N)/taken[i].Seconds()/1e6, unit)
	}
	b.ReportMetric(float64(taken[1])/float64(taken[0]), "ratio")
	b.ReportMetric(float64(used[1])/float64(used[0]), "ratio-of-processor-time")
}

// processorTime returns how much time of all processors the process has used, which depends less on
// what else goes on.
func processorTime() time.Duration {
	var usage unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &usage)
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

func memory() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// serve serves a source, and returns a client of it.
func serve(b *testing.B, network string, source fetch.Source) fetch.Source {
	server := coapserver.New(coapserver.Config{Source: source})
	address := map[string]string{"unix": filepath.Join(b.TempDir(), "s"), "tcp": "127.0.0.1:0"}[network]
	l, err := net.Listen(network, address)
	must(b, err)
	go server.Serve(l, coapserver.Access{Get: true})
	b.Cleanup(func() { server.Close() })
	client, err := coap.Open("coap+"+network+"://"+l.Addr().String(), coap.Options{})
	must(b, err)
	p := pool.New([]pool.Member{{Source: client, Local: true}}, pool.Options{})
	b.Cleanup(func() { p.Close() })
	return p
}

// restore reads an item as who restores it does: it verifies and decrypts blocks, and hashes nodes.
func restore(b *testing.B, source fetch.Source, e publish.Encoding) {
	i, err := image.Open(b.Context(), source, e.Capability, erisfs.Limits{NarSize: e.NarSize}, fetch.Window{Requests: 256, Bytes: 8 << 20})
	must(b, err)
	nodes, closeNodes, err := i.Nodes(b.Context())
	must(b, err)
	defer closeNodes()
	hash := sha256.New()
	if _, err := nar.Write(hash, nodes); err != nil {
		b.Fatal(err)
	}
	if !bytes.Equal(hash.Sum(nil), e.NarHash[:]) {
		b.Fatal("other contents")
	}
}
