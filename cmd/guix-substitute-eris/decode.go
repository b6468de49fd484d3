// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/session"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

func decodeCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "URN DESTINATION",
		Short: "turn a URN into a file or a tree",
		Long: `Fetch what a read capability denotes and write it to a file or a directory
that does not exist yet; "-" is standard output. File trees are recognised, as
ERIS-FS and as nars; other contents, compressed nars among them, are written
as they are.`,
	}
	stores := c.Flags().StringArray("store", nil, "fetch blocks from the stores with these `URLS`, separated by spaces; may be given several times (default: $ERIS_STORE_URL, the setting eris-stores, or what runs here)")
	raw := c.Flags().Bool("raw", false, "write the contents as they are, even if they are a file tree")
	c.RunE = func(_ *cobra.Command, args []string) error {
		if len(args) != 2 || args[1] == "" {
			return message.Usage("decode takes a URN and a destination: guix-substitute-eris decode --store=URL urn:eris:… FILE")
		}
		if strings.HasPrefix(args[1], "urn:eris:") {
			return message.Usage("decode takes the URN first, and then the destination: guix-substitute-eris decode %s %s", args[1], args[0])
		}
		return decode(c.Context(), args[0], args[1], strings.Join(*stores, " "), *raw)
	}
	return c
}

func decode(ctx context.Context, urn, destination, flag string, raw bool) error {
	c, err := parseURN(urn)
	if err != nil {
		return err
	}
	name := destination
	if destination != "-" {
		if destination, err = filepath.Abs(destination); err == nil {
			err = restore.CheckNew(destination)
		}
		if err != nil {
			return err
		}
	}
	urls, err := storeURLs(flag)
	if err != nil {
		return err
	}
	members, err := settings.OpenStores(urls, 0)
	log := session.NewLog()
	all := pool.New(members, pool.Options{Patient: true, OnFault: func(source string, err error) {
		log.Warnf("%s gave wrong bytes and is not asked again: %s", source, message.OfStore(source, err))
	}})
	defer all.Close()
	if err != nil {
		return err
	}
	shown := log.Transfer(name, sourceNames(members))
	defer shown.Stop()
	blocks := fetch.Within(all, c.Root, shown.Add)
	// What is decoded may be as large as it likes; it goes to disk only.
	x, err := image.Open(ctx, blocks, c, erisfs.Limits{NarSize: 1 << 60}, all.Window())
	if err != nil {
		return err
	}
	defer x.Close()
	size := x.Content.Size()
	x.Total = func(bytes int64) { shown.Total(size + bytes) }
	if raw || x.Form != image.ERISFS {
		shown.Total(size)
	}
	switch {
	case raw || x.Form != image.ERISFS && x.Form != image.Nar:
		err = writeContents(x.Content, destination)
	case destination == "-":
		return message.Usage("a file tree cannot be written to standard output; see --raw")
	default:
		size, err = writeTree(ctx, x, destination)
	}
	if err == nil && destination != "-" {
		shown.Done("wrote %s to %s", page.Size(size), name)
	}
	return err
}

// writeTree makes the tree of an image where there is nothing yet, and returns the length of its
// archive.
func writeTree(ctx context.Context, x *image.Image, destination string) (size int64, err error) {
	nodes, closeNodes, err := x.Nodes(ctx)
	if err != nil {
		return 0, err
	}
	defer closeNodes()
	err = restore.Whole(destination, func(temporary string) error {
		r, err := restore.Restore(ctx, nodes, temporary, restore.Options{Writable: true})
		size = int64(r.NarSize)
		return err
	})
	return size, err
}

// parseURN reads a read capability as it is printed, also with the name of an item behind it.
func parseURN(text string) (eris.ReadCapability, error) {
	urn, _, _ := strings.Cut(text, "#")
	c, err := eris.ParseURN(urn)
	return c, message.OfUsage(err)
}

// storeURLs returns the stores that blocks come from, of which there must be one: those that are
// given first, and those that the flag names, or what counts without it.
func storeURLs(flag string, first ...string) ([]string, error) {
	file, err := settings.Read()
	urls := append(first, settings.StoreURLs(flag, file)...)
	if err == nil && len(urls) == 0 {
		err = errNoStore()
	}
	return urls, err
}

func errNoStore() error {
	return message.Usage("no store is known; name one by --store or by %s", settings.StoreVariable)
}

// sourceNames are the URLs of stores, for people.
func sourceNames(members []pool.Member) string {
	var names []string
	for _, m := range members {
		names = append(names, m.Source.String())
	}
	return strings.Join(names, ", ")
}

// writeContents writes contents to a file that there is not yet, or to standard output.
func writeContents(content io.Reader, destination string) error {
	if destination == "-" {
		_, err := io.Copy(os.Stdout, content)
		return err
	}
	return files.Replace(destination, 0o644, files.Options{New: true, Sync: true}, func(w io.Writer) error {
		_, err := io.Copy(w, content)
		return err
	})
}
