// SPDX-License-Identifier: GPL-3.0-or-later

// Package guixdb reads the database of guix-daemon, while that may write to it: which items are in
// the store, and what is known of each. Start with [Open].
package guixdb

import (
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	_ "modernc.org/sqlite" // the driver of the daemon's database

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// Timeout is for how long most users of the database wait while somebody locks it.
const Timeout = 10 * time.Second

// ErrNoItem is returned for a store item that there is not.
var ErrNoItem = errors.New("no such store item")

// A Database is the database of guix-daemon. It is safe for concurrent use.
type Database struct {
	name  string
	url   string
	store string
	db    *sql.DB
}

// Open opens the daemon's database (usually /var/guix/db/db.sqlite) for reading. store is the store
// directory without a slash at its end. The timeout is for how long somebody may lock it until that
// is an error. Close must be called at the end.
//
// The daemon may write at the same time. It keeps a write-ahead log, for which SQLite wants to have
// a file of shared memory beside the database; when nobody has the database open there is none, and
// who may not make one, because the directory belongs to root, could not read. Then there is
// nothing in a log either, so the database is read as a file that nobody changes, and what was read
// counts if indeed nobody has.
func Open(name, store string, timeout time.Duration) (*Database, error) {
	if info, err := os.Stat(name); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() { // a pipe would be waited for
		return nil, fmt.Errorf("%s is no regular file", name)
	}
	address := (&url.URL{
		Scheme: "file", Opaque: (&url.URL{Path: name}).EscapedPath(),
		RawQuery: fmt.Sprintf("mode=ro&_pragma=busy_timeout(%d)&_pragma=query_only(1)", timeout.Milliseconds()),
	}).String()
	db, err := sql.Open("sqlite", address)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	d := &Database{name, address, store, db}
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
		db, err := sql.Open("sqlite", d.url+"&immutable=1")
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
	const readOnly, cannotOpen = 8, 14 // primary result codes
	coded, ok := errors.AsType[interface {
		error
		Code() int
	}](err)
	return ok && (coded.Code()&0xff == readOnly || coded.Code()&0xff == cannotOpen)
}

// Item returns what is known of the item whose file name has the given hash part. The error wraps
// [ErrNoItem] if there is none (Guix, nix/libstore/local-store.cc: queryPathInfo and
// queryPathFromHashPart).
func (d *Database) Item(ctx context.Context, hashPart string) (n *narinfo.Narinfo, err error) {
	prefix := d.store + "/" + hashPart
	var path, hash string
	var deriver, references sql.NullString
	var size sql.NullInt64
	err = d.read(ctx, func(db *sql.DB) error {
		// One query, so that the item and its references are of one state of the database.
		return db.QueryRowContext(ctx, `SELECT path, hash, deriver, narSize, (
			SELECT group_concat(r.path, ' ') FROM Refs JOIN ValidPaths r ON reference = r.id WHERE referrer = item.id
		) FROM ValidPaths item WHERE path >= ? ORDER BY path LIMIT 1`, prefix).Scan(&path, &hash, &deriver, &size, &references)
	})
	if errors.Is(err, sql.ErrNoRows) || err == nil && !strings.HasPrefix(path, prefix+"-") {
		return nil, fmt.Errorf("%w: %s", ErrNoItem, prefix)
	} else if err != nil {
		return nil, fmt.Errorf("looking %s up: %w", prefix, err)
	}
	n = &narinfo.Narinfo{StorePath: path, NarSize: uint64(size.Int64), NarSizeKnown: size.Int64 > 0}
	digest, ok := strings.CutPrefix(hash, "sha256:")
	b, err := hex.DecodeString(digest)
	if !ok || err != nil || len(b) != len(n.NarDigest) {
		return nil, fmt.Errorf("%s has the hash %.100q in the database, which is no SHA-256", path, hash)
	}
	copy(n.NarDigest[:], b)
	if deriver.String != "" {
		n.Deriver = filepath.Base(deriver.String)
	}
	for _, reference := range strings.Fields(references.String) {
		n.References = append(n.References, filepath.Base(reference))
	}
	slices.Sort(n.References)
	return n, nil
}

// Names returns the file names of all items, in any order.
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
