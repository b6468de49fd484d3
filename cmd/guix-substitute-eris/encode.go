// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
)

// encodeSettings are the options of encode.
type encodeSettings struct {
	store, secret string
	item, json    bool
}

// encodeCommand turns a file or a tree into blocks and a URN.
func encodeCommand() *cobra.Command {
	var s encodeSettings
	c := &cobra.Command{
		Use:   "PATH",
		Short: "turn a file or a tree into blocks and a URN",
		Long: `Encode a file or a file tree as ERIS blocks and print the URN of its read
capability. A file is encoded as its contents, like other programs for ERIS do
it, without its name and permissions; a tree, or with --item a file too, is
encoded as "publish" encodes store items. "-" is the contents of standard input.

Blocks are put into the store that --store, or else the first that the variable
ERIS_STORE_URL or the configuration file names; with --store=none, or if none is
named, they are kept nowhere.`,
	}
	f := c.Flags()
	f.StringVar(&s.store, "store", "", "put the blocks into the store at `URL`; \"none\" is none (default: the first of $ERIS_STORE_URL, or of the setting eris-stores)")
	f.StringVar(&s.secret, "convergence-secret", "", "use the convergence secret `BASE32`, or \"unique\" for one that nobody knows; by default everybody who encodes the same contents gets the same URN")
	f.BoolVar(&s.item, "item", false, "encode a file as if it were a store item")
	f.BoolVar(&s.json, "json", false, "print the result as JSON")
	c.RunE = func(_ *cobra.Command, args []string) error {
		if len(args) != 1 {
			return message.Usage("encode takes one file or directory: guix-substitute-eris encode --store=URL FILE")
		}
		result, err := s.encode(c.Context(), args[0])
		if err == nil && s.json {
			err = page.JSON(result)
		} else if err == nil {
			_, err = fmt.Println(result.URN)
		}
		return err
	}
	return c
}

// encodeResult is what encode prints.
type encodeResult struct {
	URN string `json:"urn"`
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

func (s *encodeSettings) encode(ctx context.Context, path string) (result encodeResult, err error) {
	secret, err := convergenceSecret(s.secret)
	if err != nil {
		return result, err
	}
	if s.store == "" {
		file, err := settings.Read()
		if err != nil {
			return result, err
		}
		if urls := settings.StoreURLs("", file); len(urls) > 0 {
			s.store = urls[0]
		}
	}
	sink := eris.Sink(func(context.Context, eris.Reference, []byte) error { return nil })
	var pipeline *fetch.Pipeline
	var store fetch.Store
	if s.store != "" && s.store != "none" {
		if store, err = settings.OpenStore(s.store); err != nil {
			return result, err
		}
		defer store.Close()
		pipeline = fetch.NewPipeline(ctx, store)
		sink = pipeline.Put
	}
	shown := showProgress("encoded")
	defer shown.end()
	counted := eris.Sink(func(ctx context.Context, ref eris.Reference, block []byte) error {
		shown.add(len(block))
		return sink(ctx, ref, block)
	})
	if content := s.content(path); content != nil {
		defer content.Close()
		result, err = encodeContent(ctx, content, counted, secret)
	} else {
		result, err = encodeTree(ctx, path, counted, secret)
	}
	if pipeline == nil {
		return result, err
	}
	if err2 := pipeline.Flush(); err2 != nil { // also after an error: calls may be under way
		return result, fmt.Errorf("storing the blocks of %s: %w", path, err2)
	}
	result.Blocks, result.Bytes = pipeline.Stored()
	if err == nil {
		err = settings.AddCapability(ctx, store, result.URN)
	}
	return result, err
}

// content opens what is to be encoded as its contents; for a tree it returns nil. What cannot be
// opened counts as a tree, and is an error when that is encoded.
func (s *encodeSettings) content(path string) *os.File {
	if path == "-" {
		return os.Stdin
	}
	if s.item {
		return nil
	}
	if info, err := os.Lstat(path); err != nil || !info.Mode().IsRegular() {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	return f
}

// encodeContent encodes the contents of a file, which must not change meanwhile.
func encodeContent(ctx context.Context, content *os.File, sink eris.Sink, secret eris.ConvergenceSecret) (encodeResult, error) {
	before, err := content.Stat()
	if err != nil {
		return encodeResult{}, err
	}
	var size int64
	c, err := eris.Encode(ctx, readerFunc(func(p []byte) (int, error) {
		n, err := content.Read(p)
		size += int64(max(n, 0))
		return n, err
	}), sink, eris.EncodeOptions{Secret: secret})
	if after, err2 := content.Stat(); err == nil && before.Mode().IsRegular() {
		if err = err2; err == nil && (after.Size() != before.Size() || !after.ModTime().Equal(before.ModTime())) {
			err = fmt.Errorf("%s has changed while it was read", content.Name())
		}
	}
	return encodeResult{URN: c.URN(), Form: string(image.Data), Size: &size}, err
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
	e, err := publish.Encode(ctx, path, sink, secret)
	return encodeResult{
		URN: e.Capability.URN(), Form: e.Form, NarHash: "sha256:" + nixbase32.EncodeToString(e.NarHash[:]),
		NarSize: e.NarSize, Files: e.Files,
	}, err
}

// convergenceSecret reads the secret that a user names.
func convergenceSecret(text string) (secret eris.ConvergenceSecret, err error) {
	switch text {
	case "":
		return secret, nil
	case "unique":
		_, err := rand.Read(secret[:])
		return secret, err
	}
	return eris.ParseConvergenceSecret(text)
}

// A progress shows on a terminal how many bytes have been dealt with.
type progress struct {
	n    atomic.Int64
	stop chan struct{}
	done chan struct{}
}

// showProgress begins; what names the deed in the past tense.
func showProgress(what string) *progress {
	p := &progress{stop: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(p.done)
		if !term.IsTerminal(2) {
			return
		}
		ticker := time.NewTicker(200 * time.Millisecond)
		defer ticker.Stop()
		for begin := time.Now(); ; {
			select {
			case <-ticker.C:
				n := p.n.Load()
				fmt.Fprintf(os.Stderr, "\r\x1b[K%.1f MiB %s, %.1f MiB/s", float64(n)/(1<<20), what, float64(n)/(1<<20)/time.Since(begin).Seconds())
			case <-p.stop:
				fmt.Fprint(os.Stderr, "\r\x1b[K")
				return
			}
		}
	}()
	return p
}

func (p *progress) add(n int) { p.n.Add(int64(n)) }

func (p *progress) end() {
	close(p.stop)
	<-p.done
}
