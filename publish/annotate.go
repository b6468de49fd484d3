// SPDX-License-Identifier: GPL-3.0-or-later

package publish

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/admission"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/decompress"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/dial"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// AnnotatorOptions say what an [Annotator] serves.
type AnnotatorOptions struct {
	// Upstream is the substitute URL of the server whose narinfos are passed on.
	Upstream string
	// StoreDir is the store directory; Root is where it is, if not there.
	StoreDir, Root string
	// Capabilities finds the read capabilities of items of the store, and Deltas their deltas; nil
	// is none.
	Capabilities *Capabilities
	Deltas       *Deltas
	// Nars is whether the compressed nars of items that get a capability are fetched, and encoded
	// too.
	Nars bool
	// WaitFor is that of [ServerOptions].
	WaitFor uint64
	// Log is where messages go.
	Log func(format string, a ...any)
}

// An Annotator passes on the narinfos of another server, unchanged but for a field ERIS below the
// signature of each item that is in the local store with the same contents. It needs no key:
// whoever uses the capability checks what it gets against the NarHash that the other server has
// signed. Everything else, nars above all, is redirected to that server, or comes from there by way
// of this one where clients have the same name for both, or where that server wants the password of
// its URL. It is an http.Handler.
type Annotator struct {
	o        AnnotatorOptions
	upstream *url.URL
	user     *url.Userinfo // what it wants; neither messages nor clients have it
	client   *http.Client
	relay    *httputil.ReverseProxy
	via      string           // names it in requests, so that it knows those that come back to it
	looped   sync.Once        // tells that some do
	failures admission.Seldom // that are logged
	nars     *mirror.Client   // nil if they are not encoded
}

const (
	// upstreamTimeout bounds the time for a narinfo.
	upstreamTimeout = 30 * time.Second
	// upstreamConnections bounds the connections to the other server, and maxUpstreamHeader the
	// header of each answer, in bytes.
	upstreamConnections = 64
	maxUpstreamHeader   = 256 << 10
	// maxRedirects is how many redirections in a row are followed for a client.
	maxRedirects = 5
)

// NewAnnotator returns an annotator; the error is about its options.
func NewAnnotator(o AnnotatorOptions) (*Annotator, error) {
	u, err := url.Parse(o.Upstream)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("%q is not the URL of a substitute server, which begins with http:// or https://", mirror.WithoutUser(o.Upstream))
	}
	user := u.User
	u.User, u.Path = nil, cmp.Or(u.Path, "/")
	o.Root = cmp.Or(o.Root, o.StoreDir)
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.DialContext = dial.With(&net.Dialer{})
	transport.MaxConnsPerHost = upstreamConnections
	transport.MaxIdleConnsPerHost = upstreamConnections
	transport.ResponseHeaderTimeout = upstreamTimeout
	transport.MaxResponseHeaderBytes = maxUpstreamHeader
	a := &Annotator{o: o, upstream: u, user: user, via: "1.1 annotate-" + rand.Text()}
	a.client = &http.Client{Transport: withUser{transport, a}, Timeout: upstreamTimeout}
	relayed := &http.Client{Transport: withUser{transport.Clone(), a}, CheckRedirect: a.follow}
	a.relay = &httputil.ReverseProxy{Transport: follower{relayed}, Rewrite: a.rewrite, ErrorHandler: a.failed}
	if o.Capabilities != nil && o.Nars {
		a.nars = mirror.NewClient(mirror.Options{Getenv: os.Getenv})
		o.Capabilities.upstreamNar = a.encodeNar
	}
	return a, nil
}

// ServeHTTP implements http.Handler.
func (a *Annotator) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if w = accept(w, r, stallTimeout); w == nil {
		return
	}
	if a.o.Deltas != nil && a.o.Deltas.serve(w, r) {
		return
	}
	if slices.Contains(strings.Split(r.URL.Path, "/"), "..") { // it is not below the URL of that server
		http.NotFound(w, r)
		return
	}
	_, isNarinfo := narinfoName(strings.TrimPrefix(r.URL.Path, "/"))
	// Guix takes a redirection to another port of the same host for one to where it is (Guix,
	// guix/http-client.scm: http-fetch), and follows it for ever. A password is not for clients.
	sameHost := strings.EqualFold((&url.URL{Host: r.Host}).Hostname(), a.upstream.Hostname())
	if !isNarinfo && !sameHost && a.user == nil {
		http.Redirect(w, r, a.there(r).String(), http.StatusFound)
		return
	}
	via := strings.Join(r.Header.Values("Via"), ", ")
	if strings.Contains(via, a.via) {
		a.looped.Do(func() { a.o.Log("requests to %s come back to this server", a.upstream.Host) })
		http.Error(w, "requests to "+a.upstream.Host+" come back here", http.StatusLoopDetected)
		return
	}
	if !isNarinfo {
		a.relay.ServeHTTP(w, r)
		return
	}
	response, text, err := a.get(r.Context(), a.there(r), via)
	if err != nil {
		a.failed(w, r, err)
		return
	}
	for _, name := range []string{"Content-Type", "Cache-Control", "X-Baking"} {
		if value := response.Header.Get(name); value != "" {
			w.Header().Set(name, value)
		}
	}
	if response.StatusCode == http.StatusOK {
		annotated, complete := a.annotate(r.Context(), text)
		if !complete {
			maxAge(w, temporaryTTL)
		}
		serveText(w, r, annotated)
		return
	}
	w.WriteHeader(response.StatusCode)
	w.Write(text)
}

// there returns the URL of a request at the other server.
func (a *Annotator) there(r *http.Request) *url.URL {
	there := a.upstream.JoinPath(r.URL.EscapedPath())
	there.RawQuery = r.URL.RawQuery
	return there
}

// rewrite makes a request one of the other server. It asks for no other protocol.
func (a *Annotator) rewrite(p *httputil.ProxyRequest) {
	p.Out.URL, p.Out.Host, p.Out.RequestURI = a.there(p.In), "", ""
	p.Out.Header.Add("Via", a.via)
	p.Out.Header.Del("Upgrade")
}

// withUser tells the other server, and nobody else, what it wants: net/http does so for a client
// only, and not where the server redirects to itself.
type withUser struct {
	http.RoundTripper
	a *Annotator
}

func (t withUser) RoundTrip(r *http.Request) (*http.Response, error) {
	if t.a.user != nil && t.a.isThere(r.URL) {
		password, _ := t.a.user.Password()
		r = r.Clone(r.Context())
		r.SetBasicAuth(t.a.user.Username(), password)
	}
	return t.RoundTripper.RoundTrip(r)
}

// isThere reports whether a URL is at the other server.
func (a *Annotator) isThere(u *url.URL) bool {
	return u.Scheme == a.upstream.Scheme && strings.EqualFold(u.Host, a.upstream.Host)
}

// follower follows redirections for clients, as its own client allows.
type follower struct{ *http.Client }

func (f follower) RoundTrip(r *http.Request) (*http.Response, error) { return f.Do(r) }

// follow allows those of the other server to itself: clients have no password for it, nor can they
// tell where a path of it is.
func (a *Annotator) follow(r *http.Request, via []*http.Request) error {
	if len(via) > maxRedirects || !a.isThere(r.URL) {
		return http.ErrUseLastResponse
	}
	return nil
}

// failed tells a client that the other server has not answered.
func (a *Annotator) failed(w http.ResponseWriter, r *http.Request, err error) {
	if a.failures.DueFor(r) {
		a.o.Log("%v", err)
	}
	http.Error(w, "no good answer from "+a.upstream.Host, http.StatusBadGateway)
}

// get gets what is no longer than a narinfo from the other server. That may have it elsewhere; but
// it is a narinfo then, or else clients could have it show them what only this machine can reach.
// Via is the field of the request that it is for (RFC 9110, section 7.6.3).
func (a *Annotator) get(ctx context.Context, from *url.URL, via string) (response *http.Response, text []byte, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, from.String(), nil)
	if err != nil {
		return nil, nil, err
	}
	request.Header.Set("Via", strings.TrimPrefix(via+", "+a.via, ", "))
	if response, err = a.client.Do(request); err != nil {
		if failed, ok := errors.AsType[*url.Error](err); ok {
			failed.URL = mirror.WithoutUser(failed.URL)
		}
		return nil, nil, err
	}
	defer response.Body.Close()
	if response.StatusCode < 200 { // the body of 101 is the connection, which has no end
		return nil, nil, fmt.Errorf("%s: status %03d", from, response.StatusCode)
	}
	text, err = io.ReadAll(io.LimitReader(response.Body, narinfo.MaxSize+1))
	if err == nil && len(text) > narinfo.MaxSize {
		err = fmt.Errorf("%s: the answer has more than %d bytes", from, narinfo.MaxSize)
	}
	if at := response.Request.URL; err == nil && !a.isThere(at) {
		if _, failed := narinfo.Parse(text); failed != nil {
			text = nil
			if response.StatusCode == http.StatusOK {
				err = fmt.Errorf("%s: redirected to %s, which is no narinfo", from, mirror.WithoutUser(at.String()))
			}
		}
	}
	return response, text, err
}

// encodeNar is a narEncoder. Like a helper it takes the nar that is decompressed fastest, so that
// what helpers seed are the same blocks.
func (a *Annotator) encodeNar(ctx context.Context, path string, narHash [sha256.Size]byte, sink eris.Sink) (*knownNar, error) {
	k := &knownNar{Form: upstreamForm}
	at := a.upstream.JoinPath(hashPartOf(path) + ".narinfo")
	response, text, err := a.get(ctx, at, "")
	if err != nil {
		return nil, err
	}
	if status := (&mirror.StatusError{URL: at.String(), Status: response.Status, Code: response.StatusCode}); status.Temporary() {
		return nil, status
	}
	n, err := narinfo.Parse(text)
	if err != nil {
		return k, nil
	}
	urls := n.PreferredURLs()
	i := slices.IndexFunc(urls, func(u narinfo.URL) bool { return u.Compression != "none" })
	if i < 0 {
		return k, nil
	}
	url, err := narinfo.ResolveURL(a.o.Upstream, urls[i].URL)
	if err != nil || mirror.IsLocal(url) {
		return k, nil
	}
	body, err := a.nars.OpenNar(ctx, url, false)
	if status, ok := errors.AsType[*mirror.StatusError](err); ok && !status.Temporary() {
		return k, nil // it has gone
	} else if err != nil {
		return nil, err
	}
	defer body.Close()
	k.Compression = urls[i].Compression
	err = k.encode(ctx, sink, func(w io.Writer) error {
		plain, err := decompress.Open(k.Compression, io.TeeReader(body, w))
		if err != nil {
			return err
		}
		defer plain.Close()
		h := sha256.New()
		if _, err := io.Copy(h, io.LimitReader(plain, int64(min(n.NarSize, 1<<62))+1)); err != nil {
			return err
		}
		if [sha256.Size]byte(h.Sum(nil)) != narHash || !body.Drain(w) || body.Decoded {
			return fmt.Errorf("%s: %w", urls[i].URL, errOtherContents)
		}
		return nil
	})
	if broken := body.Failed(); broken != nil {
		return nil, fmt.Errorf("the nar of %s: %w", path, broken) // it may come another time
	} else if err != nil {
		a.o.Log("the nar of %s has no capability: %v", path, err)
		k = &knownNar{Form: upstreamForm}
	}
	return k, ctx.Err()
}

// annotate adds to a narinfo what there is. It is not complete if there will be more soon.
func (a *Annotator) annotate(ctx context.Context, text []byte) (annotated string, complete bool) {
	n, err := narinfo.Parse(text)
	if err != nil || n.CheckHash() != nil || narinfo.CheckStorePath(a.o.StoreDir, n.StorePath) != nil {
		return string(text), true
	}
	values, complete := a.capabilities(ctx, n)
	annotated, all := a.o.Deltas.addTo(withLines(n.Text(), values), n)
	return annotated, complete && all
}

// withLines returns the text of a narinfo with the lines of fields below the signature. The rest
// stays as it is but for empty lines at the end, which would end the record.
func withLines[F interface{ Text() string }](text string, fields []F) string {
	if len(fields) == 0 {
		return text
	}
	text = strings.TrimRight(text, "\n") + "\n"
	for _, f := range fields {
		text += f.Text() + "\n"
	}
	return text
}

// capabilities returns what is to be added to a narinfo: nothing to one that has some.
func (a *Annotator) capabilities(ctx context.Context, n *narinfo.Narinfo) (values []narinfo.ERIS, complete bool) {
	if a.o.Capabilities == nil {
		return nil, true
	}
	path := filepath.Join(a.o.Root, filepath.Base(n.StorePath))
	_, known := a.o.Capabilities.lookUp(path, n.NarDigest)
	if !known {
		if _, err := os.Lstat(path); err != nil {
			return nil, true
		}
	}
	if len(n.ERIS) > 0 {
		// Nothing is to be added, but our store should have the blocks.
		if !known {
			a.o.Capabilities.FindLater(path, n.NarDigest)
		}
		return nil, true
	}
	// What is in the store here was built here, perhaps, and is different.
	k, complete, err := a.o.Capabilities.find(ctx, path, n, a.o.WaitFor)
	return a.o.Capabilities.values(k), complete || err != nil
}
