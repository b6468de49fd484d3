// SPDX-License-Identifier: GPL-3.0-or-later

package reuse

import (
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// A listing is the names of all items of the store. It is safe for concurrent use.
type listing struct {
	store string

	mu    sync.Mutex
	names []string
	mtime time.Time // of the directory when it was read
	again time.Time // when it may be read again
}

// readAgain is how many times longer than reading takes it is not read again.
const readAgain = 100

// read returns the names of store items, as they are or were not long ago. Every item that is made
// changes the directory, so it is not read again each time.
func (l *listing) read() ([]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	begin := time.Now()
	if begin.Before(l.again) {
		return l.names, nil
	}
	info, err := os.Stat(l.store)
	if err != nil || l.names != nil && info.ModTime().Equal(l.mtime) {
		return l.names, err
	}
	directory, err := os.Open(l.store)
	if err != nil {
		return nil, err
	}
	defer directory.Close()
	names, err := directory.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	l.names = slices.DeleteFunc(names, func(name string) bool { return narinfo.CheckStoreName(name) != nil })
	l.mtime = info.ModTime()
	end := time.Now()
	l.again = end.Add(readAgain * end.Sub(begin))
	return l.names, nil
}

// named returns the items whose names end like that of item, which is not among them, the newest
// first.
func (l *listing) named(item string) ([]string, error) {
	names, err := l.read()
	if err != nil {
		return nil, err
	}
	var found []string
	born := map[string]int64{}
	for _, name := range names {
		if !strings.HasSuffix(name, item[hashLen:]) || len(name) != len(item) || name == item {
			continue
		}
		var st unix.Stat_t
		if unix.Lstat(l.store+"/"+name, &st) == nil {
			found = append(found, name)
			born[name] = st.Ctim.Nano() // its modification time is that of all items
		}
	}
	slices.SortStableFunc(found, func(a, b string) int { return int(min(1, max(-1, born[b]-born[a]))) })
	return found, nil
}

// all returns a table of the hashes of all items.
func (l *listing) all() (*table, error) {
	names, err := l.read()
	if err != nil {
		return nil, err
	}
	// Beside an item may be files of the daemon that are named after it; those have longer names.
	names = slices.SortedFunc(slices.Values(names), func(a, b string) int { return len(b) - len(a) })
	pairs := make([]pair, len(names))
	for i, name := range names {
		pairs[i] = pair{name, name}
	}
	return newTable(pairs), nil
}
