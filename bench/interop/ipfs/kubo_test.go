// SPDX-License-Identifier: GPL-3.0-or-later

package interop

import (
	"bufio"
	"bytes"
	"errors"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/ipfs"
)

// startKubo starts a daemon that knows nobody, and returns the URLs of its RPC and its gateway.
func startKubo(t *testing.T, options ...string) (rpc, gateway string) {
	program, err := exec.LookPath("ipfs")
	if err != nil {
		t.Skip("Kubo is not installed (program ipfs)")
	}
	home := t.TempDir()
	environment := append(os.Environ(), "HOME="+home, "IPFS_PATH="+home, "IPFS_TELEMETRY=off")
	// This profile has addresses on the loopback interface only, and no peers to begin with.
	setup := exec.Command(program, "init", "--profile=test")
	setup.Env = environment
	if output, err := setup.CombinedOutput(); err != nil {
		t.Fatalf("ipfs init: %v\n%s", err, output)
	}
	daemon := exec.Command(program, append([]string{"daemon"}, options...)...)
	daemon.Env = environment
	output, err := daemon.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	t.Cleanup(func() {
		daemon.Process.Kill()
		group.Wait()
		daemon.Wait()
	})
	lines := bufio.NewScanner(output)
	var said strings.Builder
	for {
		if !lines.Scan() {
			t.Fatalf("ipfs daemon has ended:\n%s", said.String())
		}
		said.WriteString(lines.Text() + "\n")
		if strings.Contains(lines.Text(), "Daemon is ready") {
			break
		}
	}
	group.Go(func() {
		for lines.Scan() {
		}
	})
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(home, name))
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}
	port := read("api") // /ip4/127.0.0.1/tcp/PORT
	return "http://127.0.0.1:" + port[strings.LastIndexByte(port, '/')+1:], read("gateway")
}

// TestKubo puts blocks to the usual daemon by its RPC, and gets them from there and from its
// gateway.
func TestKubo(t *testing.T) {
	rpcURL, gatewayURL := startKubo(t, "--offline")
	target, err := url.Parse(rpcURL)
	if err != nil {
		t.Fatal(err)
	}
	// Daemons from before Kubo 0.11 are sent "format" when they refuse "cid-codec"; this one is not
	// one of them.
	var old atomic.Bool
	proxy := httptest.NewServer(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		old.CompareAndSwap(false, r.In.URL.Query().Has("format"))
		r.SetURL(target)
	}})
	t.Cleanup(proxy.Close)
	rpc := open(t, "ipfs+"+proxy.URL+"?rpc", ipfs.Options{})
	gateway := open(t, "ipfs+"+gatewayURL, ipfs.Options{})
	var group sync.WaitGroup
	for i := range 100 {
		size := eris.BlockSize1KiB
		if i%4 == 0 {
			size = eris.BlockSize32KiB
		}
		block := bytes.Repeat([]byte{byte(i), 1, 2, 3}, int(size)/4)
		ref := eris.Sum(block)
		group.Go(func() {
			for range 2 { // a block that is there already may be put again
				if err := rpc.Put(t.Context(), ref, block); err != nil {
					t.Errorf("Put: %v", err)
					return
				}
			}
			for _, store := range []*ipfs.Store{rpc, gateway} {
				if got, err := get(t, store, ref, size); err != nil || !bytes.Equal(got, block) {
					t.Errorf("Get: %v", err)
				}
			}
		})
	}
	group.Wait()
	if old.Load() {
		t.Error("the daemon is taken for an old one")
	}
	for _, store := range []*ipfs.Store{rpc, gateway} {
		if _, err := get(t, store, eris.Sum([]byte("absent")), eris.BlockSize1KiB); !errors.Is(err, eris.ErrNotFound) {
			t.Errorf("error is %v, not that the block is missing", err)
		}
	}
	if err := gateway.Put(t.Context(), eris.Sum(make([]byte, 1024)), make([]byte, 1024)); !errors.Is(err, fetch.ErrReadOnly) {
		t.Errorf("error is %v, not that a gateway takes no blocks", err)
	}
}
