// SPDX-License-Identifier: GPL-3.0-or-later

package publish

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/admission"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/compress"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

const (
	// stallTimeout is the default of [ServerOptions.StallTimeout].
	stallTimeout = 30 * time.Second
	// leastRate is how many bytes per second a client must take in the long run.
	leastRate = 4 << 10
	// maxWrite is how much is written before it is looked how fast the client takes it.
	maxWrite = 32 << 10
	// slotWait is how long a request waits until its nar can be compressed.
	slotWait = 30 * time.Second
)

// oneRange is a field Range that is not ignored (RFC 9110, section 14): net/http would answer one
// of no bytes as if they were some, and refuse to serve other units.
var oneRange = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^bytes=([0-9]+-[0-9]*|-0*[1-9][0-9]*)$`)
})

// accept refuses requests that are not to be served, and returns nil then: other methods than GET
// and HEAD, as if nothing were there, which is what "guix publish" does, and requests with a body,
// without waiting for it. Otherwise it returns where to write the answer; the client must take it
// fast enough.
func accept(w http.ResponseWriter, r *http.Request, stall time.Duration) http.ResponseWriter {
	controller := http.NewResponseController(w)
	switch {
	case r.ContentLength != 0:
		_ = controller.SetReadDeadline(time.Unix(1, 0)) // else net/http would read some of it
		w.Header().Set("Connection", "close")
		http.Error(w, "requests have no bodies here", http.StatusRequestEntityTooLarge)
		return nil
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		http.NotFound(w, r)
		return nil
	}
	// Guix appends "/HASH.narinfo" to URLs that end in a slash, and follows no redirection.
	r.URL.Path = "/" + strings.TrimLeft(r.URL.Path, "/")
	if r.URL.RawPath != "" {
		r.URL.RawPath = "/" + strings.TrimLeft(r.URL.RawPath, "/")
	}
	// Each of several ranges could take as long as the whole.
	if r.Method == http.MethodHead || !oneRange().MatchString(r.Header.Get("Range")) {
		r.Header.Del("Range")
	}
	return &pacedWriter{w, controller, stall, stall}
}

// A pacedWriter fails when the client takes what is written too slowly.
type pacedWriter struct {
	http.ResponseWriter
	controller  *http.ResponseController
	stall, left time.Duration // for how long it may take nothing, at most and now
}

// Unwrap is for http.ResponseController.
func (p *pacedWriter) Unwrap() http.ResponseWriter { return p.ResponseWriter }

// Write implements io.Writer.
func (p *pacedWriter) Write(b []byte) (written int, err error) {
	for len(b) > 0 && err == nil {
		begin := time.Now()
		if err = p.controller.SetWriteDeadline(begin.Add(p.left)); err != nil {
			return written, err
		}
		var n int
		n, err = p.ResponseWriter.Write(b[:min(len(b), maxWrite)])
		written += n
		b = b[n:]
		p.left = min(p.stall, p.left-time.Since(begin)+time.Duration(n)*time.Second/leastRate)
	}
	return written, err
}

// serveText answers with a text that is known by its hash.
func serveText(w http.ResponseWriter, r *http.Request, text string) {
	w.Header().Set("Etag", fmt.Sprintf(`"%x"`, sha256.Sum256([]byte(text))))
	http.ServeContent(w, r, "", time.Time{}, strings.NewReader(text))
}

// narTag tells the archives that items are served as apart, as ETag and as file name.
func narTag(digest [sha256.Size]byte, compression string) string {
	if compression == "none" {
		return fmt.Sprintf("%x", digest)
	}
	return fmt.Sprintf("%x-%s-%s", digest, compression, compress.Form)
}

// writeNar writes the nar of the tree at path, compressed as in [ServerOptions], and to others as
// it is. It makes the same bytes each time.
func writeNar(w io.Writer, path, compression string, others ...io.Writer) error {
	tree := nar.NewTree(path)
	defer tree.Close()
	z, err := compress.NewWriter(w, compression)
	if err != nil {
		return err
	}
	_, err = nar.Write(io.MultiWriter(append(others, z)...), tree)
	return cmp.Or(err, z.Close())
}

// nar serves an item's nar, from a file if it is kept; else it is compressed on the way.
func (s *Server) nar(w http.ResponseWriter, r *http.Request, compression string) {
	name := r.PathValue("item")
	item, err := s.named(r.Context(), name)
	if err == nil {
		item, err = s.complete(item)
	}
	if s.o.Nars != nil && narinfo.CheckStoreName(name) == nil && (err == nil || errors.Is(err, ErrNoItem)) {
		if s.keptNar(w, r, name, item, compression) {
			return
		}
	}
	if err != nil {
		s.failed(w, r, err)
		return
	}
	n := &narContent{ctx: r.Context(), path: s.file(item.StorePath), compression: compression}
	part := r.Header.Get("Range") != ""
	whole := false // of a size that is not known, and need not be
	if compression == "none" {
		n.size = int64(item.NarSize)
	} else {
		whole = !part && r.Header.Get("If-None-Match") == ""
	}
	if (compression != "none" || part) && !(whole && r.Method == http.MethodHead) {
		release, ok := s.slot(w, r)
		if !ok {
			return
		}
		defer release()
	}
	s.narHeader(w, narTag(item.NarDigest, compression))
	w.Header().Set("Accept-Ranges", "bytes")
	switch {
	case !whole:
		http.ServeContent(w, r, "", time.Time{}, n)
		err = n.close()
	case r.Method == http.MethodGet:
		sent := admission.Unfinished(r)
		if err = writeNar(w, n.path, compression); err == nil {
			sent()
		}
	}
	if err != nil {
		if r.Context().Err() == nil {
			s.o.Log("nar of %s: %v", n.path, err)
		}
		panic(http.ErrAbortHandler) // the client must see that it is not whole
	}
}

func (s *Server) narHeader(w http.ResponseWriter, tag string) {
	w.Header().Set("Content-Type", "application/x-nix-archive")
	w.Header().Set("Etag", `"`+tag+`"`)
	maxAge(w, s.o.TTL)
}

// slot waits until a nar may be compressed, or answers that there are too many.
func (s *Server) slot(w http.ResponseWriter, r *http.Request) (release func(), ok bool) {
	ctx, cancel := context.WithTimeout(r.Context(), slotWait)
	defer cancel()
	release, err := s.compressing.Acquire(ctx, r.RemoteAddr)
	if err != nil {
		w.Header().Set("Retry-After", "5")
		http.Error(w, "too many nars are being compressed", http.StatusServiceUnavailable)
	}
	return release, err == nil
}

// A narContent is a nar as an io.ReadSeeker, for [http.ServeContent]: it is made from its beginning
// when it is read, and what is before the offset is dropped. It must be closed.
type narContent struct {
	ctx               context.Context
	path, compression string
	size              int64 // 0: not known

	offset int64
	pipe   *io.PipeReader // nil: nothing has been read
	done   chan error
}

// Seek implements io.Seeker. The size is found out by making the nar, if it is not known.
func (n *narContent) Seek(offset int64, whence int) (int64, error) {
	if whence == io.SeekEnd {
		if n.size == 0 {
			count := &skipper{w: io.Discard}
			if err := writeNar(nar.Until(n.ctx, count), n.path, n.compression); err != nil {
				return 0, err
			}
			n.size = count.offset
		}
		offset += n.size
	}
	n.offset = offset
	return offset, nil
}

// Read implements io.Reader. Once it has been called, Seek must not be.
func (n *narContent) Read(p []byte) (int, error) {
	if n.pipe == nil {
		var w *io.PipeWriter
		n.pipe, w = io.Pipe()
		n.done = make(chan error, 1)
		go func() {
			err := writeNar(nar.Until(n.ctx, &skipper{w: w, skip: n.offset}), n.path, n.compression)
			w.CloseWithError(err)
			n.done <- err
		}()
	}
	return n.pipe.Read(p)
}

// close ends what makes the nar, and returns its error, if it was not closed before its end.
func (n *narContent) close() error {
	if n.pipe == nil {
		return nil
	}
	n.pipe.Close()
	if err := <-n.done; !errors.Is(err, io.ErrClosedPipe) {
		return err
	}
	return nil
}

// A skipper drops the first bytes that are written to it, and counts all.
type skipper struct {
	w            io.Writer
	skip, offset int64
}

// Write implements io.Writer.
func (s *skipper) Write(p []byte) (int, error) {
	dropped := min(int64(len(p)), max(0, s.skip-s.offset))
	s.offset += dropped
	if dropped == int64(len(p)) {
		return len(p), nil
	}
	n, err := s.w.Write(p[dropped:])
	s.offset += int64(n)
	return int(dropped) + n, err
}
