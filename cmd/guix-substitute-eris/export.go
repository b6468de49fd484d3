// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

const exportUsage = `Usage: guix-substitute-eris export [OPTION]... ITEM... --to=DIRECTORY
Write the narinfos of store items, as they were signed, and the blocks of the
items to a directory, which can then be carried elsewhere. There it is both the
substitute server file://DIRECTORY and the block store file:DIRECTORY/blocks.

Narinfos come from the substitute servers. Items come from the local store; what
it does not have with the contents that were signed is fetched like a substitute.
`

// exportCommand writes items to a directory.
func exportCommand(args []string) int {
	var s settings
	flags := flag.NewFlagSet("export", flag.ContinueOnError)
	to := flags.String("to", "", "write to `DIRECTORY`")
	closure := flags.Bool("closure", false, "export everything that the items refer to, too")
	root := flags.String("root", "", "the items are in `DIRECTORY`, if not in the store directory")
	layout := flags.String("layout", "sharded", "blocks are in subdirectories (\"sharded\"), or all in one (\"flat\"): `LAYOUT`")
	s.flags(flags)
	items, status, ok := parseMixed(flags, args, exportUsage)
	if !ok {
		return status
	}
	if len(items) == 0 || *to == "" {
		return fail("export takes store items, and a directory as --to")
	}
	if *layout != "sharded" && *layout != "flat" {
		return fail("the layout is either sharded or flat, and not %q", *layout)
	}
	directory, err := filepath.Abs(*to)
	if err != nil {
		return fail("%v", err)
	}
	s.load()
	ctx, stop := untilSignal()
	defer stop()
	unix.Umask(0o022)
	if err := os.MkdirAll(directory, 0o755); err != nil {
		return fail("%v", err)
	}
	where := url.URL{Scheme: "file", Path: filepath.Join(directory, "blocks")}
	blocks, err := openStore(where.String() + "?layout=" + *layout)
	if err != nil {
		return fail("%v", err)
	}
	defer blocks.Close()
	sub := s.session(false)
	defer sub.close()
	s.showNotes()
	keys := s.keys()
	sub.SetKeys(keys)
	options := publish.ExportOptions{
		StoreDir: s.store, Root: *root, Directory: directory, Blocks: blocks, Keys: keys, Closure: *closure, Log: logf,
		Fetch: func(ctx context.Context, path, to string) error {
			if outcome := sub.Substitute(ctx, path, to); outcome.Status != substitute.Success {
				return fmt.Errorf("%s is not in the local store and cannot be fetched", path)
			}
			return nil
		},
	}
	for _, server := range s.serverURLs() {
		options.Servers = append(options.Servers, func(ctx context.Context, hashParts []string) (map[string][]byte, error) {
			return narinfosFrom(ctx, sub.Mirrors, server, hashParts)
		})
	}
	done, err := publish.Export(ctx, items, options)
	if err != nil {
		return fail("%v", err)
	}
	where.Path = directory
	fmt.Printf("%d items, %d blocks, %.1f MiB\nsubstitute URL: %s\nblock store: %s/blocks\n",
		done.Items, done.Blocks, float64(done.Bytes)/(1<<20), where.String(), where.String())
	return 0
}

// narinfosFrom gets the narinfos that a server has.
func narinfosFrom(ctx context.Context, client *mirror.Client, server string, hashParts []string) (map[string][]byte, error) {
	var mu sync.Mutex
	texts := map[string][]byte{}
	err := client.Narinfos(ctx, server, hashParts, func(a mirror.Answer) {
		if a.Status == http.StatusOK && a.Body != nil {
			mu.Lock()
			defer mu.Unlock()
			texts[a.Hash] = a.Body
		}
	})
	var down *mirror.ServerError
	if errors.As(err, &down) {
		err = fmt.Errorf("some narinfos could not be had: %w", err)
	}
	return texts, err
}

// parseMixed is parse for a command whose options may stand behind its arguments.
func parseMixed(flags *flag.FlagSet, args []string, usage string) (arguments []string, status int, ok bool) {
	for {
		if status, ok := parse(flags, args, usage); !ok {
			return nil, status, false
		}
		rest := flags.Args()
		for len(rest) > 0 && (rest[0] == "-" || !strings.HasPrefix(rest[0], "-")) {
			arguments = append(arguments, rest[0])
			rest = rest[1:]
		}
		if len(rest) == 0 {
			return arguments, 0, true
		}
		args = rest
	}
}
