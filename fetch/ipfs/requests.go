// SPDX-License-Identifier: GPL-3.0-or-later

package ipfs

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/url"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/httpclient"
)

// request makes a request for a path of the node.
func (s *Store) request(method, path string, query url.Values, body []byte) (*http.Request, error) {
	target := s.url.HTTP(path)
	target.RawQuery = query.Encode()
	r, err := http.NewRequest(method, target.String(), bytes.NewReader(body))
	if err != nil {
		return nil, errors.New("making a request failed") // the error would quote the URL
	}
	r.Header = httpclient.Header()
	if user := s.url.User; user != nil {
		password, _ := user.Password()
		r.SetBasicAuth(user.Username(), password)
	}
	if !s.rpc && s.url.Host == "localhost" {
		// A gateway that is called localhost gives each CID a host name of its own and sends
		// clients there, to keep web sites apart
		// (https://specs.ipfs.tech/http-gateways/subdomain-gateway/). By its address it does not.
		r.Host = strings.Replace(target.Host, "localhost", "127.0.0.1", 1)
	}
	return r, nil
}

func (s *Store) getRequest(ref eris.Reference) func() (*http.Request, error) {
	return func() (*http.Request, error) {
		if s.rpc {
			// The daemon gives up as well, or it would look for blocks that nobody waits for.
			query := url.Values{"arg": {CID(ref)}, "timeout": {s.timeout.String()}}
			return s.request(http.MethodPost, rpcPath+"/block/get", query, nil)
		}
		r, err := s.request(http.MethodGet, "/ipfs/"+CID(ref), url.Values{"format": {"raw"}}, nil)
		if err == nil {
			r.Header.Set("Accept", "application/vnd.ipld.raw")
		}
		return r, err
	}
}

// getError returns what an answer other than 200 means.
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

// putRequest makes the request that stores and pins a block. An old daemon knows "format" instead
// of "cid-codec", and the present one refuses both together.
func (s *Store) putRequest(block []byte, old bool) func() (*http.Request, error) {
	query := url.Values{"mhtype": {"blake2b-256"}, "mhlen": {"32"}, "pin": {"true"}}
	if old {
		query.Set("format", "raw")
	} else {
		query.Set("cid-codec", "raw")
	}
	return func() (*http.Request, error) {
		var body bytes.Buffer
		form := multipart.NewWriter(&body)
		part, err := form.CreateFormFile("file", "block")
		if err == nil {
			_, err = part.Write(block)
		}
		if err = errors.Join(err, form.Close()); err != nil {
			return nil, err
		}
		r, err := s.request(http.MethodPost, rpcPath+"/block/put", query, body.Bytes())
		if err == nil {
			r.Header.Set("Content-Type", form.FormDataContentType())
		}
		return r, err
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
	err := &httpclient.StatusError{Code: response.StatusCode, Text: readText(response)}
	switch response.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusMethodNotAllowed:
		return fmt.Errorf("%w: %w", fetch.ErrReadOnly, err)
	case http.StatusBadRequest, http.StatusInternalServerError:
		if strings.Contains(err.Text, "cid-codec") {
			return fmt.Errorf("%w: %w", errOtherName, err)
		}
	}
	return err
}
