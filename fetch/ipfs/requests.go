// SPDX-License-Identifier: GPL-3.0-or-later

package ipfs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/url"
	"strings"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// rpcPort is where Kubo has its RPC, rpcPath the path of it.
const (
	rpcPort = "5001"
	rpcPath = "/api/v0"
)

const maxURLSize = 4096

var (
	errURLSize  = errors.New("too long")
	errURLForm  = errors.New("not of the form ipfs+http://host:port/path?query")
	errURLQuery = errors.New(`query may have the elements "gateway" or "rpc", "get" and "put" only`)
	// errOtherName says that the node stores the block, but under a name by which nobody looks for it.
	errOtherName = errors.New("node names the block otherwise")
)

// node is where an IPFS node is and what can be had from it.
type node struct {
	scheme, host string // of HTTP
	user         *url.Userinfo
	base         string // path before /ipfs/ or /api/v0/, as it stands in the URL
	rpc          bool
	get, put     bool
}

// parseNode reads a store URL. Its errors do not quote it.
func parseNode(text string) (node, error) {
	if len(text) > maxURLSize {
		return node{}, errURLSize
	}
	u, err := url.Parse(text)
	if err != nil || u.Opaque != "" || u.Fragment != "" || u.Hostname() == "" || strings.HasSuffix(u.Host, ":") {
		return node{}, errURLForm
	}
	n := node{host: u.Host, user: u.User}
	switch u.Scheme {
	case "ipfs+http":
		n.scheme = "http"
	case "ipfs+https":
		n.scheme = "https"
	default:
		return node{}, errURLForm
	}
	base, isRPC := strings.CutSuffix(strings.TrimSuffix(u.EscapedPath(), "/"), rpcPath)
	n.base, n.rpc = base, isRPC || u.Port() == rpcPort
	gateway, rpc := false, false
	for element := range strings.SplitSeq(u.RawQuery, "&") {
		switch element {
		case "":
		case "gateway":
			gateway, n.rpc = true, false
		case "rpc":
			rpc, n.rpc = true, true
		case "get":
			n.get = true
		case "put":
			n.put = true
		default:
			return node{}, errURLQuery
		}
	}
	if gateway && (rpc || isRPC) {
		return node{}, errURLQuery
	}
	if !n.get && !n.put {
		n.get, n.put = true, true
	}
	return n, nil
}

// String returns nothing that may be a secret.
func (n node) String() string { return "ipfs+" + n.scheme + "://" + n.host }

// requestMaker makes a request that ends with the context.
type requestMaker func(ctx context.Context) (*http.Request, error)

func (n node) request(ctx context.Context, method, path string, query url.Values, body io.Reader) (*http.Request, error) {
	target := n.scheme + "://" + n.host + n.base + path
	if len(query) > 0 {
		target += "?" + query.Encode()
	}
	request, err := http.NewRequestWithContext(ctx, method, target, body)
	if err != nil {
		return nil, errors.New("making a request failed") // the error would quote the URL
	}
	request.Header.Set("User-Agent", "guix-substitute-eris")
	// Whatever we ask may be asked twice, so that a connection which the node has closed meanwhile is not an error. No such
	// field is sent if it has no value (net/http, Transport).
	request.Header["Idempotency-Key"] = nil
	if n.user != nil {
		password, _ := n.user.Password()
		request.SetBasicAuth(n.user.Username(), password)
	}
	if !n.rpc && request.URL.Hostname() == "localhost" {
		// A gateway that is called localhost gives each CID a host name of its own and sends clients there, to keep web sites
		// apart (https://specs.ipfs.tech/http-gateways/subdomain-gateway/). By its address it does not.
		request.Host = strings.Replace(n.host, "localhost", "127.0.0.1", 1)
	}
	return request, nil
}

func (n node) getRequest(ref eris.Reference, timeout time.Duration) requestMaker {
	return func(ctx context.Context) (*http.Request, error) {
		if n.rpc {
			// The daemon gives up as well, or it would look for blocks that nobody waits for.
			query := url.Values{"arg": {CID(ref)}, "timeout": {timeout.String()}}
			return n.request(ctx, http.MethodPost, rpcPath+"/block/get", query, nil)
		}
		request, err := n.request(ctx, http.MethodGet, "/ipfs/"+CID(ref), url.Values{"format": {"raw"}}, nil)
		if err == nil {
			request.Header.Set("Accept", "application/vnd.ipld.raw")
		}
		return request, err
	}
}

// getError returns what an answer other than 200 means.
func (n node) getError(response *http.Response) error {
	text := readText(response)
	if n.rpc {
		if response.StatusCode == http.StatusInternalServerError && saysNotFound(text) {
			return eris.ErrNotFound
		}
		return &ResponseError{response.StatusCode, text}
	}
	switch response.StatusCode {
	case http.StatusNotFound, http.StatusGone, http.StatusUnavailableForLegalReasons, // not here, or not for us
		http.StatusGatewayTimeout,     // it has looked for long enough
		http.StatusPreconditionFailed: // it does not look elsewhere
		return fmt.Errorf("%w: %w", eris.ErrNotFound, &ResponseError{response.StatusCode, text})
	}
	return &ResponseError{response.StatusCode, text}
}

// saysNotFound reports whether an error of the RPC means that there is no such block, or none in time. There is no code for
// that, only text: "ipld: could not find CID", before 2022 "blockservice: key not found" or "merkledag: not found"; and
// "context deadline exceeded".
func saysNotFound(text string) bool {
	for _, phrase := range []string{"could not find", "not found", "deadline exceeded"} {
		if strings.Contains(text, phrase) {
			return true
		}
	}
	return false
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

// putRequest makes the request that stores and pins a block. An old daemon knows "format" instead of "cid-codec", and the present
// one refuses both together.
func (n node) putRequest(block []byte, old bool) requestMaker {
	query := url.Values{"mhtype": {"blake2b-256"}, "mhlen": {"32"}, "pin": {"true"}}
	if old {
		query.Set("format", "raw")
	} else {
		query.Set("cid-codec", "raw")
	}
	return func(ctx context.Context) (*http.Request, error) {
		var body bytes.Buffer
		form := multipart.NewWriter(&body)
		part, err := form.CreateFormFile("file", "block")
		if err == nil {
			_, err = part.Write(block)
		}
		if err == nil {
			err = form.Close()
		}
		if err != nil {
			return nil, err
		}
		// A reader of bytes can be read again when the request has to be sent again.
		request, err := n.request(ctx, http.MethodPost, rpcPath+"/block/put", query, bytes.NewReader(body.Bytes()))
		if err == nil {
			request.Header.Set("Content-Type", form.FormDataContentType())
		}
		return request, err
	}
}

// putResult returns what the answer to a PUT means.
func putResult(ref eris.Reference, response *http.Response) error {
	if response.StatusCode == http.StatusOK {
		var stored struct{ Key string }
		if err := json.NewDecoder(io.LimitReader(response.Body, maxText)).Decode(&stored); err != nil {
			return fmt.Errorf("answer of the node is not understood: %w", err)
		}
		if stored.Key != CID(ref) {
			return fmt.Errorf("%w: %.100q", errOtherName, stored.Key)
		}
		return nil
	}
	err := error(&ResponseError{response.StatusCode, readText(response)})
	switch response.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusMethodNotAllowed:
		return fmt.Errorf("%w: %w", fetch.ErrReadOnly, err)
	case http.StatusBadRequest, http.StatusInternalServerError:
		if strings.Contains(err.Error(), "cid-codec") {
			return fmt.Errorf("%w: %w", errOtherName, err)
		}
	}
	return err
}

// failure strips an error of the HTTP client of the URL that it quotes.
func failure(err error) error {
	var quoting *url.Error
	if errors.As(err, &quoting) {
		return quoting.Err
	}
	return err
}
