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
	"bytes"
	"cmp"
	"context"
	"encoding/base32"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
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

// Store is an IPFS node. It implements [fetch.Store], and is safe for concurrent use. Requests fail
// with an error that wraps [eris.ErrNotFound] if the node does not have the block, or does not find
// it within [Options.Timeout].
type Store struct {
	httpclient.Store
	url     storeurl.URL
	rpc     bool
	timeout time.Duration
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
func Open(text string, options Options) (*Store, error) {
	u, err := storeurl.ParseScheme(text, "ipfs+http", "ipfs+https")
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
	s.Client = httpclient.New(u.HTTP(""), httpclient.Options{
		Connections: connections, ConnectTimeout: connectTimeout, IdleTimeout: idleTimeout,
		// The daemon is told to stop looking after Timeout, so it may say so itself a little later.
		Timeout: s.timeout + s.timeout/8, BodyTimeout: s.timeout + s.timeout/2,
		Verify: u.User != nil, // which are to be kept from others; blocks are verified in any case
		Getenv: getenv,
	})
	s.Workers = fetch.NewWorkers(u.String(), connections, s.get)
	return s, nil
}

// cidPrefix is what stands before the digest in the binary form of a CID: version 1; the codec
// "raw" (0x55), because IPFS knows nothing of what is in the block; and a multihash of the kind
// blake2b-256 (0xb220 as a variable-length number) with 32 bytes
// (https://github.com/multiformats/cid, https://github.com/multiformats/multicodec).
const cidPrefix = "\x01\x55\xa0\xe4\x02\x20"

// cidText is Base32 as multibase has it under the prefix "b": lower case, no padding.
var cidText = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// CID returns the name under which IPFS knows an encrypted block: CIDv1, codec raw, hash
// BLAKE2b-256, in Base32. The digest in it is the reference itself, since both are BLAKE2b-256 of
// the same bytes; so a node that checks what it gets, as all do, checks what we would. All names
// are 62 characters long and begin with "bafk2bzace".
func CID(ref eris.Reference) string {
	return "b" + cidText.EncodeToString(append([]byte(cidPrefix), ref[:]...))
}

func (s *Store) get(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) (block []byte, err error) {
	err = eris.ErrNotFound
	if s.url.Get {
		err = s.Do(ctx, s.getRequest(ref), func(r *http.Response) (err error) {
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
	return block, err
}

// Put implements [fetch.Store]: it returns nil once the node has answered that it has stored and
// pinned the block.
func (s *Store) Put(ctx context.Context, ref eris.Reference, block []byte) error {
	return s.PutBlock(ctx, s.url.Put && s.rpc, ref, block, func() error {
		return s.Do(ctx, s.putRequest(block), func(r *http.Response) error { return putResult(ref, r) })
	})
}

// request makes a request for a path of the node; body may be nil.
func (s *Store) request(method, path string, query url.Values, body io.Reader) *http.Request {
	r, _ := http.NewRequest(method, "", body) // fails only for the first two
	r.URL, r.Header = s.url.HTTP(path), httpclient.Header()
	r.URL.RawQuery = query.Encode()
	if user := s.url.User; user != nil {
		password, _ := user.Password()
		r.SetBasicAuth(user.Username(), password)
	}
	if r.Host = r.URL.Host; !s.rpc && s.url.Host == "localhost" {
		// A gateway that is called localhost gives each CID a host name of its own and sends
		// clients there, to keep web sites apart
		// (https://specs.ipfs.tech/http-gateways/subdomain-gateway/). By its address it does not.
		r.Host = strings.Replace(r.Host, "localhost", "127.0.0.1", 1)
	}
	return r
}

func (s *Store) getRequest(ref eris.Reference) *http.Request {
	if s.rpc {
		// The daemon gives up as well, or it would look for blocks that nobody waits for.
		query := url.Values{"arg": {CID(ref)}, "timeout": {s.timeout.String()}}
		return s.request(http.MethodPost, rpcPath+"/block/get", query, nil)
	}
	r := s.request(http.MethodGet, "/ipfs/"+CID(ref), url.Values{"format": {"raw"}}, nil)
	r.Header.Set("Accept", "application/vnd.ipld.raw")
	return r
}

func (s *Store) getError(response *http.Response) error {
	err := &httpclient.StatusError{Code: response.StatusCode, Text: readText(response)}
	if s.rpc {
		if response.StatusCode == http.StatusInternalServerError && saysNotFound(err.Text) {
			return eris.ErrNotFound
		}
		return err
	}
	switch response.StatusCode {
	case http.StatusNotFound, http.StatusGone, http.StatusUnavailableForLegalReasons, // not here, or not for us
		http.StatusGatewayTimeout,     // it has looked for long enough
		http.StatusPreconditionFailed: // it does not look elsewhere
		return fmt.Errorf("%w: %w", eris.ErrNotFound, err)
	}
	return err
}

// saysNotFound reports whether an error of the RPC means that there is no such block, or none in
// time. There is no code for that, only text: "ipld: could not find CID", before 2022
// "blockservice: key not found" or "merkledag: not found"; and "context deadline exceeded".
func saysNotFound(text string) bool {
	phrases := []string{"could not find", "not found", "deadline exceeded"}
	return slices.ContainsFunc(phrases, func(phrase string) bool { return strings.Contains(text, phrase) })
}

// readText returns the beginning of what an error response says. The RPC wraps it in JSON.
func readText(response *http.Response) string {
	b, _ := io.ReadAll(io.LimitReader(response.Body, maxText))
	var wrapped struct{ Message string }
	if json.Unmarshal(b, &wrapped) == nil && wrapped.Message != "" {
		return wrapped.Message
	}
	return strings.TrimSpace(string(b))
}

// putRequest makes the request that stores and pins a block. Kubo before 0.11 (2021) does not know
// the codec, and gives the block another name.
func (s *Store) putRequest(block []byte) *http.Request {
	query := url.Values{"mhtype": {"blake2b-256"}, "mhlen": {"32"}, "pin": {"true"}, "cid-codec": {"raw"}}
	var body bytes.Buffer // to which writing does not fail
	form := multipart.NewWriter(&body)
	part, _ := form.CreateFormFile("file", "block")
	part.Write(block)
	form.Close()
	r := s.request(http.MethodPost, rpcPath+"/block/put", query, &body)
	r.Header.Set("Content-Type", form.FormDataContentType())
	return r
}

func putResult(ref eris.Reference, response *http.Response) error {
	if response.StatusCode == http.StatusOK {
		var stored struct{ Key string }
		if err := json.NewDecoder(io.LimitReader(response.Body, maxText)).Decode(&stored); err != nil {
			return fmt.Errorf("answer of the node is not understood: %w", err)
		}
		if stored.Key != CID(ref) {
			return fmt.Errorf("node stores the block under another name, by which nobody looks for it: %.100q; it may be too old", stored.Key)
		}
		return nil
	}
	err := &httpclient.StatusError{Code: response.StatusCode, Text: readText(response)}
	switch response.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusMethodNotAllowed:
		return fmt.Errorf("%w: %w", fetch.ErrReadOnly, err)
	}
	return err
}
