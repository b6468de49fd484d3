// SPDX-License-Identifier: GPL-3.0-or-later

// Package interop_test puts and gets blocks between this program and other implementations of CoAP.
package interop_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/message/pool"
	"github.com/plgd-dev/go-coap/v3/mux"
	coapnet "github.com/plgd-dev/go-coap/v3/net"
	"github.com/plgd-dev/go-coap/v3/net/blockwise"
	"github.com/plgd-dev/go-coap/v3/options"
	"github.com/plgd-dev/go-coap/v3/tcp"
	"github.com/plgd-dev/go-coap/v3/udp"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
)

// blockCount is how many blocks of 32 KiB are put in each test.
const blockCount = 34

func newBlock() (eris.Reference, []byte) {
	block := make([]byte, eris.BlockSize32KiB)
	rand.Read(block)
	return eris.Sum(block), block
}

// serve serves a backend and returns the address.
func serve(t *testing.T, network string, backend *sourcetest.Backend) string {
	source := backend.Open(64)
	config := coapserver.Config{Source: source, Sink: source}
	// No answer comes apart, however busy the machine is: go-coap sends the next part with the
	// acknowledgement for it, which may carry no request (RFC 7252, section 4.2), and waits for ever.
	config.Datagram.AckDelay = time.Hour
	server := coapserver.New(config)
	access := coapserver.Access{Get: true, Put: true}
	var group sync.WaitGroup
	t.Cleanup(func() {
		server.Close()
		group.Wait()
		source.Close()
	})
	if network == "udp" {
		conn, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		group.Go(func() { server.ServePacket(conn, access) })
		return conn.LocalAddr().String()
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	group.Go(func() { server.Serve(listener, access) })
	return listener.Addr().String()
}

// parallel calls put for all blocks, so many at a time, and checks that all of them are there.
func parallel(t *testing.T, n int, put func(ctx context.Context, ref eris.Reference, block []byte) error, has func(eris.Reference) bool) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	var group sync.WaitGroup
	turns := make(chan struct{}, n)
	refs := make([]eris.Reference, blockCount)
	for i := range blockCount {
		ref, block := newBlock()
		refs[i] = ref
		turns <- struct{}{}
		group.Go(func() {
			defer func() { <-turns }()
			if err := put(ctx, ref, block); err != nil {
				t.Errorf("block %d: %v", i, err)
			}
		})
	}
	group.Wait()
	there := 0
	for _, ref := range refs {
		if has(ref) {
			there++
		}
	}
	if there != blockCount {
		t.Errorf("%d of %d blocks are there", there, blockCount)
	}
}

// TestGoCoAPClient puts blocks with clients of go-coap that have several transfers under way, with
// one limit of requests at a time, which is its default, and with a greater one.
func TestGoCoAPClient(t *testing.T) {
	for _, network := range []string{"tcp", "udp"} {
		for _, n := range []int{1, 4, 16} {
			for _, limit := range []int64{0, 64} {
				t.Run(fmt.Sprintf("%s/%d/limit=%d", network, n, limit), func(t *testing.T) {
					backend := sourcetest.NewBackend()
					put := dialGoCoAP(t, network, serve(t, network, backend), limit)
					parallel(t, n, func(ctx context.Context, _ eris.Reference, block []byte) error { return put(ctx, block) }, backend.Has)
				})
			}
		}
	}
}

// Usually go-coap waits for three seconds until the next part of a block: a busy machine may take
// longer.
var unhurried = options.WithBlockwise(true, blockwise.SZX1024, time.Minute)

func dialGoCoAP(t *testing.T, network, address string, limit int64) func(ctx context.Context, block []byte) error {
	const path = "/.well-known/eris/blocks"
	check := func(m *pool.Message, err error) error {
		if err == nil && m.Code() != codes.Created {
			err = fmt.Errorf("answer %v", m.Code())
		}
		return err
	}
	if network == "udp" {
		opts := []udp.Option{unhurried}
		if limit > 0 {
			opts = append(opts, options.WithLimitClientParallelRequest(limit), options.WithLimitClientEndpointParallelRequest(limit))
		}
		conn, err := udp.Dial(address, opts...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return func(ctx context.Context, block []byte) error {
			return check(conn.Put(ctx, path, message.AppOctets, bytes.NewReader(block)))
		}
	}
	opts := []tcp.Option{unhurried, options.WithMaxMessageSize(1152)}
	if limit > 0 {
		opts = append(opts, options.WithLimitClientParallelRequest(limit), options.WithLimitClientEndpointParallelRequest(limit))
	}
	conn, err := tcp.Dial(address, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return func(ctx context.Context, block []byte) error {
		return check(conn.Put(ctx, path, message.AppOctets, bytes.NewReader(block)))
	}
}

// TestGoCoAPServer puts blocks to a server made of go-coap.
func TestGoCoAPServer(t *testing.T) {
	for _, network := range []string{"tcp", "udp"} {
		for _, n := range []int{1, 4, 16} {
			t.Run(fmt.Sprintf("%s/%d", network, n), func(t *testing.T) {
				var mu sync.Mutex
				stored := make(map[eris.Reference]bool)
				url := serveGoCoAP(t, network, func(block []byte) {
					mu.Lock()
					defer mu.Unlock()
					stored[eris.Sum(block)] = true
				})
				store, err := coap.Open(url, coap.Options{})
				if err != nil {
					t.Fatal(err)
				}
				defer store.Close()
				parallel(t, n, store.Put, func(ref eris.Reference) bool {
					mu.Lock()
					defer mu.Unlock()
					return stored[ref]
				})
			})
		}
	}
}

func serveGoCoAP(t *testing.T, network string, stored func(block []byte)) (url string) {
	router := mux.NewRouter()
	router.DefaultHandle(mux.HandlerFunc(func(w mux.ResponseWriter, r *mux.Message) {
		block, err := r.ReadBody()
		code := codes.Created
		if err != nil || len(block) != int(eris.BlockSize32KiB) {
			code = codes.BadRequest
		} else {
			stored(block)
		}
		w.SetResponse(code, message.TextPlain, nil)
	}))
	var group sync.WaitGroup
	if network == "udp" {
		conn, err := coapnet.NewListenUDP("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		server := udp.NewServer(unhurried, options.WithMux(router))
		group.Go(func() { server.Serve(conn) })
		t.Cleanup(func() {
			server.Stop()
			group.Wait()
		})
		return "coap://" + conn.LocalAddr().String()
	}
	listener, err := coapnet.NewTCPListener("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := tcp.NewServer(unhurried, options.WithMux(router))
	group.Go(func() { server.Serve(listener) })
	t.Cleanup(func() {
		server.Stop()
		group.Wait()
	})
	return "coap+tcp://" + listener.Addr().String()
}

// node returns a command that runs a script, or skips the test if Node.js or its package coap is
// not installed.
func node(t *testing.T, args ...string) *exec.Cmd {
	program, err := exec.LookPath("node")
	if err != nil {
		t.Skip("node is not installed")
	}
	if _, err := os.Stat("node_modules/coap"); err != nil {
		t.Skip(`the package coap is not installed: run "npm ci" here`)
	}
	command := exec.CommandContext(t.Context(), program, args...)
	command.Stderr = os.Stderr
	return command
}

// TestNodeClient puts blocks with the client of the package coap for Node.js.
func TestNodeClient(t *testing.T) {
	for _, n := range []int{1, 4, 16} {
		t.Run(strconv.Itoa(n), func(t *testing.T) {
			backend := sourcetest.NewBackend()
			host, port, _ := net.SplitHostPort(serve(t, "udp", backend))
			out, err := node(t, "put.js", host, port, strconv.Itoa(blockCount), strconv.Itoa(n)).Output()
			if err != nil {
				t.Fatal(err)
			}
			there := make(map[string]bool)
			for _, block := range backend.All() {
				there[fmt.Sprintf("%x", sha256.Sum256(block))] = true
			}
			sums := strings.Fields(string(out))
			for _, sum := range sums {
				if !there[sum] {
					t.Error("a block that was answered by 2.01 is not there")
				}
			}
			if len(sums) != blockCount {
				t.Errorf("%d of %d blocks were taken", len(sums), blockCount)
			}
		})
	}
}

// TestNodeServer puts blocks to a server made of the package coap for Node.js.
func TestNodeServer(t *testing.T) {
	command := node(t, "serve.js")
	out, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	defer time.AfterFunc(5*time.Minute, func() { command.Process.Kill() }).Stop()
	lines := bufio.NewScanner(out)
	if !lines.Scan() {
		t.Fatal("the server does not start")
	}
	store, err := coap.Open("coap://127.0.0.1:"+lines.Text(), coap.Options{})
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	there := make(map[string]bool)
	sums := make(map[eris.Reference]string)
	for _, n := range []int{1, 4, 16} {
		put := func(ctx context.Context, ref eris.Reference, block []byte) error {
			mu.Lock()
			sums[ref] = fmt.Sprintf("%x", sha256.Sum256(block))
			mu.Unlock()
			return store.Put(ctx, ref, block)
		}
		parallel(t, n, put, func(ref eris.Reference) bool {
			for !there[sums[ref]] && lines.Scan() {
				there[lines.Text()] = true
			}
			return there[sums[ref]]
		})
	}
	store.Close()
	command.Process.Kill()
	command.Wait()
}

// TestGoCoAPHave has a client of go-coap ask our server what it has, and our client a server of
// go-coap, which does not know and says so.
func TestGoCoAPHave(t *testing.T) {
	backend := sourcetest.NewBackend()
	ref, block := newBlock()
	backend.Set(ref, block)
	question := append(make([]byte, fetch.HavePrefix), ref[:fetch.HavePrefix]...)
	type poster interface {
		Post(ctx context.Context, path string, format message.MediaType, payload io.ReadSeeker, opts ...message.Option) (*pool.Message, error)
	}
	for _, network := range []string{"tcp", "udp"} {
		var conn poster
		var err error
		if address := serve(t, network, backend); network == "tcp" {
			c, failed := tcp.Dial(address)
			conn, err = c, failed
			defer c.Close()
		} else {
			c, failed := udp.Dial(address)
			conn, err = c, failed
			defer c.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
		m, err := conn.Post(t.Context(), "/.well-known/eris/have", message.AppOctets, bytes.NewReader(question))
		if err != nil {
			t.Fatalf("%s: %v", network, err)
		}
		if answer, err := m.ReadBody(); err != nil || m.Code() != codes.Changed || !bytes.Equal(answer, []byte{0x40}) {
			t.Errorf("%s: %v, %x, %v", network, m.Code(), answer, err)
		}

		var stored atomic.Int32
		store, err := coap.Open(serveGoCoAP(t, network, func([]byte) { stored.Add(1) }), coap.Options{})
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		r := &fetch.Request{Have: question, Size: 1, Dst: make([]byte, 0, 1), Done: func(*fetch.Request) { close(done) }}
		store.Start(r)
		if <-done; !errors.Is(r.Err, fetch.ErrCannotSay) {
			t.Errorf("%s: %x, %v", network, r.Block, r.Err)
		}
		if err := store.Put(t.Context(), ref, block); err != nil || stored.Load() != 1 {
			t.Errorf("%s: %d blocks are stored, %v", network, stored.Load(), err)
		}
		store.Close()
	}
}
