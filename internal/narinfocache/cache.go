// SPDX-License-Identifier: GPL-3.0-or-later

// Package narinfocache keeps what substitute servers have said about store items on disk, for the
// next process: the daemon starts one helper to ask about items and another to fetch them, and new
// ones for each client. Start with [Open].
//
// Together the files take at most about 256 MiB; those go first that have not been used for
// longest.
//
// There is a file per server and item. Files appear under their names complete, so any number of
// processes may use one cache, and any of them may be killed at any time. Each file carries a
// checksum, for after a power failure. What is in the cache is trusted no more than the servers
// are: signatures are checked again each time a narinfo is used.
package narinfocache

import (
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

// An Entry is what a server has said about an item.
type Entry struct {
	// Narinfo is the text of the narinfo; nil if there was none.
	Narinfo []byte
	// TTL is how long the entry is valid from when it is stored.
	TTL time.Duration
	// Until is when that ends; Get fills it in.
	Until time.Time
}

// Lifetime returns for how long an answer is to be kept, a narinfo or that there is none, of a
// server that has said so; negative if it has not (Guix, guix/substitutes.scm: %narinfo-ttl and the
// two after it; the last one is a minute there).
func Lifetime(there bool, said time.Duration) time.Duration {
	usual, most := 2*time.Minute, time.Hour
	if there {
		usual, most = 36*time.Hour, maxTTL
	}
	if said < 0 {
		return usual
	}
	return min(said, most)
}

// cost is about how much memory an entry takes, in bytes.
func (e Entry) cost() int { return 256 + len(e.Narinfo) }

// A Cache is a directory of entries. It is safe for concurrent use, and so is the directory. Close
// must be called at the end.
type Cache struct {
	directory string
	most      int64 // bytes on disk
	trimEvery int   // files

	mu      sync.Mutex
	pending map[string]*later // by server and item: what is not on disk yet
	size    int               // of pending, in bytes
	failed  error             // of writing, since the last PutLater
	writer  sync.WaitGroup
	writing bool
	written *sync.Cond // told when one of pending has been written
}

// later is an entry that waits to be written.
type later struct {
	url, hash string
	entry     Entry
	stored    time.Time
}

const (
	// maxAge bounds the life of files, whatever their entries say (Guix,
	// guix/scripts/substitute.scm: cached-narinfo-expiration-time).
	maxAge = 2 * 24 * time.Hour
	// maxTTL bounds what is believed of their entries.
	maxTTL = 365 * 24 * time.Hour
	// maxBytes bounds what the entries take on disk. It is looked at, and what is too old removed,
	// after about trimEvery files.
	maxBytes  = 256 << 20
	trimEvery = 4096
	// maxPending bounds what waits to be written, in bytes.
	maxPending = 4 << 20
	// clockSkew is by how much the clocks of two processes may differ.
	clockSkew = time.Minute
	// maxFile bounds the length of a file that is read, in bytes.
	maxFile = 2 << 20
	// temporaryAge is after how long such a file has no writer any more.
	temporaryAge = time.Hour
)

// Open returns the cache in directory, which it creates if need be, for its owner alone. It fails
// if the directory belongs to another user. Other errors are of the file system, too.
func Open(directory string) (*Cache, error) {
	if err := files.MakeDirectory(directory); err != nil {
		return nil, err
	}
	c := &Cache{directory: directory, most: maxBytes, trimEvery: trimEvery, pending: map[string]*later{}}
	c.written = sync.NewCond(&c.mu)
	return c, nil
}

// Close waits until everything is written.
func (c *Cache) Close() { c.writer.Wait() }

// A file begins with a line of text that names the format, then, all big-endian, the time of
// storing in seconds, the TTL in seconds (8 bytes each), 1 byte that says if there is a narinfo,
// the CRC-32C of these and of the narinfo (4 bytes), and the narinfo.
const (
	magic      = "guix-substitute-eris narinfo 1\n"
	headLength = len(magic) + 8 + 8 + 1 + 4
)

// checksum is over a file but for the checksum itself.
func checksum(file []byte) uint32 {
	table := crc32.MakeTable(crc32.Castagnoli)
	return crc32.Update(crc32.Checksum(file[:headLength-4], table), table, file[headLength:])
}

// file is the name of the file of an entry, in the directory of the server.
func (c *Cache) file(url, hash string) string {
	sum := sha256.Sum256([]byte(url))
	name := base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(sum[:])
	return filepath.Join(c.directory, strings.ToLower(name), hash)
}

// Get returns the entry of a server for the item with the given hash part, and whether there is a
// valid one at the time now. A file that cannot be read or makes no sense is no entry.
func (c *Cache) Get(url, hash string, now time.Time) (Entry, bool) {
	if !plain(hash) {
		return Entry{}, false
	}
	c.mu.Lock()
	l := c.pending[url+" "+hash]
	c.mu.Unlock()
	if l != nil && valid(l.stored, l.entry.TTL, now) {
		e := l.entry
		e.Until = l.stored.Add(e.TTL)
		return e, true
	}
	b, err := files.ReadState(c.file(url, hash), maxFile)
	if err != nil {
		return Entry{}, false
	}
	return decode(b, now)
}

// valid reports whether an entry counts at the time now. One from the future has been stored by a
// clock that was wrong.
func valid(stored time.Time, ttl time.Duration, now time.Time) bool {
	age := now.Sub(stored)
	return age >= -clockSkew && age <= ttl
}

func decode(b []byte, now time.Time) (Entry, bool) {
	if len(b) < headLength || string(b[:len(magic)]) != magic {
		return Entry{}, false
	}
	head := b[len(magic):]
	seconds := func(at int) int64 { return int64(binary.BigEndian.Uint64(head[at:])) }
	stored, ttl := time.Unix(seconds(0), 0), time.Duration(min(seconds(8), int64(maxTTL/time.Second)))*time.Second
	if !valid(stored, ttl, now) || binary.BigEndian.Uint32(head[17:]) != checksum(b) {
		return Entry{}, false
	}
	e := Entry{TTL: ttl, Until: stored.Add(ttl)}
	if head[16] != 0 {
		e.Narinfo = b[headLength:]
	}
	return e, true
}

// PutLater stores an entry without waiting for the disk, unless much is waiting already, for
// creating a file can take longer than getting what is in it. The entry is there for Get at once.
// The error is that of an earlier entry; the caller must not change e.Narinfo.
func (c *Cache) PutLater(url, hash string, e Entry, now time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	// Not with put, which an older entry of the same item could overtake.
	for c.size > 0 && c.size+e.cost() > maxPending {
		c.written.Wait()
	}
	key := url + " " + hash
	if old := c.pending[key]; old != nil {
		c.size -= old.entry.cost()
	}
	c.size += e.cost()
	c.pending[key] = &later{url, hash, e, now}
	if !c.writing {
		c.writing = true
		c.writer.Go(c.write)
	}
	err := c.failed
	c.failed = nil
	return err
}

// write writes what is pending until nothing is.
func (c *Cache) write() {
	for {
		c.mu.Lock()
		var key string
		var l *later
		for key, l = range c.pending {
			break
		}
		if key == "" {
			c.writing = false
			c.mu.Unlock()
			return
		}
		c.mu.Unlock()
		err := c.put(l.url, l.hash, l.entry, l.stored)
		// By chance, because many processes that write little write much together.
		if rand.IntN(c.trimEvery) == 0 {
			c.trim(time.Now())
		}
		c.mu.Lock()
		if c.pending[key] == l { // nothing newer has come
			delete(c.pending, key)
			c.size -= l.entry.cost()
		}
		if err != nil {
			c.failed = err
		}
		c.written.Broadcast()
		c.mu.Unlock()
	}
}

// put stores an entry. The error is of the file system; it leaves the cache as it was.
func (c *Cache) put(url, hash string, e Entry, now time.Time) error {
	if !plain(hash) {
		return fmt.Errorf("cannot cache a narinfo under the name %q", hash)
	}
	b := binary.BigEndian.AppendUint64([]byte(magic), uint64(now.Unix()))
	b = binary.BigEndian.AppendUint64(b, uint64(e.TTL/time.Second))
	b = append(b, 0, 0, 0, 0, 0) // whether there is a narinfo, and the checksum
	if e.Narinfo != nil {
		b[headLength-5] = 1
	}
	b = append(b, e.Narinfo...)
	binary.BigEndian.PutUint32(b[headLength-4:], checksum(b))

	name := c.file(url, hash)
	// Where a file takes the place of another one, some file systems make sure that it is on disk
	// first (ext4 does), which takes twice as long.
	os.Remove(name)
	err := files.Write(name, 0o600, files.Options{}, b)
	if errors.Is(err, fs.ErrNotExist) {
		if err = files.MakeDirectory(filepath.Dir(name)); err == nil {
			err = files.Write(name, 0o600, files.Options{}, b)
		}
	}
	return err
}

// plain reports whether a name can be that of a file here.
func plain(hash string) bool {
	return len(hash) == 32 && strings.Trim(hash, "0123456789abcdefghijklmnopqrstuvwxyz") == ""
}

// trim removes what is too old, and then, if all take too much, those entries that have not been
// used for longest, until they take three quarters of what they may. Errors are passed over.
func (c *Cache) trim(now time.Time) {
	var kept []used
	total := int64(0)
	servers, _ := os.ReadDir(c.directory)
	for _, server := range servers {
		if !server.IsDir() {
			continue
		}
		directory := filepath.Join(c.directory, server.Name())
		entries, _ := os.ReadDir(directory)
		for _, e := range entries {
			info, err := e.Info()
			if err != nil || !info.Mode().IsRegular() {
				continue
			}
			most := maxAge
			if strings.HasPrefix(e.Name(), files.TemporaryPrefix) {
				most = temporaryAge
			}
			name := filepath.Join(directory, e.Name())
			if now.Sub(info.ModTime()) > most {
				os.Remove(name)
				continue
			}
			kept = append(kept, used{name, lastUse(info, now), onDisk(info)})
			total += onDisk(info)
		}
		os.Remove(directory) // fails if there is something in it
	}
	if total <= c.most {
		return
	}
	slices.SortFunc(kept, func(a, b used) int { return a.last.Compare(b.last) })
	for _, u := range kept {
		if total <= c.most/4*3 {
			break
		}
		os.Remove(u.name)
		total -= u.size
	}
}

// used is a file, when it was used, and how many bytes it takes.
type used struct {
	name string
	last time.Time
	size int64
}

// lastUse returns when a file was used, as far as the file system tells: some note reading once a
// day.
func lastUse(info fs.FileInfo, now time.Time) time.Time {
	last := info.ModTime()
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		if read := time.Unix(stat.Atim.Unix()); read.After(last) && !read.After(now) {
			last = read
		}
	}
	return last
}

// onDisk is about how many bytes a file takes on disk.
func onDisk(info fs.FileInfo) int64 { return (info.Size() + 4095) &^ 4095 }
