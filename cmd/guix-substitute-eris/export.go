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
	create := flags.Bool("create", false, "make the directory where sticks are mounted, even if there is none")
	since := flags.String("since", "", "leave out what `DIRECTORY`, an earlier export, has, and write deltas from older versions that it has")
	s.flags(flags)
	if status, ok := parse(flags, args, exportUsage); !ok {
		return status
	}
	items := flags.Args()
	if len(items) == 0 || *to == "" {
		return usageError("export takes store items, and a directory as --to")
	}
	if *layout != "sharded" && *layout != "flat" {
		return usageError("the layout is either sharded or flat, and not %q", *layout)
	}
	directory, err := filepath.Abs(*to)
	if err != nil {
		return fail("%w", err)
	}
	s.load()
	ctx, stop := untilSignal()
	defer stop()
	unix.Umask(0o022)
	if !*create {
		if err := checkMounted(directory, mountParents); err != nil {
			return fail("%w; --create makes the directory all the same", err)
		}
	}
	where := url.URL{Scheme: "file", Path: filepath.Join(directory, "blocks")}
	blocks, err := openStore(where.String() + "?layout=" + *layout)
	if err != nil {
		return fail("%w", err)
	}
	defer blocks.Close()
	sub := s.session(false)
	defer sub.close()
	s.showNotes()
	keys := s.keys()
	sub.SetKeys(keys)
	options := publish.ExportOptions{
		StoreDir: s.store, Root: *root, Directory: directory, Blocks: blocks, Keys: keys, Closure: *closure, Since: *since, Log: logf,
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
		return fail("%w", err)
	}
	where.Path = directory
	fmt.Printf("%d items, %d blocks, %.1f MiB\nsubstitute URL: %s\nblock store: %s/blocks\n",
		done.Items, done.Blocks, float64(done.Bytes)/(1<<20), where.String(), where.String())
	return 0
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
	existing, missing := directory, ""
	for _, err := os.Stat(existing); err != nil && existing != "/"; _, err = os.Stat(existing) {
		missing = filepath.Join(filepath.Base(existing), missing)
		existing = filepath.Dir(existing)
	}
	existing, err := filepath.EvalSymlinks(existing)
	if err != nil {
		return err
	}
	resolved := filepath.Join(existing, missing)
	for _, parent := range parents {
		if resolved != parent && !strings.HasPrefix(resolved, parent+"/") {
			continue
		}
		var here, above unix.Stat_t
		if err := unix.Stat(existing, &here); err != nil {
			return &os.PathError{Op: "stat", Path: existing, Err: err}
		}
		if err := unix.Stat(filepath.Dir(parent), &above); err != nil || here.Dev == above.Dev {
			return fmt.Errorf("no stick is mounted where %s is to be", directory)
		}
	}
	return nil
}

// narinfosFrom gets the narinfos that a server has.
func narinfosFrom(ctx context.Context, client *mirror.Client, server string, hashParts []string) (map[string][]byte, error) {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var mu sync.Mutex
	texts := map[string][]byte{}
	total := 0
	err := client.Narinfos(ctx, server, hashParts, func(a mirror.Answer) {
		if a.Status == http.StatusOK && a.Body != nil {
			mu.Lock()
			defer mu.Unlock()
			if total += len(a.Body); total > publish.MaxNarinfos {
				stop(fmt.Errorf("%s sends more than narinfos can be", mirror.WithoutUser(server)))
				return
			}
			texts[a.Hash] = a.Body
		}
	})
	var down *mirror.ServerError
	if errors.As(err, &down) {
		err = fmt.Errorf("some narinfos could not be had: %w", err)
	}
	return texts, err
}
