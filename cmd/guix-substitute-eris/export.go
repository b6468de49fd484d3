// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/inspect"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/serving"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/session"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

type exportSettings struct {
	session.Settings
	to, root, layout, since string
	closure, create         bool
	nars, sign              bool
	signer                  serving.Signer
}

func exportCommand() *cobra.Command {
	var e exportSettings
	c := &cobra.Command{
		Use:   "ITEM... --to=DIRECTORY",
		Short: "write narinfos and blocks to a directory",
		Long: `Write the narinfos of store items, as they were signed, and the blocks of the
items to a directory, which can then be carried elsewhere. There it is the
substitute URL file://DIRECTORY, which is all that this program needs; a stock
Guix can use it too if there are --nars.

Narinfos come from the substitute servers, and with --sign, where these have
none that counts, from the key of this machine. Items come from the local
store; what it does not have with the contents that were signed is fetched
like a substitute, to a directory for temporary files ($TMPDIR, or /tmp).`,
	}
	f := c.Flags()
	f.StringVar(&e.to, "to", "", "write to `DIRECTORY`")
	f.BoolVar(&e.closure, "closure", false, "export everything that the items refer to, too")
	f.StringVar(&e.root, "root", "", "the items are in `DIRECTORY`, if not in the store directory")
	f.StringVar(&e.layout, "layout", "sharded", "blocks are in subdirectories (\"sharded\"), or all in one (\"flat\"): `LAYOUT`")
	f.BoolVar(&e.create, "create", false, "make the directory where sticks are mounted, even if there is none")
	f.StringVar(&e.since, "since", "", "leave out what `DIRECTORY`, an earlier export, has, and write deltas from older versions that it has")
	f.BoolVar(&e.nars, "nars", false, "write nars too, for those who have a Guix without this program")
	f.BoolVar(&e.sign, "sign", false, "sign the narinfos of items that no server has, which were built here")
	e.signer.Flags(f)
	e.Flags(f)
	c.RunE = func(_ *cobra.Command, items []string) error {
		if len(items) == 0 || e.to == "" {
			return message.Usage("export takes store items, and a directory as --to")
		}
		if e.layout != "sharded" && e.layout != "flat" {
			return message.Usage("the layout is either sharded or flat, and not %q", e.layout)
		}
		return e.export(c.Context(), items)
	}
	return c
}

func (e *exportSettings) export(ctx context.Context, items []string) error {
	directory, err := filepath.Abs(localName(e.to))
	if err != nil {
		return err
	}
	if _, err := inspect.Load(&e.Settings); err != nil {
		return err
	}
	unix.Umask(0o022)
	if !e.create {
		if err := checkMounted(directory, mountParents); err != nil {
			return fmt.Errorf("%w; --create makes the directory all the same", err)
		}
	}
	where := url.URL{Scheme: "file", Path: filepath.Join(directory, "blocks")}
	blocks, err := settings.OpenStore(where.String() + "?layout=" + e.layout)
	if err != nil {
		return err
	}
	defer blocks.Close()
	sub := e.Session(false)
	defer sub.Close()
	keys := e.Keys()
	sub.SetKeys(keys)
	items = session.Names(items)
	for i, item := range items {
		if items[i], err = e.FindItem(ctx, sub, item); err != nil {
			return err
		}
	}
	shown := e.Log().Transfer(e.to, e.to)
	defer shown.Stop()
	options := publish.ExportOptions{
		StoreDir: e.Store, Root: e.root, Directory: directory, Blocks: blocks, Keys: keys, Closure: e.closure, Since: localName(e.since), Nars: e.nars,
		Log: e.Log().Notef, Total: shown.Total, Got: shown.Add,
		Fetch: func(ctx context.Context, path, to string) error {
			if outcome := sub.Substitute(ctx, path, to); outcome.Status != substitute.Success {
				return sub.WhyNot(ctx, path).Errorf("%s is not in the local store and cannot be fetched", path)
			}
			return nil
		},
	}
	for _, server := range e.ServerURLs() {
		from := publish.ExportServer{Narinfos: func(ctx context.Context, hashParts []string) (map[string][]byte, error) {
			return session.NarinfosFrom(ctx, sub.Mirrors, server, hashParts)
		}}
		if u, err := url.Parse(server); err == nil && !mirror.IsLocal(server) {
			u.User = nil
			from.URL = u.String() // in ASCII
		}
		options.Servers = append(options.Servers, from)
	}
	if e.sign {
		server, key, closeItems, err := e.signer.Open(e.Store, e.root, e.Log().Notef)
		if err != nil {
			return err
		}
		defer closeItems()
		options.Keys = acl.NewACL(append(keys.Keys(), key)...)
		options.Servers = append(options.Servers, publish.ExportServer{Narinfos: server.Narinfos})
	}
	done, err := publish.Export(ctx, items, options)
	var none *publish.NoNarinfoError
	if errors.As(err, &none) {
		return sub.WhyNot(ctx, none.Path).Errorf("%w\nhint: \"guix-substitute-eris explain ITEM\" says why; --sign signs what was built here", err)
	} else if err != nil {
		return err
	}
	shown.Done("exported %s to %s", page.Size(done.Bytes), e.to)
	where.Path = directory
	_, err = fmt.Printf("%s, %s, %s\nsubstitute URL: %s\n", page.Count(int(done.Items), "item"), page.Count(int(done.Blocks), "block"), page.Size(done.Bytes), where.String())
	return err
}

// mountParents are the directories below which sticks are mounted.
var mountParents = []string{"/media", "/mnt", "/run/media"}

// checkMounted returns an error if a directory is one of parents, or below, where nothing is
// mounted, so that what is written there goes to the disk of the system. One that has something in
// it is in use.
func checkMounted(directory string, parents []string) error {
	if entries, err := os.ReadDir(directory); err == nil && len(entries) > 0 {
		return nil
	}
	existing := directory
	real, err := filepath.EvalSymlinks(existing)
	for ; err != nil && existing != "/"; real, err = filepath.EvalSymlinks(existing) {
		existing = filepath.Dir(existing)
	}
	resolved := real + strings.TrimPrefix(directory, existing)
	for _, parent := range parents {
		if resolved != parent && !strings.HasPrefix(resolved, parent+"/") {
			continue
		}
		var here, above unix.Stat_t
		if err := errors.Join(unix.Stat(real, &here), unix.Stat(filepath.Dir(parent), &above)); err != nil || here.Dev == above.Dev {
			return fmt.Errorf("no stick is mounted where %s is to be", directory)
		}
	}
	return nil
}
