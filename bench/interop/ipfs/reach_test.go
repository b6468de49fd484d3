// SPDX-License-Identifier: GPL-3.0-or-later

package interop

import (
	"encoding/json"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/bench/lines/link"
)

// call calls the RPC of a daemon.
func call(t *testing.T, rpc, path string, answer any) {
	t.Helper()
	response, err := http.Post(rpc+"/api/v0/"+path, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s", path, response.Status)
	}
	if err := json.NewDecoder(response.Body).Decode(answer); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
}

// connect connects a daemon to another one by a line with a round-trip time.
func connect(t *testing.T, from, to string, roundTrip time.Duration) {
	var identity struct {
		ID        string
		Addresses []string // /ip4/127.0.0.1/tcp/PORT/p2p/ID
	}
	call(t, to, "id", &identity)
	parts := strings.Split(identity.Addresses[0], "/")
	if len(parts) < 5 || parts[3] != "tcp" {
		t.Fatalf("the daemon has the address %s", identity.Addresses[0])
	}
	up, down := link.Symmetric(roundTrip, 0)
	line, err := link.New("tcp", "", parts[2]+":"+parts[4], up, down)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { line.Close() })
	_, port, _ := strings.Cut(line.Addr(), ":")
	var answer any
	call(t, from, "swarm/connect?arg="+url.QueryEscape("/ip4/127.0.0.1/tcp/"+port+"/p2p/"+identity.ID), &answer)
}

// TestReach has the program fetch an item from daemons that have none of its blocks: they get them
// from the one that has, or find that one by the DHT of a third.
func TestReach(t *testing.T) {
	publisher, near := startKubo(t, "--routing=dhtserver")
	third, _ := startKubo(t, "--routing=dhtserver")
	connect(t, publisher, third, 0)
	directory := t.TempDir()
	program := filepath.Join(directory, "guix-substitute-eris")
	build := exec.Command("go", "build", "-o", program, "./cmd/guix-substitute-eris")
	build.Dir = "../../.." // another module
	if output, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, output)
	}
	run := func(args ...string) string {
		output, err := exec.Command(program, args...).Output()
		if err != nil {
			t.Fatalf("%s: %v", args[0], err)
		}
		return strings.TrimSpace(string(output))
	}
	contents := make([]byte, 20<<20)
	rand.NewChaCha8([32]byte{}).Read(contents)
	item := filepath.Join(directory, "item")
	if err := os.WriteFile(item, contents, 0o666); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	urn := run("encode", "--store=ipfs+"+publisher+"?rpc", item)
	t.Logf("put in %v", time.Since(began))

	var requests atomic.Int64
	fetch := func(gateway string) {
		target, err := url.Parse(gateway)
		if err != nil {
			t.Fatal(err)
		}
		requests.Store(0)
		proxy := httptest.NewServer(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
			requests.Add(1)
			r.SetURL(target)
		}})
		defer proxy.Close()
		out := filepath.Join(t.TempDir(), "out")
		began := time.Now()
		run("decode", "--store=ipfs+"+proxy.URL, urn, out)
		t.Logf("fetched in %v with %d requests", time.Since(began), requests.Load())
		if got, err := os.ReadFile(out); err != nil || string(got) != string(contents) {
			t.Errorf("what came is not what was put: %v", err)
		}
	}
	t.Run("from the node that has it", func(t *testing.T) { fetch(near) })
	for _, c := range []struct {
		name, routing, neighbour string
		roundTrip                time.Duration
	}{
		{"from a node that is connected to it", "none", publisher, 0},
		{"from one that is 50 ms away", "none", publisher, 50 * time.Millisecond},
		{"from one that knows a third one", "dhtserver", third, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			rpc, gateway := startKubo(t, "--routing="+c.routing)
			connect(t, rpc, c.neighbour, c.roundTrip)
			fetch(gateway)
			var exchanged struct{ BlocksReceived, DupBlksReceived, MessagesReceived int64 }
			call(t, rpc, "bitswap/stat", &exchanged)
			t.Logf("the node received %+v", exchanged)
			if exchanged.BlocksReceived < requests.Load() {
				t.Error("the node has not got all blocks from another one")
			}
			fetch(gateway) // what it has now
		})
	}
}
