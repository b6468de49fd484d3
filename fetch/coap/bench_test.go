// SPDX-License-Identifier: GPL-3.0-or-later

package coap_test

import (
	"crypto/rand"
	"fmt"
	"syscall"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
)

// memory is a store in memory that, like a database, answers before Start returns.
type memory struct {
	fetch.Source
	blocks map[eris.Reference][]byte
}

func (m *memory) Start(r *fetch.Request) {
	r.Block, r.Err = m.blocks[r.Pair.Reference], nil
	r.Done(r)
}

// processorTime returns how much time of all processors the process has used. Unlike time on the
// wall, it does not depend much on what else goes on.
func processorTime() time.Duration {
	var usage syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &usage)
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// BenchmarkGet gets blocks through one connection, client and server in one process, without
// verification.
func BenchmarkGet(b *testing.B) {
	for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
		store := &memory{blocks: make(map[eris.Reference][]byte)}
		var refs []eris.Reference
		for range 256 {
			block := make([]byte, size)
			rand.Read(block)
			refs = append(refs, eris.Sum(block))
			store.blocks[eris.Sum(block)] = block
		}
		for _, v := range []struct {
			network string
			window  int
		}{{"unix", 1}, {"unix", 16}, {"unix", 256}, {"unix", 4096}, {"tcp", 256}, {"ws", 256}, {"udp", 16}} {
			b.Run(fmt.Sprintf("%v/%s/window=%d", size, v.network, v.window), func(b *testing.B) {
				client := mustOpen(b, startServer(b, v.network, store, readWrite).url(), coap.Options{})
				defer client.Close()
				b.SetBytes(int64(size))
				b.ReportAllocs()
				done := make(chan *fetch.Request, v.window)
				before := processorTime()
				b.ResetTimer()
				for i := range b.N {
					var r *fetch.Request
					if i < v.window {
						r = &fetch.Request{Size: size, Dst: make([]byte, 0, size), Done: func(r *fetch.Request) { done <- r }}
					} else if r = <-done; r.Err != nil {
						b.Fatal(r.Err)
					}
					r.Pair.Reference = refs[i%len(refs)]
					client.Start(r)
				}
				for range min(b.N, v.window) {
					<-done
				}
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "blocks/s")
				b.ReportMetric(float64(processorTime()-before)/float64(b.N), "cpu-ns/op")
			})
		}
	}
}
