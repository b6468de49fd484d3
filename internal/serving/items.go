// SPDX-License-Identifier: GPL-3.0-or-later

package serving

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/spf13/pflag"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/items"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/guixdb"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/serverlog"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
)

// itemSettings are options that say which store items there are.
type itemSettings struct {
	store, root                  string
	database, manifest, narinfos string
	instead                      string // what else there is, for errors
	closers
}

func (s *itemSettings) flags(f *pflag.FlagSet) {
	s.instead = "; see --manifest and --narinfos"
	f.StringVar(&s.store, "store-dir", settings.StoreDirectory(), "the store directory that narinfos name is `DIRECTORY`")
	f.StringVar(&s.root, "root", "", "the items are in `DIRECTORY`, if not in the store directory")
	f.StringVar(&s.database, "database", settings.DatabaseFile(), "the daemon's database is `FILE`")
	f.StringVar(&s.manifest, "manifest", "", "take the items from `FILE`, a list of records with StorePath and References, instead of from the database")
	f.StringVar(&s.narinfos, "narinfos", "", "take the items from the narinfos in `DIRECTORY` instead of from the database")
}

// closers are what closes what has been opened, the last one first.
type closers []func()

func (c *closers) close() {
	for i := len(*c) - 1; i >= 0; i-- {
		(*c)[i]()
	}
}

// openItems opens what knows the items; close closes it.
func (s *itemSettings) openItems() (publish.Items, error) {
	if _, err := os.Stat(s.root + "/"); s.root != "" && err != nil {
		return nil, err
	}
	switch {
	case s.manifest != "" && s.narinfos != "":
		return nil, message.Usage("--manifest and --narinfos both say where the items are known from; leave one out")
	case s.manifest != "":
		text, err := os.ReadFile(s.manifest)
		if err != nil {
			return nil, err
		}
		m, err := publish.ParseManifest(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", s.manifest, err)
		}
		return m, nil
	case s.narinfos != "":
		_, err := os.Stat(s.narinfos + "/") // which must be a directory
		return publish.Directory(s.narinfos), err
	}
	d, err := guixdb.Open(s.database, s.store, guixdb.Timeout)
	if err != nil {
		return nil, fmt.Errorf("the database of guix-daemon cannot be read: %w%s", err, s.instead)
	}
	s.closers = append(s.closers, func() { d.Close() })
	return d, nil
}

func (s itemSettings) names(ctx context.Context) ([]string, error) {
	s.closers = nil // of this copy
	known, err := s.openItems()
	if err != nil {
		return nil, err
	}
	defer s.close()
	return known.Names(ctx)
}

// stamp returns something else when there may be other items, and each minute.
func (s *itemSettings) stamp() string {
	text := time.Now().Format("15:04")
	for _, name := range []string{s.manifest, s.narinfos, s.database, s.database + "-wal"} {
		if info, err := os.Stat(name); err == nil {
			text += fmt.Sprint(" ", info.ModTime().UnixNano(), info.Size())
		}
	}
	return text
}

// share opens the table of the items in a directory, and keeps it up to date until it is closed by
// the function that is returned.
func (s *itemSettings) share(ctx context.Context, directory string, log *serverlog.Log) (*items.Table, func(), error) {
	if _, err := s.names(ctx); err != nil {
		return nil, nil, err
	}
	table, err := items.Open(directory, cmp.Or(s.root, s.store), log.Warnf)
	if err != nil {
		return nil, nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	var group sync.WaitGroup
	copied := *s // what is appended to its closers meanwhile is not for others
	shared := func(s items.Stats) {
		log.Info(fmt.Sprintf("%d store items are shared, with %d blocks", s.Items, s.Entries))
	}
	group.Go(func() { table.Run(ctx, copied.stamp, copied.names, shared) })
	return table, func() {
		stop()
		group.Wait()
		table.Close()
	}, nil
}

// sharing is a block store, perhaps with the blocks of store items.
type sharing struct {
	*blockstore.Store
	items *items.Table // nil: none
}

// openShared opens the block store and, if they are to be shared, the table of items, which is
// closed with the settings.
func (s *serveSettings) openShared(ctx context.Context) (sharing, error) {
	store, err := s.openStore(ctx)
	if err != nil || !s.items {
		return sharing{Store: store}, err
	}
	table, closeItems, err := s.share(ctx, filepath.Join(s.directory, "items"), s.log.Log)
	if err != nil {
		return sharing{}, errors.Join(err, store.Close())
	}
	s.closers = append(s.closers, closeItems)
	return sharing{store, table}, nil
}

// Start implements [fetch.Source]. The block store answers at once.
func (s sharing) Start(r *fetch.Request) {
	if s.items == nil {
		s.Store.Start(r)
		return
	}
	done := r.Done
	r.Done = func(*fetch.Request) {}
	s.Store.Start(r)
	r.Done = done
	if errors.Is(r.Err, eris.ErrNotFound) {
		s.items.Start(r)
		return
	}
	r.Done(r)
}

// Cancel implements [fetch.Source].
func (s sharing) Cancel(r *fetch.Request) {
	if s.items != nil {
		s.items.Cancel(r)
	}
}

// Have implements [fetch.Haver].
func (s sharing) Have(question []byte) []byte {
	answer := s.Store.Have(question)
	if s.items == nil {
		return answer
	}
	more := s.items.Have(question)
	answer = answer[:min(len(answer), len(more))]
	for i := range answer {
		answer[i] |= more[i]
	}
	return answer
}
