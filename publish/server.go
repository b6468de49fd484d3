// SPDX-License-Identifier: GPL-3.0-or-later

// Package publish is the side that gives: it turns store items into read capabilities and blocks,
// and serves signed narinfos and nars over HTTP, in the layout of "guix publish" with the field
// ERIS in addition. Start with [NewServer]; [Encode] encodes a single tree; [Annotator] adds read
// capabilities to the narinfos of another server.
package publish

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/admission"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/compress"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/reuse"
)

// ServerOptions say what a [Server] serves.
type ServerOptions struct {
	// StoreDir is the store directory that narinfos name, without a slash at its end; Root is where
	// it is, if not there.
	StoreDir, Root string
	// Items knows what is in the store.
	Items Items
	// Key signs narinfos; nil leaves them unsigned.
	Key *acl.SigningKey
	// Host is the name in signatures. Default that of this machine.
	Host string
	// Capabilities finds read capabilities; nil leaves the field ERIS out.
	Capabilities *Capabilities
	// Nars keeps nars that have been compressed; nil keeps none.
	Nars *Nars
	// Deltas has deltas of the items; nil has none.
	Deltas *Deltas
	// Blocks serves blocks, at /uri-res/N2R; nil if none are served.
	Blocks http.Handler
	// WaitFor is the length in bytes of the largest archive of an item that a request waits to be
	// encoded for, if it does not take too long: see [Capabilities.FindSoon]. The capability of
	// another one is in the narinfo when it has been computed; until then the narinfo, without it,
	// is to be kept for a minute only.
	WaitFor uint64
	// Compressions are the ways in which nars are offered, in this order: none, gzip, lzip and
	// zstd, each once. A level may follow: gzip:1 to gzip:9, lzip:1 to lzip:9, zstd:1 to zstd:22.
	Compressions []string
	// NarPath is below which path nars are; slashes that separate nothing do not count. Default "nar".
	NarPath string
	// TTL is for how long narinfos may be kept, and NegativeTTL for how long it may be that an item
	// is not there; 0 does not say.
	TTL, NegativeTTL time.Duration
	// StallTimeout is for how long a client may take nothing of an answer; it must take 4 KiB per
	// second in the long run. Default 30 s.
	StallTimeout time.Duration
	// LogDirectory is where the daemon keeps build logs; empty if they are not served.
	LogDirectory string
	// BlockStores are the URLs where clients may get the blocks, for nix-cache-info; one without a
	// host is on that of this server.
	BlockStores []string
	// Log is where messages go.
	Log func(format string, a ...any)
}

// A Server serves narinfos and nars. It is an http.Handler.
type Server struct {
	o   ServerOptions
	mux *http.ServeMux

	compressing *admission.Slots
	walking     singleflight.Group
	walkers     chan struct{}    // one per core may walk at a time
	failures    admission.Seldom // that are logged

	mu       sync.Mutex
	archives map[string]archive // by path
}

// archive is what is known of the archive of an item that is, or was, in the store.
type archive struct {
	file   os.FileInfo
	digest [sha256.Size]byte
	size   uint64 // 0 if it and the digest are not known, but only that it can be made
	failed string // why it could not be made the last time
}

const (
	// maxKept is how many archives are kept in memory.
	maxKept = 10000
	// compressingPerCore is how many nars are compressed at a time for each core. More than one,
	// because clients take them slowly.
	compressingPerCore = 4
)

// temporaryTTL is for how long a narinfo may be kept that will say more soon.
const temporaryTTL = time.Minute

// NewServer returns a server, or an error for options that make no sense.
func NewServer(o ServerOptions) (*Server, error) {
	name, _ := os.Hostname()
	o.Root, o.Host = cmp.Or(o.Root, o.StoreDir), cmp.Or(o.Host, name, "localhost")
	if len(o.Compressions) == 0 {
		o.Compressions = []string{"zstd", "gzip"}
	}
	o.NarPath = strings.Join(strings.FieldsFunc(cmp.Or(o.NarPath, "nar"), func(r rune) bool { return r == '/' }), "/")
	if !regexp.MustCompile(`^(/[A-Za-z0-9_-][A-Za-z0-9._~-]*)+$`).MatchString("/"+o.NarPath) || o.NarPath == "log" {
		return nil, fmt.Errorf("nars cannot be below the path %.100q; choose letters and digits, and not \"log\"", o.NarPath)
	}
	forms := map[string]string{"none": "none", "gzip": "gzip", "lzip": "lzip", "zstd": "zstd"}
	offered := map[string]bool{}
	for _, c := range o.Compressions {
		kind, _, ok := compress.Split(c)
		if !ok {
			return nil, fmt.Errorf("nars cannot be compressed with %.100q; none, gzip (levels 1 to 9), lzip (1 to 9) and zstd (1 to 22) are known", c)
		} else if offered[kind] {
			return nil, fmt.Errorf("nars can be compressed with %s at one level only", kind)
		}
		forms[kind], offered[kind] = c, true
	}
	s := &Server{
		o: o, mux: http.NewServeMux(),
		compressing: admission.NewSlots(compressingPerCore * runtime.GOMAXPROCS(0)),
		walkers:     make(chan struct{}, runtime.GOMAXPROCS(0)),
		archives:    map[string]archive{},
	}
	s.mux.HandleFunc("GET /{$}", s.welcome)
	s.mux.HandleFunc("GET /nix-cache-info", s.cacheInfo)
	s.mux.HandleFunc("GET /signing-key.pub", s.signingKey)
	s.mux.HandleFunc("GET /{name}", s.narinfo)
	s.mux.HandleFunc("GET /file/{name}/sha256/{hash}", s.rawFile)
	s.mux.HandleFunc("GET /log/{item}", s.log)
	for kind, form := range forms {
		path := "/" + o.NarPath + "/" + kind
		if kind == "none" {
			path = "/" + o.NarPath
		} else if kind == "lzip" && !offered[kind] {
			continue // too dear for whoever asks
		}
		s.mux.HandleFunc("GET "+path+"/{item}", func(w http.ResponseWriter, r *http.Request) { s.nar(w, r, form) })
	}
	if o.Blocks != nil {
		s.mux.Handle("GET /uri-res/N2R", o.Blocks)
	}
	if o.Deltas != nil {
		s.mux.HandleFunc("GET /delta/", func(w http.ResponseWriter, r *http.Request) {
			if !o.Deltas.serve(w, r) {
				http.NotFound(w, r)
			}
		})
	}
	return s, nil
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if w := accept(w, r, cmp.Or(s.o.StallTimeout, stallTimeout)); w != nil {
		s.mux.ServeHTTP(w, r)
	}
}

func (s *Server) welcome(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	io.WriteString(w, welcomePage)
}

const welcomePage = `<!DOCTYPE html>
<html lang="en"><head><title>Substitutes</title></head>
<body><h1>Substitutes for GNU Guix</h1>
<p>This is a substitute server: give its address to <code>guix-daemon</code> by the option
<code>--substitute-urls</code>. Narinfos have ERIS read capabilities where they are known. The
key that signs them is <a href="signing-key.pub">here</a>.</p></body></html>
`

func (s *Server) cacheInfo(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/plain")
	io.WriteString(w, cacheInfo(s.o.StoreDir))
	if len(s.o.BlockStores) > 0 {
		fmt.Fprintf(w, "BlockStores: %s\n", strings.Join(s.o.BlockStores, " "))
	}
}

// cacheInfo is the text of nix-cache-info, by which clients know a substitute server.
func cacheInfo(storeDir string) string {
	return fmt.Sprintf("StoreDir: %s\nWantMassQuery: 0\nPriority: 100\n", storeDir)
}

func (s *Server) signingKey(w http.ResponseWriter, r *http.Request) {
	if s.o.Key == nil {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "text/plain")
	io.WriteString(w, s.o.Key.PublicKey().Text())
}

// maxAge says for how long an answer may be kept.
func maxAge(w http.ResponseWriter, d time.Duration) {
	if d > 0 {
		w.Header().Set("Cache-Control", fmt.Sprintf("max-age=%d", d/time.Second))
	}
}

func (s *Server) narinfo(w http.ResponseWriter, r *http.Request) {
	hashPart, ok := narinfoName(r.PathValue("name"))
	if !ok {
		http.NotFound(w, r)
		return
	}
	var text string
	complete := false
	item, err := s.item(r.Context(), hashPart)
	if err == nil {
		text, complete, err = s.text(r.Context(), item)
	} else if errors.Is(err, ErrNoItem) {
		text, err = s.gone(r.Context(), hashPart)
	}
	if err != nil {
		if errors.Is(err, ErrNoItem) {
			maxAge(w, s.o.NegativeTTL)
		}
		s.failed(w, r, err)
		return
	}
	ttl := s.o.TTL
	if !complete {
		ttl = temporaryTTL
	}
	maxAge(w, ttl)
	w.Header().Set("Content-Type", "application/x-nix-narinfo")
	serveText(w, r, text)
}

// gone returns the narinfo of an item that has left the store, if it can be had from its blocks or
// as a nar that is kept.
func (s *Server) gone(ctx context.Context, hashPart string) (string, error) {
	if s.o.Capabilities != nil {
		text, ok := s.o.Capabilities.gone(ctx, hashPart)
		if ok && strings.HasPrefix(text, "StorePath: "+s.o.StoreDir+"/"+hashPart) {
			return text, nil
		}
	}
	item, err := s.kept(ctx, hashPart)
	if err != nil {
		return "", err
	}
	return s.sign(item, nil)
}

// narinfoName returns the hash part in the file name of a narinfo. What it returns has nothing in
// it but the digits of nix-base32, whatever the name was.
func narinfoName(name string) (hashPart string, ok bool) {
	hashPart, ok = strings.CutSuffix(name, ".narinfo")
	return hashPart, ok && isHashPart(hashPart)
}

func isHashPart(name string) bool {
	return nixbase32.Decode(make([]byte, reuse.HashLength*5/8), name) == nil
}

// item looks an item up, and completes what is known of it.
func (s *Server) item(ctx context.Context, hashPart string) (*narinfo.Narinfo, error) {
	n, err := s.lookUp(ctx, s.o.Items, hashPart)
	if err != nil {
		return nil, err
	}
	return s.complete(n)
}

// lookUp looks an item up among some.
func (s *Server) lookUp(ctx context.Context, items Items, hashPart string) (*narinfo.Narinfo, error) {
	n, err := items.Item(ctx, hashPart)
	if err != nil {
		return nil, err
	}
	if part, err := narinfo.HashPart(s.o.StoreDir, n.StorePath); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoItem, err)
	} else if part != hashPart {
		return nil, fmt.Errorf("%w: what is known of %s is about %s", ErrNoItem, hashPart, n.StorePath)
	}
	return n, nil
}

// complete checks that an item is there and can be published, and completes what is known of it.
func (s *Server) complete(n *narinfo.Narinfo) (*narinfo.Narinfo, error) {
	info, err := os.Lstat(s.file(n.StorePath))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoItem, err)
	}
	path, unknown := s.file(n.StorePath), n.NarDigest == [sha256.Size]byte{} || !n.NarSizeKnown
	if !unknown && s.o.Capabilities != nil {
		if _, ok := s.o.Capabilities.lookUp(path, n.NarDigest); ok {
			return n, nil // it has been walked
		}
	}
	a, err := s.walk(path, info, unknown)
	if err != nil {
		return nil, err
	}
	if unknown {
		clone := *n
		clone.NarDigest, clone.NarSize, clone.NarSizeKnown, clone.NarHash = a.digest, a.size, true, ""
		n = &clone
	}
	return n, nil
}

// walk finds out whether the item at path can be made an archive, and the hash of that if need be,
// once for as long as the item stays the same file or directory. The error wraps [ErrNoItem] if it
// never can.
func (s *Server) walk(path string, info os.FileInfo, hash bool) (archive, error) {
	s.mu.Lock()
	a := s.archives[path]
	s.mu.Unlock()
	if (a.size > 0 || !hash) && os.SameFile(a.file, info) && a.file.ModTime().Equal(info.ModTime()) {
		return a, nil
	}
	v, err, _ := s.walking.Do(fmt.Sprint(hash, path), func() (any, error) {
		s.walkers <- struct{}{}
		defer func() { <-s.walkers }()
		a, err := walk(path, hash)
		a.file = info
		if err != nil {
			a = archive{failed: err.Error()}
			if !errors.As(err, new(*fs.PathError)) {
				err = fmt.Errorf("%w: %w", ErrNoItem, err)
			}
		}
		if before := s.keep(path, a); err != nil && before.failed != a.failed {
			s.o.Log("%s cannot be published: %s", path, a.failed)
		}
		return a, err
	})
	return v.(archive), err
}

// keep keeps what is known of an archive, and returns what was known before.
func (s *Server) keep(path string, a archive) (before archive) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before = s.archives[path]
	if len(s.archives) >= maxKept {
		clear(s.archives)
	}
	s.archives[path] = a
	return before
}

func walk(path string, hash bool) (a archive, err error) {
	if hash {
		a.digest, a.size, err = nar.HashTree(context.Background(), path)
		return a, err
	}
	tree := nar.NewTree(path)
	defer tree.Close()
	return a, nar.Walk(tree, func(nar.Node) error { return nil })
}

// file is where a store item is.
func (s *Server) file(path string) string { return filepath.Join(s.o.Root, filepath.Base(path)) }

// text makes the narinfo of an item. It is not complete if there will be more in it soon.
func (s *Server) text(ctx context.Context, item *narinfo.Narinfo) (text string, complete bool, err error) {
	kept, complete := s.keepNars(item), true
	var k known
	var values []narinfo.ERIS
	if s.o.Capabilities != nil {
		k, complete, err = s.o.Capabilities.find(ctx, s.file(item.StorePath), item, s.o.WaitFor)
		values = s.o.Capabilities.values(k)
		if errors.Is(err, errOtherContents) {
			return "", false, fmt.Errorf("%w: %w", ErrNoItem, err)
		}
	}
	// Without capabilities, the nar can still be had.
	if text, err = s.sign(item, values); err != nil {
		return "", false, err
	}
	if s.o.Capabilities != nil && complete {
		s.o.Capabilities.keepNarinfo(k, text)
	}
	text, all := s.o.Deltas.addTo(text, item)
	return text, complete && kept && all, nil
}

// sign makes the narinfo of an item with read capabilities, or without any.
func (s *Server) sign(item *narinfo.Narinfo, capabilities []narinfo.ERIS) (string, error) {
	n := &narinfo.Narinfo{
		StorePath: item.StorePath, NarDigest: item.NarDigest, NarSize: item.NarSize,
		References: item.References, Deriver: item.Deriver, ERIS: capabilities,
	}
	part, err := narinfo.SignedPart(n)
	if err != nil {
		return "", err
	}
	signature := ""
	if s.o.Key != nil {
		if signature, err = s.o.Key.Sign(sha256.Sum256([]byte(part)), s.o.Host); err != nil {
			return "", err
		}
	}
	return narinfo.Text(part, signature, s.urls(n))
}

// urls are the places of the nar of an item.
func (s *Server) urls(item *narinfo.Narinfo) []narinfo.URL {
	name := strings.ReplaceAll(url.PathEscape(filepath.Base(item.StorePath)), "+", "%2B")
	var urls []narinfo.URL
	for _, form := range s.o.Compressions {
		c, _, _ := compress.Split(form)
		u := narinfo.URL{URL: s.o.NarPath + "/" + c + "/" + name, Compression: c}
		if c == "none" {
			u = narinfo.URL{URL: s.o.NarPath + "/" + name, Compression: c, FileSize: item.NarSize, SizeKnown: true}
		}
		for _, e := range item.ERIS {
			if e.Form == "nar."+c {
				u.FileSize, u.SizeKnown = e.Size, true
			}
		}
		if s.o.Nars != nil && !u.SizeKnown {
			u.FileSize, u.SizeKnown = s.o.Nars.size(narTag(item.NarDigest, form))
		}
		urls = append(urls, u)
	}
	return urls
}

// named returns what is known of the item with the given name.
func (s *Server) named(ctx context.Context, name string) (*narinfo.Narinfo, error) {
	if err := narinfo.CheckStoreName(name); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoItem, err)
	}
	item, err := s.o.Items.Item(ctx, name[:32]) // the digits of a hash, after the check
	if err == nil && item.StorePath != s.o.StoreDir+"/"+name {
		err = fmt.Errorf("%w: %s", ErrNoItem, name)
	}
	return item, err
}

// failed answers a request for something that cannot be had.
func (s *Server) failed(w http.ResponseWriter, r *http.Request, err error) {
	if errors.Is(err, ErrNoItem) {
		http.NotFound(w, r)
		return
	}
	if s.failures.DueFor(r) {
		s.o.Log("%s: %v", r.URL.Path, err)
	}
	http.Error(w, "internal error", http.StatusInternalServerError)
}
