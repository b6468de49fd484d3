// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
)

// wire counts the bytes that a server writes to its connections, which wait until they may go.
type wire struct {
	net.Listener
	sent atomic.Int64
	may  func(sent int64) bool
}

func (w *wire) Accept() (net.Conn, error) {
	c, err := w.Listener.Accept()
	if err != nil {
		return nil, err
	}
	// What waits in buffers has been sent, but has not arrived.
	c.(*net.TCPConn).SetWriteBuffer(64 << 10)
	return &countedConn{c, w}, nil
}

type countedConn struct {
	net.Conn
	wire *wire
}

func (c *countedConn) Write(b []byte) (int, error) {
	for !c.wire.may(c.wire.sent.Load()) {
		time.Sleep(time.Millisecond)
	}
	n, err := c.Conn.Write(b)
	c.wire.sent.Add(int64(n))
	return n, err
}

// serveCounted is serve with a store in this process, whose wire is counted and carries so many
// bytes per second, as long as it may.
func (c *chain) serveCounted(items string, rate int64, may func(sent int64) bool) (*blockstore.Store, *wire) {
	c.t.Helper()
	store, err := blockstore.Open(c.directory+"/blocks", blockstore.Options{})
	must(c.t, err)
	c.t.Cleanup(func() { store.Close() })
	server := coapserver.New(coapserver.Config{Source: store, Sink: store})
	listener, err := net.Listen("tcp", "127.0.0.1:0") // not a near one, of which nothing is kept
	must(c.t, err)
	w := &wire{Listener: listener, may: may}
	var served sync.WaitGroup
	served.Go(func() {
		server.Serve(ratelimit.Listener(w, ratelimit.New(rate, 0)), coapserver.Access{Get: true, Put: true})
	})
	c.t.Cleanup(func() {
		listener.Close()
		server.Close()
		served.Wait()
	})
	c.stores["coap+tcp"] = "coap+tcp://" + listener.Addr().String()
	c.publish("--cache="+c.directory+"/published", "--eris="+c.stores["coap+tcp"], "--cache-bypass-threshold=4000000000", items)
	return store, w
}

// TestResume kills a helper when half of the bytes of an item have crossed the wire. The next one
// fetches only what is missing: of 200 MB at most 55 %, which is half and 10 MB that were on their
// way. After that nothing crosses the wire. With ERIS_BIG_TESTS=1 the item does have 200 MB.
func TestResume(t *testing.T) {
	t.Parallel()
	size, rate := int64(40e6), int64(10e6)
	if big, _ := strconv.ParseBool(os.Getenv("ERIS_BIG_TESTS")); big {
		size, rate = 200e6, 30e6
	}
	// Nothing is sent that would be so far ahead of what is kept, lest a slow disk be tested: some
	// is kept later, of which more would be dropped.
	const onTheWay, ahead = 10e6, 6e6
	c := newChain(t)
	c.configure("policy = \"eris-only\"\n") // and a cache, as if nothing were said of one
	random := rand.NewChaCha8([32]byte{2})
	c.generated("large", func(root string) {
		for i := range 200 { // small blocks as well
			c.pseudorandom(fmt.Sprintf("%s/%d", root, i), random, int64(i)*80)
		}
		c.pseudorandom(root+"/large", random, size)
	})
	var begin, most atomic.Int64 // of what is sent
	most.Store(math.MaxInt64)
	store, wire := c.serveCounted(c.manifest(), rate, func(sent int64) bool {
		return sent < most.Load() && sent-begin.Load() < c.kept()+ahead || t.Context().Err() != nil
	})
	c.query()
	stats := store.Stats()
	total, blocks := stats.Bytes, stats.Blocks1KiB+stats.Blocks32KiB
	if total < size {
		t.Fatalf("%d bytes", total)
	}
	before := wire.sent.Load()
	begin.Store(before)
	most.Store(before + total/2)
	d := c.start("substitute", c.stores["coap+tcp"])
	fmt.Fprintf(d.stdin, "substitute %s %s/killed\n", c.items[0].path, c.directory)
	eventually(t, "half of the item does not cross the wire", func() bool { return wire.sent.Load() >= most.Load() })
	must(t, d.cmd.Process.Kill())
	if err := d.close(); err == nil || d.cmd.ProcessState.Exited() {
		t.Fatalf("the helper was not killed: %v\n%s", err, d.log.String())
	}
	most.Store(math.MaxInt64)
	crossed := func() int64 {
		sent := wire.sent.Load()
		n := sent - before
		before = sent
		begin.Store(sent - c.kept())
		return n
	}
	first, given := crossed(), store.Stats().Hits
	c.substitute(c.stores["coap+tcp"])
	second := crossed()
	t.Logf("of %d bytes %d had crossed the wire when the helper was killed, then %d (%.1f %%); of %d blocks %d were asked for again",
		total, first, second, 100*float64(second)/float64(total), blocks, store.Stats().Hits-given)
	if second > total/2+onTheWay {
		t.Errorf("%d bytes of %d crossed the wire again after %d had been there", second, total, first)
	}
	if first < total/2 || first > total*3/4 {
		t.Errorf("the helper was killed after %d bytes of %d", first, total)
	}
	c.substitute(c.stores["coap+tcp"])
	if third := crossed(); third > total/10 {
		t.Errorf("%d bytes of %d crossed the wire once more", third, total)
	}
}

// kept returns how many bytes of blocks helpers have kept, as the file of the cache counts them.
func (c *chain) kept() int64 {
	f, err := os.Open(c.directory + "/cache/guix/substitute-eris/blocks/blocks")
	if err != nil {
		return 0
	}
	defer f.Close()
	var units [8]byte
	f.ReadAt(units[:], 64)
	return int64(binary.LittleEndian.Uint64(units[:])) << 10
}
