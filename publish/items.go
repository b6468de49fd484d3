// SPDX-License-Identifier: GPL-3.0-or-later

package publish

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	_ "modernc.org/sqlite" // the driver of the daemon's database

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// Items knows what is in a store. It is safe for concurrent use.
type Items interface {
	// Item returns the item whose file name has the given hash part. The error wraps [ErrNoItem] if
	// there is none.
	Item(ctx context.Context, hashPart string) (*narinfo.Narinfo, error)
	// Names returns the file names of all items, in any order.
	Names(ctx context.Context) ([]string, error)
}

// ErrNoItem is returned for a store item that there is not.
var ErrNoItem = errors.New("no such store item")

// A Database is the database of guix-daemon as [Items].
type Database struct {
	name  string
	store string
	db    *sql.DB
}

// OpenDatabase opens the daemon's database (usually /var/guix/db/db.sqlite) for reading. store is
// the store directory without a slash at its end. Close must be called at the end.
//
// The daemon may write at the same time. It keeps a write-ahead log, for which SQLite wants to have
// a file of shared memory beside the database; when nobody has the database open there is none, and
// who may not make one, because the directory belongs to root, could not read. Then there is
// nothing in a log either, so the database is read as a file that nobody changes, and what was read
// counts if indeed nobody has.
func OpenDatabase(name, store string) (*Database, error) {
	if _, err := os.Stat(name); err != nil {
		return nil, err
	}
	db, err := sql.Open("sqlite", databaseURL(name, ""))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	d := &Database{name, store, db}
	err = d.read(context.Background(), func(db *sql.DB) error {
		var n int
		return db.QueryRow("SELECT count(*) FROM (SELECT id FROM ValidPaths LIMIT 1)").Scan(&n)
	})
	if err != nil {
		db.Close()
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return d, nil
}

// databaseURL is what SQLite knows a database by. The daemon may hold it for a moment.
func databaseURL(name, more string) string {
	source := url.URL{
		Scheme: "file", Opaque: (&url.URL{Path: name}).EscapedPath(),
		RawQuery: "mode=ro&_pragma=busy_timeout(10000)&_pragma=query_only(1)" + more,
	}
	return source.String()
}

// Close closes the database.
func (d *Database) Close() error { return d.db.Close() }

// readAttempts is how often a database is read that changes meanwhile.
const readAttempts = 5

// read runs what reads the database.
func (d *Database) read(ctx context.Context, run func(*sql.DB) error) error {
	for attempt := 1; ; attempt++ {
		err := run(d.db)
		if err == nil || !needsSharedMemory(err) || attempt == readAttempts || ctx.Err() != nil {
			return err
		}
		before, ok := d.quiet()
		if !ok {
			continue
		}
		db, err := sql.Open("sqlite", databaseURL(d.name, "&immutable=1"))
		if err != nil {
			return err
		}
		err = run(db)
		db.Close()
		if after, ok := d.quiet(); ok && os.SameFile(before, after) && before.ModTime().Equal(after.ModTime()) && before.Size() == after.Size() {
			return err
		}
	}
}

// quiet reports whether nobody has the database open who could write to it, and which file it is.
func (d *Database) quiet() (os.FileInfo, bool) {
	info, err := os.Stat(d.name)
	if err != nil {
		return nil, false
	}
	_, err = os.Stat(d.name + "-wal")
	return info, errors.Is(err, fs.ErrNotExist)
}

// needsSharedMemory reports whether an error is that of a database with a write-ahead log whose
// other files cannot be made (SQLite, section "Read-Only Databases" of "Write-Ahead Logging").
func needsSharedMemory(err error) bool {
	var coded interface{ Code() int }
	if !errors.As(err, &coded) {
		return false
	}
	const readOnly, cannotOpen = 8, 14 // primary result codes
	primary := coded.Code() & 0xff
	return primary == readOnly || primary == cannotOpen
}

// Item implements [Items] (Guix, nix/libstore/local-store.cc: queryPathInfo and
// queryPathFromHashPart).
func (d *Database) Item(ctx context.Context, hashPart string) (n *narinfo.Narinfo, err error) {
	err = d.read(ctx, func(db *sql.DB) error {
		n, err = d.item(ctx, db, hashPart)
		return err
	})
	return n, err
}

func (d *Database) item(ctx context.Context, db *sql.DB, hashPart string) (*narinfo.Narinfo, error) {
	// The item and its references must be of one state of the database.
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("looking %s up: %w", hashPart, err)
	}
	defer tx.Rollback()
	prefix := d.store + "/" + hashPart
	var id int64
	var path, hash string
	var deriver sql.NullString
	var size sql.NullInt64
	row := tx.QueryRowContext(ctx, "SELECT id, path, hash, deriver, narSize FROM ValidPaths WHERE path >= ? ORDER BY path LIMIT 1", prefix)
	err = row.Scan(&id, &path, &hash, &deriver, &size)
	if errors.Is(err, sql.ErrNoRows) || err == nil && !strings.HasPrefix(path, prefix+"-") {
		return nil, fmt.Errorf("%w: %s", ErrNoItem, prefix)
	} else if err != nil {
		return nil, fmt.Errorf("looking %s up: %w", prefix, err)
	}
	n := &narinfo.Narinfo{StorePath: path, NarSize: uint64(size.Int64), NarSizeKnown: size.Int64 > 0}
	digest, ok := strings.CutPrefix(hash, "sha256:")
	b, err := hex.DecodeString(digest)
	if !ok || err != nil || len(b) != len(n.NarDigest) {
		return nil, fmt.Errorf("%s has the hash %.100q in the database, which is no SHA-256", path, hash)
	}
	copy(n.NarDigest[:], b)
	if deriver.String != "" {
		n.Deriver = filepath.Base(deriver.String)
	}
	rows, err := tx.QueryContext(ctx, "SELECT path FROM Refs JOIN ValidPaths ON reference = id WHERE referrer = ? ORDER BY path", id)
	if err != nil {
		return nil, fmt.Errorf("looking the references of %s up: %w", path, err)
	}
	defer rows.Close()
	for rows.Next() {
		var ref string
		if err := rows.Scan(&ref); err != nil {
			return nil, fmt.Errorf("looking the references of %s up: %w", path, err)
		}
		n.References = append(n.References, filepath.Base(ref))
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("looking the references of %s up: %w", path, err)
	}
	return n, nil
}

// Names implements [Items].
func (d *Database) Names(ctx context.Context) (names []string, err error) {
	err = d.read(ctx, func(db *sql.DB) error {
		names = nil
		rows, err := db.QueryContext(ctx, "SELECT path FROM ValidPaths")
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var path string
			if err := rows.Scan(&path); err != nil {
				return err
			}
			names = append(names, filepath.Base(path))
		}
		return rows.Err()
	})
	if err != nil {
		return nil, fmt.Errorf("listing the items in %s: %w", d.name, err)
	}
	return names, nil
}

// A Directory is a directory of narinfos, named HASH.narinfo, as [Items]: what a server has once
// said about items that are in a store.
type Directory string

// Item implements [Items].
func (d Directory) Item(_ context.Context, hashPart string) (*narinfo.Narinfo, error) {
	name := filepath.Join(string(d), hashPart+".narinfo")
	text, err := files.ReadRegular(name, narinfo.MaxSize)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s", ErrNoItem, hashPart)
	} else if err != nil {
		return nil, err
	}
	n, err := narinfo.Parse(text)
	if err == nil {
		err = n.CheckHash()
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return n, nil
}

// Names implements [Items].
func (d Directory) Names(ctx context.Context) (names []string, err error) {
	entries, err := os.ReadDir(string(d))
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if hashPart, ok := strings.CutSuffix(e.Name(), ".narinfo"); ok {
			n, err := d.Item(ctx, hashPart)
			if err != nil {
				return nil, err
			}
			names = append(names, filepath.Base(n.StorePath))
		}
	}
	return names, nil
}

// A Manifest is a list of items as [Items].
type Manifest map[string]*narinfo.Narinfo

// ParseManifest reads a manifest: records like those of narinfos, separated by empty lines, with
// the fields StorePath and References and, if they are known, NarHash, NarSize and Deriver. What is
// not known of an item is found out when the item is published.
func ParseManifest(text []byte) (Manifest, error) {
	m := Manifest{}
	for i, record := range bytes.Split(text, []byte("\n\n")) {
		record = bytes.TrimLeft(record, "\n")
		if len(record) == 0 {
			continue
		}
		// A narinfo says where the nar is too.
		record = append(bytes.TrimRight(record, "\n"), "\nURL: x\nCompression: none\n"...)
		n, err := narinfo.Parse(record)
		if err == nil && n.NarHash != "" {
			err = n.CheckHash()
		}
		if err != nil {
			return nil, fmt.Errorf("record %d of the manifest: %w", i+1, err)
		}
		hashPart, _, _ := strings.Cut(filepath.Base(n.StorePath), "-")
		m[hashPart] = n
	}
	return m, nil
}

// Item implements [Items].
func (m Manifest) Item(_ context.Context, hashPart string) (*narinfo.Narinfo, error) {
	if n := m[hashPart]; n != nil {
		return n, nil
	}
	return nil, fmt.Errorf("%w: %s", ErrNoItem, hashPart)
}

// Closure returns the paths of items and of everything that they refer to, each after those that it
// refers to itself. Errors are those of items, which wrap [ErrNoItem] for what is not known.
func Closure(ctx context.Context, items Items, storeDir string, paths []string) ([]string, error) {
	var closure []string
	seen := map[string]bool{}
	var visit func(path string) error
	visit = func(path string) error {
		if seen[path] {
			return nil
		}
		if len(seen) == maxExported {
			return fmt.Errorf("more than %d items are too many", maxExported)
		}
		seen[path] = true
		hashPart, err := narinfo.HashPart(storeDir, path)
		if err != nil {
			return err
		}
		n, err := items.Item(ctx, hashPart)
		if err != nil {
			return err
		}
		for _, name := range n.References {
			if err := visit(storeDir + "/" + name); err != nil {
				return err
			}
		}
		closure = append(closure, path)
		return nil
	}
	for _, path := range paths {
		if err := visit(path); err != nil {
			return nil, err
		}
	}
	return closure, nil
}

// Names implements [Items].
func (m Manifest) Names(context.Context) (names []string, err error) {
	for _, n := range m {
		names = append(names, filepath.Base(n.StorePath))
	}
	return names, nil
}
