// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/program"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/session"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/transfer"
)

// importCommand puts blocks that were carried here into a store.
func importCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "FILE|DIRECTORY|-",
		Short: "put the blocks of a dump or a directory into a store",
		Long: `Put the blocks of a dump, of a directory of blocks or of one that "export" has
made, or of a dump on standard input ("-") into the store that --store, or else
the first that the variable ERIS_STORE_URL or the configuration file names, or
else into the block store that runs on this machine. Each block is verified.

What is whole of a dump that is cut off is stored; to go on, import it again.
URNs that the dump discloses are printed.

  guix-substitute-eris encode --store=dump:- PATH |
    ssh HOST guix-substitute-eris import -`,
	}
	store := c.Flags().String("store", "", "put the blocks into the store at `URL`")
	asJSON := c.Flags().Bool("json", false, "print the result as JSON")
	c.RunE = func(_ *cobra.Command, args []string) error {
		if len(args) != 1 {
			return message.Usage("import takes one dump, directory or \"-\": guix-substitute-eris import --store=URL FILE")
		}
		ctx, stop := program.UntilSignal()
		defer stop()
		return importBlocks(ctx, args[0], *store, *asJSON)
	}
	return c
}

func importBlocks(ctx context.Context, name, storeURL string, asJSON bool) error {
	blocks, size, closeBlocks, err := carriedBlocks(name)
	if err != nil {
		return err
	}
	defer closeBlocks()
	store, err := settings.OpenToPut(storeURL)
	if err != nil {
		return err
	} else if store == nil {
		return errNoStore()
	}
	defer store.Close()
	from := name
	if name == "-" {
		from = "standard input"
	}
	shown := session.NewLog().Transfer(from, from)
	defer shown.Stop()
	shown.Total(size)
	result, err := transfer.Import(ctx, store, blocks, shown.Add)
	if errors.Is(err, transfer.ErrCut) {
		return fmt.Errorf("%s: %w; %s before that, %s, are stored\nhint: import it again, from the beginning; what is stored stays",
			from, err, page.Count(int(result.Blocks), "block"), page.Size(result.Bytes))
	} else if err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	if err := settings.FinishPut(ctx, store, result.Capabilities); err != nil {
		return err
	}
	if asJSON {
		err = page.JSON(result)
	} else {
		for _, c := range result.Capabilities {
			fmt.Println(c.URN())
		}
	}
	if err != nil {
		return err
	}
	shown.Done("stored %s, %s, in %s", page.Count(int(result.Blocks), "block"), page.Size(result.Bytes), store)
	switch {
	case result.Damaged > 0:
		return fmt.Errorf("%s: %s damaged and were left out", from, page.Count(int(result.Damaged), "block"))
	case result.Blocks == 0:
		return fmt.Errorf("%s has no blocks", from)
	}
	return nil
}

// carriedBlocks opens what is to be imported. The size is 0 if it is not known.
func carriedBlocks(name string) (blocks transfer.Blocks, size int64, closeBlocks func(), err error) {
	if name == "-" {
		return transfer.FromDump(os.Stdin), 0, func() {}, nil
	}
	info, err := os.Stat(name)
	if err != nil {
		return nil, 0, nil, err
	}
	if info.IsDir() {
		if info, err := os.Stat(filepath.Join(name, "blocks")); err == nil && info.IsDir() {
			name = filepath.Join(name, "blocks")
		}
		return transfer.FromDirectory(name), 0, func() {}, nil
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, 0, nil, err
	}
	return transfer.FromDump(f), info.Size(), func() { f.Close() }, nil
}
