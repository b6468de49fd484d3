// SPDX-License-Identifier: GPL-3.0-or-later

package publish

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/admission"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/tasks"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

const (
	// leastTTL is for how long a nar is kept at least that nobody asks for, and usedEvery how
	// exactly it is noted that somebody does.
	leastTTL  = 30 * 24 * time.Hour
	usedEvery = time.Hour
	// cleanEvery is when it is looked again what can be removed.
	cleanEvery = 24 * time.Hour
)

// A shelf is a directory of what is made of items in the background. What is made has a key, by
// which it is made once for all who want it.
type shelf struct {
	directory string
	log       func(format string, a ...any)
	making    *tasks.Tasks
}

func newShelf(directory string, workers int, log func(format string, a ...any)) shelf {
	return shelf{directory, log, tasks.New(workers, log)}
}

// Close ends what goes on in the background, and waits for it. What is half made is removed, and
// what is asked for from then on fails.
func (s *shelf) Close() { s.making.Close() }

func (s *shelf) file(name string) string { return filepath.Join(s.directory, name) }

// record is the file with what is known of the item that has the hash part.
func (s *shelf) record(hashPart string) string { return s.file(hashPart + ".json") }

// Nars keeps compressed nars in files, as "guix publish --cache" does, so that each is made once,
// its size is known, and it can be had for a while after the item has left the store. It is safe
// for concurrent use.
type Nars struct {
	shelf    // makes by file name
	ttl      time.Duration
	cleaning admission.Seldom
}

// NewNars returns what is kept in a directory, which is made when there is something to keep; of
// what is made, workers at a time, at least 1. What nobody has asked for in ttl, or in 30 days if
// that is longer, is removed now, and every day that something is made. Messages go to log. Close
// must be called at the end.
func NewNars(directory string, workers int, ttl time.Duration, log func(format string, a ...any)) *Nars {
	n := &Nars{shelf: newShelf(directory, workers, log), ttl: max(ttl, leastTTL), cleaning: admission.Seldom{Every: cleanEvery}}
	n.clean()
	return n
}

// clean removes, once a day, what has not been used for long, and what a process has left that was
// killed.
func (n *Nars) clean() {
	if !n.cleaning.Due() {
		return
	}
	files.RemoveAbandoned(n.directory)
	if err := removeUnused(n.directory, n.ttl, func(string) bool { return true }); err != nil && !errors.Is(err, fs.ErrNotExist) {
		n.log("%v", err)
	}
}

// size returns the length of a nar in bytes, if it is kept. A file that is empty is what a power
// failure may leave.
func (n *Nars) size(name string) (size uint64, ok bool) {
	info, err := os.Lstat(n.file(name))
	if err != nil || info.Size() == 0 {
		return 0, false
	}
	return uint64(info.Size()), true
}

// open opens a nar. The error wraps [fs.ErrNotExist] if it is not kept.
func (n *Nars) open(name string) (*os.File, error) {
	f, info, err := files.OpenRegular(n.file(name), os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	if info.Size() == 0 {
		f.Close()
		return nil, &fs.PathError{Op: "open", Path: f.Name(), Err: fs.ErrNotExist}
	}
	used(f.Name())
	return f, nil
}

// used notes that somebody has asked for what is in a file, if it is there.
func used(path string) {
	info, err := os.Lstat(path)
	if now := time.Now(); err == nil && now.Sub(info.ModTime()) > usedEvery {
		os.Chtimes(path, time.Time{}, now)
	}
}

// removeUnused removes the files of a directory that are meant and that nobody has asked for in
// ttl, until the last time that somebody has asked for one of them: the clock may be ahead. The
// error is that the directory cannot be read.
func removeUnused(directory string, ttl time.Duration, meant func(name string) bool) error {
	all, err := oldestFirst(directory, meant)
	for _, info := range all {
		last := all[len(all)-1].ModTime()
		if min(last.Sub(info.ModTime()), time.Since(info.ModTime())) > ttl {
			os.Remove(filepath.Join(directory, info.Name()))
		}
	}
	return err
}

// oldestFirst returns those files of a directory that are meant.
func oldestFirst(directory string, meant func(name string) bool) (all []fs.FileInfo, err error) {
	entries, err := os.ReadDir(directory)
	for _, e := range entries {
		if info, err := e.Info(); err == nil && meant(e.Name()) {
			all = append(all, info)
		}
	}
	slices.SortFunc(all, func(a, b fs.FileInfo) int { return a.ModTime().Compare(b.ModTime()) })
	return all, err
}

// removeUnusedRecords removes what is known in a directory of items, which need not be there, and
// what a process has left that was killed.
func removeUnusedRecords(directory string) {
	files.RemoveAbandoned(directory)
	_ = removeUnused(directory, leastTTL, func(name string) bool {
		hashPart, ok := strings.CutSuffix(name, ".json")
		return ok && isHashPart(hashPart)
	})
}

// make has a nar made in the background, if it is not kept, of the tree at path, which must have
// the hash, or it is not kept; then made is called. Failures are logged; then it can be tried again
// in a minute.
func (n *Nars) make(name, path, compression string, hash [sha256.Size]byte, made func()) {
	n.making.Start(name, func(ctx context.Context) error {
		if _, ok := n.size(name); ok {
			return nil // it has just been made
		}
		if err := files.MakeDirectory(n.directory); err != nil {
			return err
		}
		n.clean()
		// It has no checksum, and is kept for as long as somebody asks for it.
		err := files.Replace(n.file(name), 0o600, files.Options{Sync: true}, func(w io.Writer) error {
			sum := sha256.New()
			err := writeNar(nar.Until(ctx, w), path, compression, nar.Until(ctx, sum))
			if err == nil && [sha256.Size]byte(sum.Sum(nil)) != hash {
				err = errOtherContents
			}
			if err != nil {
				err = fmt.Errorf("compressing %s: %w", path, err)
			}
			return err
		})
		if err == nil {
			made()
		}
		return err
	})
}

// note keeps what is known of an item for when it has left the store: a narinfo without signature
// that names no nar, in the file HASH.narinfo.
func (n *Nars) note(item *narinfo.Narinfo) error {
	part, err := narinfo.SignedPart(item)
	if err != nil {
		return err
	}
	text, err := narinfo.Text(part, "", []narinfo.URL{{URL: "nar", Compression: "none"}})
	if err != nil {
		return err
	}
	name := hashPartOf(item.StorePath) + ".narinfo"
	if kept, err := files.ReadRegular(n.file(name), narinfo.MaxSize); err == nil && string(kept) == text {
		used(n.file(name))
		return nil
	}
	return files.Write(n.file(name), 0o600, files.Options{}, []byte(text))
}

// keepNars reports whether all nars of an item are kept that are to be; those that are not are made
// in the background.
func (s *Server) keepNars(item *narinfo.Narinfo) bool {
	if s.o.Nars == nil {
		return true
	}
	all, some, path := true, false, s.file(item.StorePath)
	for _, c := range s.o.Compressions {
		if c == "none" {
			continue
		}
		some = true
		name := narTag(item.NarDigest, c)
		if _, ok := s.o.Nars.size(name); ok {
			continue
		}
		all = false
		// The item may leave the store before anybody asks again.
		s.o.Nars.make(name, path, c, item.NarDigest, func() { s.keepNars(item) })
	}
	if all && some {
		if err := s.o.Nars.note(item); err != nil && s.failures.Due() {
			s.o.Log("what is known of %s cannot be kept: %v", path, err)
		}
	}
	return all
}

// keptNar serves a nar that is kept, of an item that may have left the store and is nil then. It
// reports whether there is one; if not, nothing has been written.
func (s *Server) keptNar(w http.ResponseWriter, r *http.Request, name string, item *narinfo.Narinfo, compression string) bool {
	if item == nil {
		var err error
		if item, err = s.kept(r.Context(), hashPartOf(name)); err != nil || item.StorePath != s.o.StoreDir+"/"+name {
			return false
		}
	}
	tag := narTag(item.NarDigest, compression)
	f, err := s.o.Nars.open(tag)
	if err != nil {
		return false
	}
	defer f.Close()
	s.narHeader(w, tag)
	http.ServeContent(w, r, "", time.Time{}, f)
	return true
}

// kept looks an item up that has left the store, but of which nars are kept.
func (s *Server) kept(ctx context.Context, hashPart string) (*narinfo.Narinfo, error) {
	if s.o.Nars == nil {
		return nil, fmt.Errorf("%w: %s", ErrNoItem, hashPart)
	}
	used(s.o.Nars.file(hashPart + ".narinfo"))
	return s.lookUp(ctx, Directory(s.o.Nars.directory), hashPart)
}
