// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
)

const encodeUsage = `Usage: guix-substitute-eris encode [OPTION]... PATH
Encode a file or a file tree as ERIS blocks and print the URN of its read
capability. Blocks are put into the store that --store, or else the variable
ERIS_STORE_URL, names; with --store=none they are kept nowhere.
`

// encodeCommand turns a file or a tree into blocks and a URN.
func encodeCommand(args []string) int {
	flags := flag.NewFlagSet("encode", flag.ContinueOnError)
	store := flags.String("store", "", "put the blocks into the store at `URL`")
	secret := flags.String("convergence-secret", "", "use the convergence secret `BASE32`, or \"unique\" for one that nobody knows; by default everybody who encodes the same contents gets the same URN")
	asJSON := flags.Bool("json", false, "print the result as JSON")
	if status, ok := parse(flags, args, encodeUsage); !ok {
		return status
	}
	if flags.NArg() != 1 {
		return fail("encode takes one file or directory")
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	result, err := encode(ctx, flags.Arg(0), *store, *secret)
	if err != nil {
		return fail("%v", err)
	}
	if !*asJSON {
		fmt.Println(result.URN)
		return 0
	}
	text, err := json.MarshalIndent(result, "", "  ")
	if err != nil {
		return fail("%v", err)
	}
	fmt.Println(string(text))
	return 0
}

// encodeResult is what encode prints.
type encodeResult struct {
	URN     string `json:"urn"`
	Form    string `json:"form"`
	NarHash string `json:"narHash"`
	NarSize uint64 `json:"narSize"`
	Files   int    `json:"files"`
	// Blocks and Bytes are how many blocks were put, and how long they are in
	// all; 0 without a store.
	Blocks int64 `json:"blocks"`
	Bytes  int64 `json:"bytes"`
}

func encode(ctx context.Context, path, storeURL, secretText string) (encodeResult, error) {
	secret, err := convergenceSecret(secretText)
	if err != nil {
		return encodeResult{}, err
	}
	if storeURL == "" {
		file, err := readConfiguration()
		if err != nil {
			return encodeResult{}, err
		}
		if urls := storeURLs("", file); len(urls) > 0 {
			storeURL = urls[0]
		}
	}
	if path, err = filepath.Abs(path); err != nil {
		return encodeResult{}, err
	}
	sink := eris.SinkFunc(func(context.Context, eris.Reference, []byte) error { return nil })
	flush := func() error { return nil }
	var pipeline *fetch.Pipeline
	if storeURL != "" && storeURL != "none" {
		store, err := openStore(storeURL)
		if err != nil {
			return encodeResult{}, err
		}
		defer store.Close()
		pipeline = fetch.NewPipeline(ctx, store)
		sink, flush = pipeline.Put, pipeline.Flush
	}
	shown := showProgress("encoded")
	e, err := publish.Encode(ctx, path, eris.SinkFunc(func(ctx context.Context, ref eris.Reference, block []byte) error {
		shown.add(len(block))
		return sink(ctx, ref, block)
	}), secret)
	if err2 := flush(); err == nil && err2 != nil {
		err = fmt.Errorf("storing the blocks of %s: %w", path, err2)
	}
	shown.end()
	if err != nil {
		return encodeResult{}, err
	}
	r := encodeResult{
		URN: e.Capability.URN(), Form: e.Form, NarHash: "sha256:" + nixbase32.EncodeToString(e.NarHash[:]),
		NarSize: e.NarSize, Files: e.Files,
	}
	if pipeline != nil {
		r.Blocks, r.Bytes = pipeline.Stored()
	}
	return r, nil
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
