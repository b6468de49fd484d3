// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/dir"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/dump"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/session"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
)

func importCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "FILE|DIRECTORY|-",
		Short: "put the blocks of a dump or a directory into a store",
		Long: `Put the blocks of a dump, of a directory of blocks or of one that "export" has
made, or of a dump on standard input ("-") into a store. Each block is verified.

What is whole of a dump that is cut off is stored; to go on, import it again.
URNs that the dump discloses are printed.

  guix-substitute-eris encode --store=dump:- PATH |
    ssh HOST guix-substitute-eris import -`,
	}
	store := c.Flags().String("store", "", "put the blocks into the store at `URL` (default: the first of $ERIS_STORE_URL, what runs here, or the first of the setting eris-stores)")
	c.RunE = func(_ *cobra.Command, args []string) error {
		if len(args) != 1 || args[0] == "" {
			return message.Usage("import takes one dump, directory or \"-\": guix-substitute-eris import --store=URL FILE")
		}
		return importBlocks(c.Context(), localName(args[0]), *store)
	}
	return c
}

func importBlocks(ctx context.Context, name, storeURL string) error {
	store, err := settings.OpenToPut(storeURL)
	if err != nil {
		return err
	} else if store == nil {
		return errNoStore()
	}
	defer store.Close()
	shown := session.NewLog().Transfer(name, name)
	defer shown.Stop()
	damaged := 0 // blocks that are not what their references say, and are left out
	put, err := putInto(ctx, store, "", func(sink eris.Sink) ([]eris.ReadCapability, error) {
		return eachBlock(ctx, name, shown, func(ref eris.Reference, block []byte) error {
			shown.Add(len(block))
			if eris.Verify(ref, block) != nil {
				damaged++
				return ctx.Err()
			}
			return sink(ctx, ref, block)
		})
	})
	if name == "-" {
		name = "standard input"
	}
	var format *dump.FormatError
	if errors.As(err, &format) && format.Length == 0 {
		return fmt.Errorf("%s is empty\nhint: what should have written a dump there has failed", name)
	} else if format != nil && format.Err == io.ErrUnexpectedEOF {
		cut := fmt.Sprintf("cut off at byte %d", format.Length)
		if format.Offset > format.Length {
			cut = fmt.Sprintf("damaged or cut off: it has %d bytes, and says that something in it ends at byte %d", format.Length, format.Offset)
		}
		return fmt.Errorf("%s: the dump is %s; %s before that, %s, are stored\nhint: import it again, from the beginning; what is stored stays",
			name, cut, page.Count(put.blocks, "block"), page.Size(put.bytes))
	} else if format != nil && put.blocks == 0 {
		return fmt.Errorf("%s is no dump of blocks\nhint: \"encode --store=dump:FILE PATH\" makes one", name)
	} else if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for _, c := range put.capabilities {
		if _, err := fmt.Println(c.URN()); err != nil {
			return err
		}
	}
	if put.blocks > 0 {
		shown.Done("stored %v in %s", put, store)
	}
	switch {
	case damaged > 0:
		return fmt.Errorf("%s: damaged, and left out: %s", name, page.Count(damaged, "block"))
	case put.blocks == 0:
		if _, err := os.Stat(filepath.Join(name, "blocks-32k")); err == nil {
			return fmt.Errorf("in %s \"serve\" keeps its blocks\nhint: start \"serve --directory=%[1]s\", and name it as a store, or as --upstream", name)
		}
		return fmt.Errorf("%s has no blocks", name)
	}
	return nil
}

// eachBlock calls f for each block of a dump or a directory, as [dump.Read] does.
func eachBlock(ctx context.Context, name string, shown *protocol.Transfer, f func(ref eris.Reference, block []byte) error) ([]eris.ReadCapability, error) {
	if name == "-" {
		return dump.Read(untilDone(ctx, func() (io.Reader, error) { return os.Stdin, nil }), f)
	}
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if info.IsDir() {
		return nil, dir.Each(name, f)
	}
	if !info.Mode().IsRegular() {
		return dump.Read(untilDone(ctx, func() (io.Reader, error) { return os.Open(name) }), f)
	}
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	shown.Total(info.Size())
	return dump.Read(file, f)
}

// untilDone returns what is read from something that may be a pipe or a terminal, until a context
// is done: nothing breaks off opening it, or reading from it, when nobody writes. The end of the
// program does, which is near then.
func untilDone(ctx context.Context, open func() (io.Reader, error)) io.Reader {
	r, w := io.Pipe()
	context.AfterFunc(ctx, func() { w.CloseWithError(context.Cause(ctx)) })
	go func() {
		from, err := open()
		if err == nil {
			_, err = io.Copy(w, from)
		}
		w.CloseWithError(err)
	}()
	return r
}
