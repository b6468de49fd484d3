// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
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
as they are. Blocks come from the stores that --store, or else the variable
ERIS_STORE_URL, or else the configuration file names, or else from the block
store that runs on this machine.`,
	}
	stores := c.Flags().String("store", "", "fetch blocks from the stores with these `URLS`, separated by spaces, in this order (default: $ERIS_STORE_URL, the setting eris-stores, or what runs here)")
	raw := c.Flags().Bool("raw", false, "write the contents as they are, even if they are a file tree")
	asJSON := c.Flags().Bool("json", false, "print what was decoded as JSON")
	c.RunE = func(_ *cobra.Command, args []string) error {
		if len(args) != 2 {
			return message.Usage("decode takes a URN and a destination: guix-substitute-eris decode --store=URL urn:eris:… FILE")
		}
		if strings.HasPrefix(args[1], "urn:eris:") {
			return message.Usage("decode takes the URN first, and then the destination: guix-substitute-eris decode %s %s", args[1], args[0])
		}
		result, err := decode(c.Context(), args[0], args[1], *stores, *raw)
		if err == nil && *asJSON {
			err = page.JSON(result)
		}
		return err
	}
	return c
}

// decodeResult is what decode prints.
type decodeResult struct {
	Form string `json:"form"`
	// Size is the length of the contents in bytes.
	Size int64 `json:"size"`
	// NarHash and NarSize are those of a tree.
	NarHash string `json:"narHash,omitempty"`
	NarSize uint64 `json:"narSize,omitempty"`
}

func decode(ctx context.Context, urn, destination, flag string, raw bool) (result decodeResult, err error) {
	c, err := parseURN(urn)
	if err != nil {
		return result, err
	}
	name := destination
	if destination != "-" {
		if destination, err = restore.CheckNew(destination); err != nil {
			return result, err
		}
	}
	file, err := settings.Read()
	if err != nil {
		return result, err
	}
	urls := settings.StoreURLs(flag, file)
	if len(urls) == 0 {
		return result, errNoStore()
	}
	members, err := settings.OpenStores(urls, 0)
	log := session.NewLog()
	all := pool.New(members, pool.Options{OnFault: func(source string, err error) {
		log.Warnf("%s gave wrong bytes and is not asked again: %s", source, message.OfStore(source, err))
	}})
	defer all.Close()
	if err != nil {
		return result, err
	}
	shown := log.Transfer(name, sourceNames(members))
	defer shown.Stop()
	blocks := fetch.Within(all, c.Root, shown.Add)
	// What is decoded may be as large as it likes; it goes to disk only.
	x, err := image.Open(ctx, blocks, c, erisfs.Limits{NarSize: 1 << 60}, all.Window())
	if err != nil {
		return result, err
	}
	defer x.Close()
	result = decodeResult{Form: string(x.Form), Size: x.Content.Size()}
	x.Total = func(bytes int64) { shown.Total(result.Size + bytes) }
	if raw || x.Form != image.ERISFS {
		shown.Total(result.Size)
	}
	if raw || x.Form != image.ERISFS && x.Form != image.Nar {
		if err = writeContents(x.Content, destination); err == nil && destination != "-" {
			shown.Done("wrote %s to %s", page.Size(result.Size), name)
		}
		return result, err
	}
	if destination == "-" {
		return result, message.Usage("a file tree cannot be written to standard output; see --raw")
	}
	nodes, closeNodes, err := x.Nodes(ctx)
	if err != nil {
		return result, err
	}
	defer closeNodes()
	unix.Umask(0o022)
	err = restore.Whole(destination, func(temporary string) error {
		r, err := restore.Restore(ctx, nodes, temporary, restore.Options{Writable: true})
		result.NarHash, result.NarSize = "sha256:"+nixbase32.EncodeToString(r.NarHash[:]), r.NarSize
		return err
	})
	if err == nil {
		shown.Done("wrote %s to %s", page.Size(int64(result.NarSize)), name)
	}
	return result, err
}

// parseURN reads a read capability as it is printed, also with the name of an item behind it.
func parseURN(text string) (eris.ReadCapability, error) {
	urn, _, _ := strings.Cut(text, "#")
	c, err := eris.ParseURN(urn)
	return c, message.OfUsage(err)
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
