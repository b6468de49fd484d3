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
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/dump"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/guixdb"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/session"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
)

type encodeSettings struct {
	store, secret string
	item, closure bool
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
input. --store=dump:- is standard output, which gets nothing else then: the URN
goes to standard error.

With --closure, PATHs are store items, as "explain" takes them, and everything
that they refer to is encoded too; each URN has the item behind it.`,
	}
	f := c.Flags()
	f.StringVar(&s.store, "store", "", "put the blocks into the store at `URL`; \"none\" is none (default: the first of $ERIS_STORE_URL, what runs here, or the first of the setting eris-stores)")
	f.StringVar(&s.secret, "convergence-secret", "", "use the convergence secret `BASE32`, or \"unique\" for one that nobody knows; by default everybody who encodes the same contents gets the same URN")
	f.BoolVar(&s.item, "item", false, "encode a file as if it were a store item")
	f.BoolVar(&s.closure, "closure", false, "encode store items with everything that they refer to")
	c.RunE = func(_ *cobra.Command, args []string) error {
		if slices.Contains(args, "") {
			return message.Usage("the name of what is to be encoded is empty; write . for the working directory")
		}
		if s.closure && len(args) == 0 {
			return message.Usage("encode --closure takes store items: guix-substitute-eris encode --closure --store=URL /gnu/store/…")
		}
		if len(args) != 1 && !s.closure {
			return message.Usage("encode takes one file or directory: guix-substitute-eris encode --store=URL FILE")
		}
		return s.run(c.Context(), args)
	}
	return c
}

func (s *encodeSettings) run(ctx context.Context, args []string) error {
	secret, err := convergenceSecret(s.secret)
	if err != nil {
		return err
	}
	if s.closure {
		s.item = true
		if args, err = closureOf(ctx, args); err != nil {
			return err
		}
	}
	store, err := settings.OpenToPut(s.store)
	if err != nil {
		return err
	}
	log := session.NewLog()
	if store == nil {
		nowhere := func(context.Context, eris.Reference, []byte) error { return nil }
		capabilities, err := s.encodeAll(ctx, args, nowhere, secret)
		if err == nil {
			log.Notef("nothing was stored, so that nobody can fetch it; --store=URL names a store")
			err = s.print(os.Stdout, capabilities, args)
		}
		return err
	}
	defer store.Close()
	out := os.Stdout
	if _, ok := store.(*dump.Stream); ok {
		if term.IsTerminal(1) {
			return message.Usage("a dump is not for a terminal; name a file: --store=dump:FILE")
		}
		out = os.Stderr
	}
	shown := log.Transfer(args[0], store.String())
	defer shown.Stop()
	if term.IsTerminal(2) {
		shown.Total(sizeOf(args))
	}
	put, err := putInto(ctx, store, " of "+strings.Join(args, ", "), func(sink eris.Sink) ([]eris.ReadCapability, error) {
		return s.encodeAll(ctx, args, func(ctx context.Context, ref eris.Reference, block []byte) error {
			shown.Add(len(block))
			return sink(ctx, ref, block)
		}, secret)
	})
	if err == nil {
		err = s.print(out, put.capabilities, args)
	}
	if err == nil {
		shown.Done("stored %v in %s", put, store)
	}
	return err
}

func (s *encodeSettings) print(out *os.File, capabilities []eris.ReadCapability, paths []string) error {
	for i, c := range capabilities {
		line := c.URN()
		if s.closure {
			line += " " + paths[i]
		}
		if _, err := fmt.Fprintln(out, line); err != nil {
			return err
		}
	}
	return nil
}

type blocksPut struct {
	capabilities []eris.ReadCapability
	blocks       int
	bytes        int64
}

func (b blocksPut) String() string {
	return page.Count(b.blocks, "block") + ", " + page.Size(b.bytes) + ","
}

// putInto has blocks put into a store, which is then told of the read capabilities that came of it.
// What the result counts is stored, also with an error.
func putInto(ctx context.Context, store fetch.Store, what string, produce func(sink eris.Sink) ([]eris.ReadCapability, error)) (put blocksPut, err error) {
	pipeline := fetch.NewPipeline(ctx, store)
	put.capabilities, err = produce(pipeline.Put)
	if stored := pipeline.Flush(); stored != nil { // also after an error: calls may be under way
		err = fmt.Errorf("storing the blocks%s: %w", what, stored)
	}
	if err == nil {
		err = settings.FinishPut(ctx, store, put.capabilities)
	}
	blocks, bytes := pipeline.Stored()
	put.blocks, put.bytes = int(blocks), bytes
	return put, err
}

func (s *encodeSettings) encodeAll(ctx context.Context, paths []string, sink eris.Sink, secret eris.ConvergenceSecret) (capabilities []eris.ReadCapability, err error) {
	for _, path := range paths {
		var c eris.ReadCapability
		if content := s.content(path); content != nil {
			c, err = encodeContent(ctx, content, sink, secret)
			content.Close()
		} else if path, err = filepath.Abs(path); err == nil {
			var e publish.Encoding
			e, err = publish.Encode(ctx, path, sink, erisfs.EncodeOptions{Secret: secret})
			c = e.Capability
		}
		if err != nil {
			return nil, err
		}
		capabilities = append(capabilities, c)
	}
	return capabilities, nil
}

// closureOf returns the store items that paths lead to, and everything that they refer to.
func closureOf(ctx context.Context, paths []string) ([]string, error) {
	store := settings.StoreDirectory()
	var items []string
	for _, path := range session.Names(paths) {
		item, err := (&session.Settings{Store: store}).FindItem(ctx, nil, path)
		if err != nil {
			return nil, err
		}
		items = append(items, item)
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
func encodeContent(ctx context.Context, content *os.File, sink eris.Sink, secret eris.ConvergenceSecret) (eris.ReadCapability, error) {
	before, err := content.Stat()
	if err != nil {
		return eris.ReadCapability{}, err
	}
	var from io.Reader = content
	if !before.Mode().IsRegular() {
		from = untilDone(ctx, func() (io.Reader, error) { return content, nil })
	}
	c, err := eris.Encode(ctx, from, sink, eris.EncodeOptions{Secret: secret})
	if after, err2 := content.Stat(); err == nil && before.Mode().IsRegular() {
		if err = err2; err == nil && (after.Size() != before.Size() || !after.ModTime().Equal(before.ModTime())) {
			err = fmt.Errorf("%s has changed while it was read", content.Name())
		}
	}
	return c, err
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
