// SPDX-License-Identifier: GPL-3.0-or-later

package web_test

import (
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/httpserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/web"
)

// BenchmarkGet gets blocks from our own server in the same process, 256 calls at a time.
func BenchmarkGet(b *testing.B) {
	backend := sourcetest.NewBackend()
	refs := map[eris.BlockSize][]eris.Reference{}
	for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
		for i := range byte(200) {
			ref, block := newBlock(size, i)
			backend.Set(ref, block)
			refs[size] = append(refs[size], ref)
		}
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(b, err)
	server := httpserver.New(httpserver.Config{Source: newBackendSource(b, backend)})
	var serving sync.WaitGroup
	serving.Go(func() { server.Serve(b.Context(), listener, httpserver.Access{Get: true}) })
	b.Cleanup(serving.Wait)
	secure := startServer(b, serve("", backend, false), "http/1.1", "h2")
	for _, url := range []string{"http://" + listener.Addr().String(), "http://" + listener.Addr().String() + "?h2c", secure.url("")} {
		for size, refs := range refs {
			name := url[:strings.Index(url, ":")]
			if strings.HasSuffix(url, "?h2c") {
				name = "h2c"
			}
			b.Run(fmt.Sprintf("%s/%v", name, size), func(b *testing.B) {
				store := mustOpen(b, url, web.Options{})
				defer store.Close()
				b.SetBytes(int64(size))
				b.ReportAllocs()
				var next atomic.Int64
				var group sync.WaitGroup
				for range 256 {
					group.Go(func() {
						memory := make([]byte, 0, size)
						for n := next.Add(1); n <= int64(b.N); n = next.Add(1) {
							if _, err := fetch.Get(b.Context(), store, refs[n%int64(len(refs))], size, memory); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				group.Wait()
			})
		}
	}
}
