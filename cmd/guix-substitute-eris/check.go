// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/complete"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/program"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/session"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
)

// checkSettings are the options of check.
type checkSettings struct {
	stores       []string
	repair, json bool
}

// checkCommand looks whether a store is complete.
func checkCommand() *cobra.Command {
	var s checkSettings
	c := &cobra.Command{
		Use:   "URN|DIRECTORY",
		Short: "look whether a store has all blocks of something",
		Long: `Look whether all blocks of a URN, or of the items in a directory that "export" has
made, are in a store and right; and whether nars and deltas in the directory are.
What is missing is shown, with the files or items that lack it. The exit status is
0 if nothing is missing, and 3 if something is.

The store is the first --store, or else what "decode" would ask; for a directory,
the blocks in it. With --repair, what is missing comes from the other stores.`,
	}
	f := c.Flags()
	f.StringArrayVar(&s.stores, "store", nil, "check the store at `URL`; given again, what to repair it from")
	f.BoolVar(&s.repair, "repair", false, "put blocks that are missing or damaged into the store")
	f.BoolVar(&s.json, "json", false, "print the result as JSON")
	c.RunE = func(_ *cobra.Command, args []string) error {
		if len(args) != 1 {
			return message.Usage("check takes one URN or directory: guix-substitute-eris check --store=URL urn:eris:…")
		}
		ctx, stop := program.UntilSignal()
		defer stop()
		return s.check(ctx, args[0])
	}
	return c
}

func (s *checkSettings) check(ctx context.Context, what string) error {
	info, err := os.Stat(what)
	isDirectory := err == nil && info.IsDir()
	urls := strings.Fields(strings.Join(s.stores, " "))
	if len(urls) == 0 {
		file, err := settings.Read()
		if err != nil {
			return err
		}
		urls = settings.StoreURLs("", file)
	}
	if isDirectory && len(s.stores) == 0 {
		blocks, err := filepath.Abs(filepath.Join(what, "blocks"))
		if err != nil {
			return err
		}
		urls = append([]string{(&url.URL{Scheme: "file", Path: blocks}).String()}, urls...)
	}
	if len(urls) == 0 {
		return errNoStore()
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
		from, err := repairFrom(urls[1:])
		if err != nil {
			return err
		}
		defer from.Close()
		o.From = from
	}
	if isDirectory {
		return s.checkDirectory(ctx, what, o, shown)
	}
	c, err := parseURN(what)
	if err != nil {
		return fmt.Errorf("%w; this is no directory either", err)
	}
	r, err := complete.Check(ctx, c, o)
	if err != nil {
		return err
	}
	shown.Stop()
	if s.json {
		err = page.JSON(r)
	} else {
		p := page.New()
		showReport(p, what, &r, nil)
		err = p.Print()
	}
	return errors.Join(err, notComplete(r.Complete()))
}

// repairFrom returns the stores that blocks come from.
func repairFrom(urls []string) (fetch.Source, error) {
	if len(urls) == 0 {
		return nil, message.Usage("--repair needs another store that blocks come from: --store=URL --store=OTHER-URL")
	}
	members, err := settings.OpenStores(urls, 0)
	if err != nil {
		settings.CloseStores(members)
		return nil, err
	}
	return pool.New(members, pool.Options{}), nil
}

// notComplete is what a command ends with that has shown that something is missing.
func notComplete(complete bool) error {
	if complete {
		return nil
	}
	return message.Unavailable
}

func (s *checkSettings) checkDirectory(ctx context.Context, directory string, o complete.Options, shown *protocol.Transfer) error {
	items := []complete.Item{} // not nil
	p := page.New()
	bad, blocks, size := 0, int64(0), int64(0)
	err := complete.Directory(ctx, directory, o, func(item complete.Item) {
		items = append(items, item)
		if item.Blocks != nil {
			blocks, size = blocks+item.Blocks.Blocks, size+item.Blocks.Bytes
		}
		if !item.Complete() {
			bad++
		}
		if !item.Complete() || item.Blocks != nil && item.Blocks.Repaired > 0 {
			showReport(p, item.Path, item.Blocks, item.Faults)
		}
	})
	shown.Stop()
	switch {
	case err != nil:
		return err
	case len(items) == 0:
		return fmt.Errorf("%s has no narinfos, so that it is not known what should be there", directory)
	case s.json:
		return errors.Join(page.JSON(items), notComplete(bad == 0))
	}
	result := fmt.Sprintf("%s with %s, %s: ", page.Count(len(items), "item"), page.Count(int(blocks), "block"), page.Size(size))
	if bad == 0 {
		result += "complete"
	} else {
		result += page.Count(bad, "item") + " not complete"
	}
	p.Heading(result)
	return errors.Join(p.Print(), notComplete(bad == 0))
}

// showReport shows what there is of something.
func showReport(p *page.Page, what string, r *complete.Report, faults []string) {
	var lines []string
	if r != nil {
		lines = append(lines, reportLines(r)...)
	}
	lines = append(lines, faults...)
	mark := page.Good
	if len(faults) > 0 || r != nil && !r.Complete() {
		mark = page.Bad
	}
	p.Say(0, mark, "%s", what)
	for _, line := range lines {
		p.Line(4, "%s", line)
	}
}

// maxAffected is how many files are listed.
const maxAffected = 20

func reportLines(r *complete.Report) (lines []string) {
	there := fmt.Sprintf("%s, %s (%s)", page.Count(int(r.Blocks), "block"), page.Size(r.Bytes), cmp.Or(r.Form, "of unknown form"))
	if r.Repaired > 0 {
		there += fmt.Sprintf("; %d of them put there now", r.Repaired)
	}
	lines = append(lines, there)
	if r.Complete() {
		return lines
	}
	lost := fmt.Sprintf("missing: %s, %s", page.Count(int(r.Missing), "block"), page.Size(r.MissingBytes))
	if r.Damaged > 0 {
		lost += fmt.Sprintf("; %d with wrong bytes in their place", r.Damaged)
	}
	if r.Inner > 0 {
		lost += fmt.Sprintf("; what is below %d of them is not known", r.Inner)
	}
	lines = append(lines, lost)
	for i, path := range r.Affected {
		if i == maxAffected {
			return append(lines, fmt.Sprintf("  and %d more files", len(r.Affected)-i))
		}
		if path == "." {
			path = "all"
		}
		lines = append(lines, "  not whole: "+path)
	}
	return lines
}
