// SPDX-License-Identifier: GPL-3.0-or-later

package interop

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"net/http/httptest"
	"net/url"
	"testing"
	"time"

	"github.com/ipfs/boxo/blockservice"
	"github.com/ipfs/boxo/blockstore"
	"github.com/ipfs/boxo/exchange"
	"github.com/ipfs/boxo/exchange/offline"
	"github.com/ipfs/boxo/gateway"
	blocks "github.com/ipfs/go-block-format"
	"github.com/ipfs/go-cid"
	"github.com/ipfs/go-datastore"
	"github.com/ipfs/go-datastore/sync"
	"github.com/multiformats/go-multihash"
	_ "github.com/multiformats/go-multihash/register/blake2"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/ipfs"
)

// searching is an exchange that looks for blocks and never finds them, as a node does that is
// connected to the network.
type searching struct{ exchange.Interface }

func (searching) GetBlock(ctx context.Context, _ cid.Cid) (blocks.Block, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// node is a gateway with blocks in memory.
type node struct {
	blocks blockstore.Blockstore
	url    string // without scheme
}

func startNode(t *testing.T, config gateway.Config, exchange func(blockstore.Blockstore) exchange.Interface) node {
	n := node{blocks: blockstore.NewBlockstore(sync.MutexWrap(datastore.NewMapDatastore()))}
	backend, err := gateway.NewBlocksBackend(blockservice.New(n.blocks, exchange(n.blocks)))
	if err != nil {
		t.Fatal(err)
	}
	config.NoDNSLink = true
	server := httptest.NewServer(gateway.NewHostnameHandler(config, backend, gateway.NewHandler(config, backend)))
	t.Cleanup(server.Close)
	u, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	n.url = u.Host
	return n
}

// add adds a new block. Its name is made by IPFS.
func (n node) add(t *testing.T, size eris.BlockSize) (eris.Reference, []byte) {
	block := make([]byte, size)
	rand.Read(block)
	name, err := cid.Prefix{Version: 1, Codec: cid.Raw, MhType: multihash.BLAKE2B_MIN + 31, MhLength: 32}.Sum(block)
	if err != nil {
		t.Fatal(err)
	}
	ref := eris.Sum(block)
	if got := ipfs.CID(ref); got != name.String() {
		t.Fatalf("CID is %s, IPFS says %s", got, name)
	}
	b, err := blocks.NewBlockWithCid(block, name)
	if err == nil {
		err = n.blocks.Put(t.Context(), b)
	}
	if err != nil {
		t.Fatal(err)
	}
	return ref, block
}

func open(t *testing.T, url string, options ipfs.Options) *ipfs.Store {
	t.Helper()
	store, err := ipfs.Open(url, options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	return store
}

func get(t *testing.T, store *ipfs.Store, ref eris.Reference, size eris.BlockSize) ([]byte, error) {
	return fetch.Get(t.Context(), store, ref, size, nil)
}

func isOffline(b blockstore.Blockstore) exchange.Interface { return offline.Exchange(b) }

func TestGateway(t *testing.T) {
	n := startNode(t, gateway.Config{}, isOffline)
	store := open(t, "ipfs+http://"+n.url, ipfs.Options{})
	for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
		for range 20 {
			ref, want := n.add(t, size)
			if got, err := get(t, store, ref, size); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%v: Get: %v", size, err)
			}
		}
	}
	if _, err := get(t, store, eris.Sum([]byte("absent")), eris.BlockSize1KiB); !errors.Is(err, eris.ErrNotFound) {
		t.Errorf("error is %v, not that the block is missing", err)
	}
}

// TestSearch has the node look for a block: until it gives up, and until we do.
func TestSearch(t *testing.T) {
	search := func(b blockstore.Blockstore) exchange.Interface { return searching{offline.Exchange(b)} }
	for name, limits := range map[string][2]time.Duration{
		"node gives up": {100 * time.Millisecond, time.Minute},
		"we give up":    {time.Minute, 100 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			n := startNode(t, gateway.Config{RetrievalTimeout: limits[0]}, search)
			store := open(t, "ipfs+http://"+n.url, ipfs.Options{Timeout: limits[1]})
			_, err := get(t, store, eris.Sum([]byte("absent")), eris.BlockSize1KiB)
			if !errors.Is(err, eris.ErrNotFound) {
				t.Errorf("error is %v, not that the block is missing", err)
			}
			ref, want := n.add(t, eris.BlockSize1KiB)
			got, err := get(t, store, ref, eris.BlockSize1KiB)
			for try := 0; errors.Is(err, eris.ErrNotFound) && try < 600; try++ { // a busy machine takes longer
				got, err = get(t, store, ref, eris.BlockSize1KiB)
			}
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("Get: %v", err)
			}
		})
	}
}

// TestLocalhost has a gateway that sends whoever calls it by this name to a host for each CID, as
// Kubo does unless told otherwise.
func TestLocalhost(t *testing.T) {
	n := startNode(t, gateway.Config{
		PublicGateways: map[string]*gateway.PublicGateway{"localhost": {Paths: []string{"/ipfs"}, UseSubdomains: true}},
	}, isOffline)
	u, err := url.Parse("http://" + n.url)
	if err != nil {
		t.Fatal(err)
	}
	store := open(t, "ipfs+http://localhost:"+u.Port(), ipfs.Options{})
	ref, want := n.add(t, eris.BlockSize32KiB)
	if got, err := get(t, store, ref, eris.BlockSize32KiB); err != nil || !bytes.Equal(got, want) {
		t.Errorf("Get: %v", err)
	}
}
