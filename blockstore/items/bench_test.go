// SPDX-License-Identifier: GPL-3.0-or-later

package items

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
)

// BenchmarkServe gets an item, by turns from the database and from the files, over a Unix socket
// and by TCP: as who restores it does, and block by block, where blocks are verified and nothing
// else. The result is the throughput of the files by that of the database (ratio), and the memory
// and disk that the table takes.
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
			var mu sync.Mutex
			var blocks []*fetch.Request
			sink := func(ctx context.Context, ref eris.Reference, block []byte) error {
				mu.Lock()
				blocks = append(blocks, &fetch.Request{Pair: eris.Pair{Reference: ref}, Size: eris.BlockSize(len(block))})
				mu.Unlock()
				return pipeline.Put(ctx, ref, block)
			}
			encoding, err := publish.Encode(b.Context(), filepath.Join(root, "item"), sink, erisfs.EncodeOptions{})
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
				b.Run(network+"/item", func(b *testing.B) {
					compare(b, encoding.NarSize, files.pool, database.pool, func(s fetch.Source) { restore(b, s, encoding) })
				})
				b.Run(network+"/blocks", func(b *testing.B) {
					compare(b, encoding.NarSize, files.client, database.client, func(s fetch.Source) { getAll(b, s, blocks) })
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

// getAll gets blocks, 256 at a time, and verifies those that have come.
func getAll(b *testing.B, source fetch.Source, blocks []*fetch.Request) {
	const window = 256
	done := make(chan *fetch.Request, window)
	var come []*fetch.Request
	for next, left := 0, len(blocks); left > 0; left -= len(come) {
		for i := range max(len(come), min(window, len(blocks))-next) {
			if next == len(blocks) {
				break
			}
			r := blocks[next]
			next++
			r.Done = func(r *fetch.Request) { done <- r }
			if i < len(come) {
				r.Dst, come[i].Dst = come[i].Dst, nil
			}
			if cap(r.Dst) < int(r.Size) {
				r.Dst = make([]byte, 0, r.Size)
			}
			source.Start(r)
		}
		for come = append(come[:0], <-done); len(done) > 0; {
			come = append(come, <-done)
		}
		fetch.Verify(come)
		for _, r := range come {
			if r.Err != nil {
				b.Fatal(r.Err)
			}
		}
	}
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

// clients are a client of a server, and a pool with another one.
type clients struct{ client, pool fetch.Source }

// serve serves a source, and returns clients of it.
func serve(b *testing.B, network string, source fetch.Source) clients {
	server := coapserver.New(coapserver.Config{Source: source})
	address := map[string]string{"unix": filepath.Join(b.TempDir(), "s"), "tcp": "127.0.0.1:0"}[network]
	l, err := net.Listen(network, address)
	must(b, err)
	go server.Serve(l, coapserver.Access{Get: true})
	b.Cleanup(func() { server.Close() })
	var opened [2]fetch.Source
	for i := range opened {
		if opened[i], err = coap.Open("coap+"+network+"://"+l.Addr().String(), coap.Options{}); err != nil {
			b.Fatal(err)
		}
	}
	p := pool.New([]pool.Member{{Source: opened[1], Local: true}}, pool.Options{})
	b.Cleanup(func() {
		opened[0].Close()
		p.Close()
	})
	return clients{opened[0], p}
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
