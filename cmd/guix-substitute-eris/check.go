// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/complete"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/session"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
)

type checkSettings struct {
	stores       []string
	repair, json bool
}

func checkCommand() *cobra.Command {
	var s checkSettings
	c := &cobra.Command{
		Use:   "URN|DIRECTORY",
		Short: "look whether a store has all blocks of something",
		Long: `Look whether all blocks of a URN, or of the items in a directory that "export"
has made, or its file: URL, are in a store and right; and whether nars and
deltas in the directory are. What is missing is shown, with the files or items
that lack it. The exit status is 0 if nothing is missing, and 3 if something is.

The store is the first --store, or else what "decode" would ask; for a
directory, the blocks in it. With --repair, what is missing comes from the
other stores.`,
	}
	f := c.Flags()
	f.StringArrayVar(&s.stores, "store", nil, "check the store at `URL`; given again, what to repair it from")
	f.BoolVar(&s.repair, "repair", false, "put blocks that are missing or damaged into the store")
	f.BoolVar(&s.json, "json", false, "print the result as JSON")
	c.RunE = func(_ *cobra.Command, args []string) error {
		if len(args) != 1 {
			return message.Usage("check takes one URN or directory: guix-substitute-eris check --store=URL urn:eris:…")
		}
		return s.check(c.Context(), args[0])
	}
	return c
}

func (s *checkSettings) check(ctx context.Context, what string) error {
	what = localName(what)
	info, err := os.Stat(what)
	isDirectory := err == nil && info.IsDir()
	c, err := parseURN(what)
	if err != nil && !isDirectory {
		return fmt.Errorf("%w; this is no directory either", err)
	}
	var own []string
	if isDirectory && len(s.stores) == 0 {
		own = []string{"file:" + (&url.URL{Path: what}).EscapedPath()}
	}
	urls, err := storeURLs(strings.Join(s.stores, " "), own...)
	if err != nil {
		return err
	}
	store, err := settings.OpenStore(urls[0])
	if err != nil {
		return err
	}
	defer store.Close()
	shown := session.NewLog().Transfer(what, store.String())
	defer shown.Stop()
	o := complete.Options{Store: store, Got: shown.Add}
	if s.repair {
		if len(urls) == 1 {
			return message.Usage("--repair needs another store that blocks come from: --store=URL --store=OTHER-URL")
		}
		members, err := settings.OpenStores(urls[1:], 0)
		from := pool.New(members, pool.Options{Patient: true})
		defer from.Close()
		if err != nil {
			return err
		}
		o.From = from
	}
	var items []complete.Item
	if isDirectory {
		items, err = complete.Directory(ctx, what, o)
	} else {
		items = []complete.Item{{Path: what}}
		items[0].Blocks, err = complete.Check(ctx, c, o)
	}
	shown.Stop()
	if err != nil {
		return err
	} else if len(items) == 0 {
		return fmt.Errorf("%s has no narinfos, so that it is not known what should be there", what)
	}
	if s.json {
		err = page.JSON(items)
	} else {
		err = showItems(items)
	}
	if err == nil && slices.ContainsFunc(items, func(i complete.Item) bool { return !i.Complete() }) {
		err = message.Unavailable
	}
	return err
}

// localName returns the name of what a person means by its name, or by its file: URL, which
// "export" shows.
func localName(name string) string {
	for _, of := range mirror.LocalDirectories(name) {
		if _, err := os.Stat(of); err == nil {
			return of
		}
		name = of
	}
	return name
}

// showItems shows what there is of items: all that can be said of those that are not complete, or
// of a single one.
func showItems(items []complete.Item) error {
	p := page.New()
	var all complete.Report
	bad := 0
	for _, item := range items {
		r := item.Blocks
		all.Blocks, all.Bytes, all.Repaired = all.Blocks+r.Blocks, all.Bytes+r.Bytes, all.Repaired+r.Repaired
		if !item.Complete() {
			bad++
			p.Say(0, page.Bad, "%s", item.Path)
			for _, line := range faultsOf(item) {
				p.Line(4, "%s", line)
			}
		}
	}
	result := "complete"
	if bad > 0 {
		result = "not complete: " + page.Count(bad, "item")
	}
	if all.Repaired > 0 {
		result += fmt.Sprintf("; %s put there now", page.Count(int(all.Repaired), "block"))
	}
	p.Line(0, "%s, with %s, %s: %s", page.Count(len(items), "item"), page.Count(int(all.Blocks), "block"), page.Size(all.Bytes), result)
	return p.Print()
}

const maxAffected = 20

func faultsOf(item complete.Item) (lines []string) {
	r := item.Blocks
	if r.Missing > 0 {
		lost := fmt.Sprintf("%s missing or damaged, %s", page.Count(int(r.Missing), "block"), page.Size(r.MissingBytes))
		if r.Inner > 0 {
			lost += fmt.Sprintf("; what is below %d of them is not known", r.Inner)
		}
		lines = append(lines, lost)
	}
	for i, path := range r.Affected {
		if i == maxAffected {
			lines = append(lines, fmt.Sprintf("and %d more files", len(r.Affected)-i))
			break
		}
		lines = append(lines, "not whole: "+path)
	}
	return append(lines, item.Faults...)
}
