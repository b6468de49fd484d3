// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/dump"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/guixdb"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/session"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
)

// encodeSettings are the options of encode.
type encodeSettings struct {
	store, secret       string
	item, closure, json bool
}

func encodeCommand() *cobra.Command {
	var s encodeSettings
	c := &cobra.Command{
		Use:   "PATH",
		Short: "turn a file or a tree into blocks and a URN",
		Long: `Encode a file or a file tree as ERIS blocks and print the URN of its read
capability. A file is encoded as its contents, like other programs for ERIS do
it, without its name and permissions; a tree, or with --item a file too, is
encoded as "publish" encodes store items. "-" is the contents of standard
input.

Blocks are put into the store that --store, or else the first that the
variable ERIS_STORE_URL or the configuration file names, or else into the
block store that runs on this machine; with --store=none they are kept
nowhere. --store=dump:- is standard output, which gets nothing else then: the
URN goes to standard error.

With --closure, PATHs are store items, and everything that they refer to is
encoded too; each URN has the item behind it.`,
	}
	f := c.Flags()
	f.StringVar(&s.store, "store", "", "put the blocks into the store at `URL`; \"none\" is none (default: the first of $ERIS_STORE_URL, of the setting eris-stores, or what runs here)")
	f.StringVar(&s.secret, "convergence-secret", "", "use the convergence secret `BASE32`, or \"unique\" for one that nobody knows; by default everybody who encodes the same contents gets the same URN")
	f.BoolVar(&s.item, "item", false, "encode a file as if it were a store item")
	f.BoolVar(&s.closure, "closure", false, "encode store items with everything that they refer to")
	f.BoolVar(&s.json, "json", false, "print the result as JSON")
	c.RunE = func(_ *cobra.Command, args []string) error {
		if len(args) != 1 && (!s.closure || len(args) == 0) {
			return message.Usage("encode takes one file or directory: guix-substitute-eris encode --store=URL FILE")
		}
		return s.run(c.Context(), args)
	}
	return c
}

func (s *encodeSettings) run(ctx context.Context, args []string) error {
	store, err := settings.OpenToPut(s.store)
	if err != nil {
		return err
	}
	out, to := os.Stdout, ""
	if store != nil {
		defer store.Close()
		to = store.String()
		if _, ok := store.(*dump.Stream); ok {
			if term.IsTerminal(1) {
				return message.Usage("a dump is not for a terminal; name a file: --store=dump:FILE")
			}
			out = os.Stderr
		}
	}
	log := session.NewLog()
	shown := log.Transfer(args[0], to)
	defer shown.Stop()
	results, err := s.encodeAll(ctx, store, args, shown)
	if err != nil {
		return err
	}
	if err := s.print(out, results); err != nil {
		return err
	}
	var blocks, bytes int64
	for _, r := range results {
		blocks, bytes = blocks+r.Blocks, bytes+r.Bytes
	}
	if store != nil {
		shown.Done("stored %s, %s, in %s", page.Count(int(blocks), "block"), page.Size(bytes), store)
	} else {
		log.Notef("nothing was stored, so that nobody can fetch it; --store=URL names a store")
	}
	return nil
}

func (s *encodeSettings) print(out *os.File, results []encodeResult) error {
	if s.json && s.closure {
		return page.WriteJSON(out, results)
	} else if s.json {
		return page.WriteJSON(out, results[0])
	}
	for _, r := range results {
		if _, err := fmt.Fprintln(out, strings.TrimSpace(r.URN+" "+r.Path)); err != nil {
			return err
		}
	}
	return nil
}

// encodeResult is what encode prints.
type encodeResult struct {
	capability eris.ReadCapability
	URN        string `json:"urn"`
	// Path is the store item, of a closure.
	Path string `json:"path,omitempty"`
	// Form is "data" for the contents of a file, "eris-fs" or "nar" for a tree.
	Form string `json:"form"`
	// Size is the length of the contents of a file in bytes.
	Size *int64 `json:"size,omitempty"`
	// NarHash, NarSize and Files are those of a tree.
	NarHash string `json:"narHash,omitempty"`
	NarSize uint64 `json:"narSize,omitempty"`
	Files   int    `json:"files,omitempty"`
	// Blocks and Bytes are how many blocks were put, and how long they are in all; 0 without a
	// store.
	Blocks int64 `json:"blocks"`
	Bytes  int64 `json:"bytes"`
}

// encodeAll encodes what the arguments name into a store, which may be nil.
func (s *encodeSettings) encodeAll(ctx context.Context, store fetch.Store, args []string, shown *protocol.Transfer) ([]encodeResult, error) {
	secret, err := convergenceSecret(s.secret)
	if err != nil {
		return nil, err
	}
	paths := args
	if s.closure {
		s.item = true
		if paths, err = closureOf(ctx, args); err != nil {
			return nil, err
		}
	}
	if term.IsTerminal(2) {
		shown.Total(sizeOf(paths))
	}
	var results []encodeResult
	var capabilities []eris.ReadCapability
	for _, path := range paths {
		r, err := s.encode(ctx, store, path, secret, shown)
		if err != nil {
			return nil, err
		}
		if s.closure {
			r.Path = path
		}
		results, capabilities = append(results, r), append(capabilities, r.capability)
	}
	if store == nil {
		return results, nil
	}
	return results, settings.FinishPut(ctx, store, capabilities)
}

// closureOf returns the store items that paths lead to, and everything that they refer to.
func closureOf(ctx context.Context, paths []string) ([]string, error) {
	store := settings.StoreDirectory()
	var items []string
	for _, path := range paths {
		real, err := filepath.EvalSymlinks(path)
		if err != nil {
			return nil, err
		}
		inside, ok := strings.CutPrefix(real, store+"/")
		if !ok {
			return nil, message.Usage("%s is no item of the store %s; --closure takes %s/…", path, store, store)
		}
		name, _, _ := strings.Cut(inside, "/")
		items = append(items, store+"/"+name)
	}
	database, err := guixdb.Open(settings.DatabaseFile(), store, guixdb.Timeout)
	if err != nil {
		return nil, fmt.Errorf("the database of guix-daemon cannot be read: %w", err)
	}
	defer database.Close()
	return publish.Closure(ctx, database, store, items)
}

// sizeOf returns how many bytes the files of some trees have, as far as can be told.
func sizeOf(paths []string) (size int64) {
	for _, path := range paths {
		filepath.WalkDir(path, func(_ string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				if info, err := d.Info(); err == nil {
					size += info.Size()
				}
			}
			return nil
		})
	}
	return size
}

// encode encodes a file or a tree into a store, which may be nil.
func (s *encodeSettings) encode(ctx context.Context, store fetch.Store, path string, secret eris.ConvergenceSecret, shown *protocol.Transfer) (result encodeResult, err error) {
	put := eris.Sink(func(context.Context, eris.Reference, []byte) error { return nil })
	var pipeline *fetch.Pipeline
	if store != nil {
		pipeline = fetch.NewPipeline(ctx, store)
		put = pipeline.Put
	}
	sink := func(ctx context.Context, ref eris.Reference, block []byte) error {
		shown.Add(len(block))
		return put(ctx, ref, block)
	}
	if content := s.content(path); content != nil {
		defer content.Close()
		result, err = encodeContent(ctx, content, sink, secret)
	} else {
		result, err = encodeTree(ctx, path, sink, secret)
	}
	result.URN = result.capability.URN()
	if pipeline == nil {
		return result, err
	}
	if err2 := pipeline.Flush(); err2 != nil { // also after an error: calls may be under way
		return result, fmt.Errorf("storing the blocks of %s: %w", path, err2)
	}
	result.Blocks, result.Bytes = pipeline.Stored()
	return result, err
}

// content opens what is to be encoded as its contents; for a tree it returns nil. What cannot be
// opened counts as a tree, and is an error when that is encoded.
func (s *encodeSettings) content(path string) *os.File {
	if path == "-" {
		return os.Stdin
	}
	if info, err := os.Lstat(path); s.item || err != nil || !info.Mode().IsRegular() {
		return nil
	}
	f, _ := os.Open(path)
	return f
}

// encodeContent encodes the contents of a file, which must not change meanwhile.
func encodeContent(ctx context.Context, content *os.File, sink eris.Sink, secret eris.ConvergenceSecret) (encodeResult, error) {
	before, err := content.Stat()
	if err != nil {
		return encodeResult{}, err
	}
	var size int64
	var from io.Reader = content
	if !before.Mode().IsRegular() {
		from = untilDone(ctx, func() (io.Reader, error) { return content, nil })
	}
	c, err := eris.Encode(ctx, readerFunc(func(p []byte) (int, error) {
		n, err := from.Read(p)
		size += int64(max(n, 0))
		return n, err
	}), sink, eris.EncodeOptions{Secret: secret})
	if after, err2 := content.Stat(); err == nil && before.Mode().IsRegular() {
		if err = err2; err == nil && (after.Size() != before.Size() || !after.ModTime().Equal(before.ModTime())) {
			err = fmt.Errorf("%s has changed while it was read", content.Name())
		}
	}
	return encodeResult{capability: c, Form: string(image.Data), Size: &size}, err
}

// readerFunc is a function as an io.Reader.
type readerFunc func(p []byte) (int, error)

// Read implements io.Reader.
func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func encodeTree(ctx context.Context, path string, sink eris.Sink, secret eris.ConvergenceSecret) (encodeResult, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return encodeResult{}, err
	}
	e, err := publish.Encode(ctx, path, sink, erisfs.EncodeOptions{Secret: secret})
	return encodeResult{
		capability: e.Capability, Form: e.Form, NarHash: "sha256:" + nixbase32.EncodeToString(e.NarHash[:]),
		NarSize: e.NarSize, Files: e.Files,
	}, err
}

func convergenceSecret(text string) (secret eris.ConvergenceSecret, err error) {
	switch text {
	case "":
		return secret, nil
	case "unique":
		_, err := rand.Read(secret[:])
		return secret, err
	}
	if secret, err = eris.ParseConvergenceSecret(text); err != nil {
		err = message.Usage("%w\nhint: \"unique\" makes one that nobody knows; without the option the URN depends on the contents alone", err)
	}
	return secret, err
}
