// SPDX-License-Identifier: GPL-3.0-or-later

package interop_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/mux"
	"github.com/plgd-dev/go-coap/v3/options"
	"github.com/plgd-dev/go-coap/v3/tcp"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/peers"
	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// TestGoCoAPPeer gets blocks from clients of go-coap that have connected, and answer GETs: with
// whole blocks, and in parts of 1 KiB. They know nothing of sizes and of Hop-Limit.
func TestGoCoAPPeer(t *testing.T) {
	for _, test := range []struct {
		name string
		opts []tcp.Option
	}{
		{"whole", nil},
		{"parts", []tcp.Option{options.WithMaxMessageSize(1152)}},
	} {
		t.Run(test.name, func(t *testing.T) {
			blocks := map[string][]byte{}
			var refs []eris.Reference
			for i := range 2 * blockCount {
				block := make([]byte, []eris.BlockSize{eris.BlockSize32KiB, eris.BlockSize1KiB}[i%2])
				rand.Read(block)
				refs = append(refs, eris.Sum(block))
				blocks[eris.Sum(block).String()] = block
			}
			router := mux.NewRouter()
			var asked atomic.Int32
			if err := router.Handle("/.well-known/eris/blocks", mux.HandlerFunc(func(w mux.ResponseWriter, r *mux.Message) {
				asked.Add(1)
				queries, err := r.Queries()
				block, ok := blocks[queries[0]]
				if err != nil || !ok || r.Code() != codes.GET {
					w.SetResponse(codes.NotFound, message.TextPlain, nil)
					return
				}
				w.SetResponse(codes.Content, message.AppOctets, bytes.NewReader(block))
			})); err != nil {
				t.Fatal(err)
			}
			g := peers.New(func(host string, err error) { t.Errorf("%s: %v", host, err) })
			source := g.Source()
			server := coapserver.New(coapserver.Config{})
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			var group sync.WaitGroup
			joined := make(chan struct{})
			group.Go(func() {
				server.Serve(listener, coapserver.Access{Get: true, Connected: func(conn *wire.Conn, host string) func() {
					defer close(joined)
					return g.Join(conn, host)
				}})
			})
			conn, err := tcp.Dial(listener.Addr().String(), append(test.opts, options.WithMux(router))...)
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				source.Close()
				conn.Close()
				server.Close()
				group.Wait()
			}()
			<-joined
			// What has another size is no lie.
			if _, err := fetch.Get(t.Context(), source, refs[1], eris.BlockSize32KiB, nil); !errors.Is(err, eris.ErrNotFound) {
				t.Errorf("a block of another size: %v", err)
			}
			if _, err := fetch.Get(t.Context(), source, eris.Reference{}, eris.BlockSize32KiB, nil); !errors.Is(err, eris.ErrNotFound) {
				t.Errorf("a block that is not there: %v", err)
			}
			var gets sync.WaitGroup
			for _, ref := range refs {
				want := blocks[ref.String()]
				gets.Go(func() {
					got, err := fetch.Get(t.Context(), source, ref, eris.BlockSize(len(want)), nil)
					// A peer that gets no processor for half a second rests for a while.
					for try := 0; errors.Is(err, eris.ErrNotFound) && try < 600; try++ {
						time.Sleep(100 * time.Millisecond)
						got, err = fetch.Get(t.Context(), source, ref, eris.BlockSize(len(want)), nil)
					}
					if err != nil || !bytes.Equal(got, want) {
						t.Errorf("%d bytes, %v", len(got), err)
					}
				})
			}
			gets.Wait()
			if n := asked.Load(); n < int32(len(refs)) {
				t.Errorf("the peer was asked %d times", n)
			}
		})
	}
}
