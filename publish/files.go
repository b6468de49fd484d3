// SPDX-License-Identifier: GPL-3.0-or-later

package publish

import (
	"compress/bzip2"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"
	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/admission"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// rawFile serves the contents of a file that is known by its hash.
func (s *Server) rawFile(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("name")
	var digest [sha256.Size]byte
	if err := nixbase32.Decode(digest[:], r.PathValue("hash")); err != nil || strings.Contains(name, "/") {
		http.NotFound(w, r)
		return
	}
	item, err := s.named(r.Context(), narinfo.FixedOutputName(s.o.StoreDir, name, digest))
	if err != nil {
		s.failed(w, r, err)
		return
	}
	f, err := openRegular(s.file(item.StorePath))
	if err != nil {
		s.failed(w, r, err)
		return
	}
	defer f.Close()
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Etag", fmt.Sprintf(`"%x"`, digest))
	maxAge(w, s.o.TTL)
	http.ServeContent(w, r, "", time.Time{}, f)
}

// openRegular opens a file that is a regular one, and no link to one.
func openRegular(path string) (*os.File, error) {
	f, _, err := files.OpenRegular(path, os.O_RDONLY|unix.O_NOFOLLOW)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, files.ErrSpecial) {
		err = fmt.Errorf("%w: %w", ErrNoItem, err)
	}
	return f, err
}

// log serves the build log of an item or of a derivation, which the daemon may have compressed
// (Guix, guix/store.scm: log-file; nix/libstore/build.cc: DerivationGoal::openLogFile).
func (s *Server) log(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("item")
	if s.o.LogDirectory == "" {
		http.NotFound(w, r)
		return
	}
	if !strings.HasSuffix(name, ".drv") {
		item, err := s.named(r.Context(), name)
		if err != nil {
			s.failed(w, r, err)
			return
		}
		name = item.Deriver
	}
	if narinfo.CheckStoreName(name) != nil { // or there is none
		http.NotFound(w, r)
		return
	}
	for _, suffix := range []string{".gz", ".bz2", ""} {
		f, err := openRegular(filepath.Join(s.o.LogDirectory, name[:2], name[2:]+suffix))
		if errors.Is(err, ErrNoItem) {
			continue
		}
		if err != nil {
			s.failed(w, r, err)
			return
		}
		defer f.Close()
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		text := io.Reader(f)
		switch suffix {
		case ".gz":
			text, err = gzip.NewReader(f)
		case ".bz2":
			text = bzip2.NewReader(f)
		}
		if err == nil && r.Method == http.MethodGet {
			sent := admission.Unfinished(r)
			if _, err = io.Copy(w, text); err == nil {
				sent()
			}
		}
		if err != nil {
			panic(http.ErrAbortHandler) // the client must see that it is not whole
		}
		return
	}
	http.NotFound(w, r)
}
