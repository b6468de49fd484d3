// SPDX-License-Identifier: GPL-3.0-or-later

package reuse

import (
	"cmp"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// A Listing is the names of all items of a store, which is read when it is asked for. It is safe
// for concurrent use.
type Listing struct {
	// Directory is that of the store.
	Directory string

	mu       sync.Mutex
	names    []string
	identity files.Identity // of the directory when it was read
	again    time.Time      // when it may be read again
}

// readAgain is how many times longer than reading takes it is not read again.
const readAgain = 100

// read returns the names of store items, as they are or were not long ago. Every item that is made
// changes the directory, so it is not read again each time.
func (l *Listing) read() ([]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	begin := time.Now()
	if begin.Before(l.again) {
		return l.names, nil
	}
	identity := files.Identify(l.Directory)
	if identity != (files.Identity{}) && identity == l.identity {
		return l.names, nil
	}
	directory, err := os.Open(l.Directory)
	if err != nil {
		return nil, err
	}
	defer directory.Close()
	names, err := directory.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	l.names = slices.DeleteFunc(names, func(name string) bool { return narinfo.CheckStoreName(name) != nil })
	l.identity = identity
	end := time.Now()
	l.again = end.Add(readAgain * end.Sub(begin))
	return l.names, nil
}

// Like returns the items, but for one, whose names are like that of this one, the newest first; and
// of them only those older than it, if older is set. They are as they are or were not long ago.
func (l *Listing) Like(item string, older bool, like func(name, item string) bool) ([]string, error) {
	names, err := l.read()
	if err != nil {
		return nil, err
	}
	latest := int64(math.MaxInt64)
	if older {
		if latest, err = l.birth(item); err != nil {
			return nil, err
		}
	}
	born := map[string]int64{}
	for _, name := range names {
		if name == item || !like(name, item) {
			continue
		}
		if b, err := l.birth(name); err == nil && b < latest {
			born[name] = b
		}
	}
	return slices.SortedFunc(maps.Keys(born), func(a, b string) int { return cmp.Or(cmp.Compare(born[b], born[a]), cmp.Compare(a, b)) }), nil
}

// birth is when an item came to its place, in nanoseconds, as far as can be told: its modification
// time is that of all items.
func (l *Listing) birth(name string) (int64, error) {
	var st unix.Stat_t
	if err := unix.Lstat(l.Directory+"/"+name, &st); err != nil {
		return 0, &os.PathError{Op: "lstat", Path: l.Directory + "/" + name, Err: err}
	}
	return st.Ctim.Nano(), nil
}

// named returns the items whose names end like that of item, the newest first.
func (l *Listing) named(item string) ([]string, error) {
	return l.Like(item, false, func(name, item string) bool {
		return len(name) == len(item) && strings.HasSuffix(name, item[HashLength:])
	})
}

// mostDebug bounds the items that are looked into for each program, twice.
const mostDebug = 32

// debug returns the newest items that may be the output "debug" of the derivation of an item.
func (l *Listing) debug(item string) []string {
	// The name of an output other than "out" ends with that of the output.
	name := item[HashLength:]
	wanted := []string{name + "-debug", name[:max(1, strings.LastIndexByte(name, '-'))] + "-debug"}
	items, _ := l.Like(item, false, func(name, _ string) bool { return slices.Contains(wanted, name[HashLength:]) })
	return items[:min(len(items), mostDebug)]
}

// all returns a table of the hashes of all items.
func (l *Listing) all() (*Replacer, error) {
	names, err := l.read()
	if err != nil {
		return nil, err
	}
	// Beside an item may be files of the daemon that are named after it; those have longer names.
	names = slices.SortedFunc(slices.Values(names), func(a, b string) int { return len(b) - len(a) })
	pairs := make([]Replacement, len(names))
	for i, name := range names {
		pairs[i] = Replacement{name, name}
	}
	return NewReplacer(pairs), nil
}
