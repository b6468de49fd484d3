// SPDX-License-Identifier: GPL-3.0-or-later

// Package ipfs gets ERIS blocks from IPFS and puts them there. Each encrypted block is one block of
// IPFS, named by [CID]. Start with [Open].
//
// There are two ways to a node, and both are HTTP. A trustless gateway answers GET
// /ipfs/CID?format=raw with the block (https://specs.ipfs.tech/http-gateways/trustless-gateway/),
// and takes none. The RPC of Kubo, the usual daemon, answers POST /api/v0/block/get and
// /api/v0/block/put (https://docs.ipfs.tech/reference/kubo/rpc/); whoever can reach it governs the
// node, so it is for one's own.
//
// A node that does not have a block looks for it all over the network, and may never stop. So a
// block counts as missing, for now, when there is no answer after [Options.Timeout].
//
// Nobody is believed: whoever asks for blocks verifies them, bodies are read no further than they
// can be right, connections are bounded.
package ipfs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/httpclient"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
)

// Options says how a [Store] behaves.
type Options struct {
	// Timeout is how long the node may look for a block, and how long it may take to store one.
	// Once it has begun to answer, the rest may take half as long again. Default 20 s.
	Timeout time.Duration
}

const (
	// connections is the most requests at a time; further ones wait. Over HTTP/1 each is a
	// connection.
	connections    = 32
	connectTimeout = 5 * time.Second
	idleTimeout    = 90 * time.Second
	// maxText is how many bytes of a message of the node are read.
	maxText = 1 << 10
	// rpcPort is where Kubo has its RPC, rpcPath the path of it.
	rpcPort = 5001
	rpcPath = "/api/v0"
)

var errSize = errors.New("block size is neither 1 KiB nor 32 KiB")

// errOtherName says that the node stores the block, but under a name by which nobody looks for it.
var errOtherName = errors.New("node names the block otherwise")

// Store is an IPFS node. It implements [fetch.Store], and is safe for concurrent use. Requests fail
// with an error that wraps [eris.ErrNotFound] if the node does not have the block, or does not find
// it within [Options.Timeout].
type Store struct {
	*fetch.Workers
	url     storeurl.URL
	rpc     bool
	timeout time.Duration
	client  *httpclient.Client

	// oldPut says that the daemon is of before Kubo 0.11 (2021), which had no cid-codec.
	oldPut atomic.Bool
}

var _ fetch.Store = (*Store)(nil)

// Open returns the store at a URL: ipfs+http://host:port or ipfs+https://host:port, with the path
// before "/ipfs/" or "/api/v0/" if there is one. Elements of the query: "gateway" or "rpc" says
// what is spoken to; without them it is the RPC if the port is 5001, where Kubo has it, or the path
// ends in /api/v0, and a gateway otherwise. "get" and "put" restrict what the store is used for. A
// user name and password are sent as the RPC wants them (Basic).
//
// Open makes no connection. The Store must be closed. The path and the user name may be secrets;
// neither errors nor [Store.String] show them.
func Open(url string, options Options) (*Store, error) {
	u, err := storeurl.ParseScheme(url, "ipfs+http", "ipfs+https")
	if err != nil {
		return nil, err
	}
	path, isRPC := strings.CutSuffix(u.Path, rpcPath)
	if u.Has("gateway") && (u.Has("rpc") || isRPC) {
		return nil, fmt.Errorf("store URL %v: it is either a gateway or an RPC", u)
	}
	u.Path = path
	s := &Store{url: u, timeout: cmp.Or(options.Timeout, 20*time.Second)}
	s.rpc = !u.Has("gateway") && (u.Has("rpc") || isRPC || u.Port == rpcPort)
	getenv := os.Getenv
	if address, err := netip.ParseAddr(u.Host); u.Host == "localhost" || err == nil && address.IsLoopback() {
		getenv = func(string) string { return "" } // the node of this machine is not behind a proxy
	}
	s.client = httpclient.New(u.HTTP(""), httpclient.Options{
		Connections: connections, ConnectTimeout: connectTimeout, IdleTimeout: idleTimeout,
		// The daemon is told to stop looking after Timeout, so it may say so itself a little later.
		Timeout: s.timeout + s.timeout/8, BodyTimeout: s.timeout + s.timeout/2,
		Verify: u.User != nil, // which are to be kept from others; blocks are verified in any case
		Getenv: getenv,
	})
	s.Workers = fetch.NewWorkers(connections, s.get)
	return s, nil
}

// String returns the scheme and the host.
func (s *Store) String() string { return s.url.String() }

// Close ends all requests and closes all connections.
func (s *Store) Close() error {
	s.client.Close()
	return s.Workers.Close()
}

// get is what the workers call.
func (s *Store) get(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) (block []byte, err error) {
	err = eris.ErrNotFound
	if s.url.Get {
		err = s.do(ctx, s.getRequest(ref), func(r *http.Response) (err error) {
			if r.StatusCode != http.StatusOK {
				return s.getError(r)
			}
			block, err = httpclient.ReadBlock(r, ref, size, dst)
			return err
		})
	}
	if errors.Is(err, httpclient.ErrSilent) {
		err = fmt.Errorf("%w: the node has not found it within %v", eris.ErrNotFound, s.timeout)
	}
	if err != nil {
		return nil, fmt.Errorf("%v: %w", s, err)
	}
	return block, nil
}

// Put implements [fetch.Store]: it returns nil once the node has answered that it has stored and
// pinned the block.
func (s *Store) Put(ctx context.Context, ref eris.Reference, block []byte) error {
	if err := s.put(ctx, ref, block); err != nil {
		return fmt.Errorf("%v: block %v: %w", s, ref, err)
	}
	return nil
}

func (s *Store) put(ctx context.Context, ref eris.Reference, block []byte) error {
	if !s.url.Put || !s.rpc {
		return fetch.ErrReadOnly
	}
	if !eris.BlockSize(len(block)).Valid() {
		return errSize
	}
	putAs := func(old bool) error {
		return s.do(ctx, s.putRequest(block, old), func(r *http.Response) error { return putResult(ref, r) })
	}
	old := s.oldPut.Load()
	err := putAs(old)
	if !old && errors.Is(err, errOtherName) {
		if err = putAs(true); err == nil {
			s.oldPut.Store(true)
		}
	}
	return err
}

// do makes an exchange, again while the node is busy.
func (s *Store) do(ctx context.Context, make func() (*http.Request, error), take func(*http.Response) error) error {
	return s.client.Retry(ctx, func() error {
		request, err := make()
		if err != nil {
			return err
		}
		return s.client.Do(ctx, request, take)
	})
}
