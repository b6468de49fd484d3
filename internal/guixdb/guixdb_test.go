// SPDX-License-Identifier: GPL-3.0-or-later

package guixdb_test

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/guixdb"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var must = testhelp.Must

// database makes a database like the daemon's (Guix, nix/libstore/schema.sql).
func database(t *testing.T, name string, statements ...string) *sql.DB {
	t.Helper()
	db, err := sql.Open("sqlite", "file:"+name+"?_pragma=busy_timeout(10000)")
	must(t, err)
	for _, statement := range append([]string{
		"PRAGMA journal_mode = wal",
		`CREATE TABLE ValidPaths (id integer primary key autoincrement not null, path text unique not null, hash text not null,
			registrationTime integer not null, deriver text, narSize integer)`,
		`CREATE TABLE Refs (referrer integer not null, reference integer not null, primary key (referrer, reference),
			foreign key (referrer) references ValidPaths(id) on delete cascade, foreign key (reference) references ValidPaths(id) on delete restrict)`,
	}, statements...) {
		_, err := db.Exec(statement)
		must(t, err)
	}
	return db
}

// TestDatabase reads a database like the daemon's.
func TestDatabase(t *testing.T) {
	name := t.TempDir() + "/db with space?.sqlite"
	digest := sha256.Sum256([]byte("x"))
	a, b := "/gnu/store/"+strings.Repeat("a", 32)+"-a", "/gnu/store/"+strings.Repeat("b", 32)+"-b"
	db := database(t, strings.ReplaceAll(strings.ReplaceAll(name, "?", "%3f"), " ", "%20"),
		"INSERT INTO ValidPaths VALUES (1, '"+a+"', 'sha256:"+hex.EncodeToString(digest[:])+"', 0, '/gnu/store/"+strings.Repeat("d", 32)+"-a.drv', 123)",
		"INSERT INTO ValidPaths VALUES (2, '"+b+"', 'sha256:"+hex.EncodeToString(digest[:])+"', 0, NULL, 5)",
		"INSERT INTO ValidPaths VALUES (3, '/gnu/store/"+strings.Repeat("c", 32)+"-bad', 'md5:00', 0, NULL, 5)",
		"INSERT INTO Refs VALUES (1, 2)",
		"INSERT INTO Refs VALUES (1, 1)",
	)
	defer db.Close() // the daemon has it open too
	d, err := guixdb.Open(name, "/gnu/store", guixdb.Timeout)
	must(t, err)
	defer d.Close()
	n, err := d.Item(context.Background(), strings.Repeat("a", 32))
	must(t, err)
	if n.StorePath != a || n.NarDigest != digest || n.NarSize != 123 || n.Deriver != strings.Repeat("d", 32)+"-a.drv" ||
		strings.Join(n.References, " ") != filepath.Base(a)+" "+filepath.Base(b) {
		t.Errorf("item %+v", n)
	}
	if n, err := d.Item(context.Background(), strings.Repeat("b", 32)); err != nil || n.Deriver != "" || len(n.References) != 0 {
		t.Errorf("item %+v, error %v", n, err)
	}
	for _, hash := range []string{strings.Repeat("0", 32), strings.Repeat("z", 32), strings.Repeat("a", 31), "%"} {
		if n, err := d.Item(context.Background(), hash); !errors.Is(err, guixdb.ErrNoItem) {
			t.Errorf("%s: item %+v, error %v", hash, n, err)
		}
	}
	if _, err := d.Item(context.Background(), strings.Repeat("c", 32)); err == nil || errors.Is(err, guixdb.ErrNoItem) {
		t.Errorf("error %v", err)
	}
	if _, err := guixdb.Open(name+".absent", "/gnu/store", guixdb.Timeout); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v", err)
	}
	must(t, os.WriteFile(name+".bad", []byte(strings.Repeat("no database ", 1000)), 0o644))
	must(t, syscall.Mkfifo(name+".pipe", 0o600))
	if _, err := guixdb.Open(name+".pipe", "/gnu/store", guixdb.Timeout); err == nil {
		t.Error("a pipe is a database")
	}
	if _, err := guixdb.Open(name+".bad", "/gnu/store", guixdb.Timeout); err == nil {
		t.Error("anything is a database")
	}
}

// TestDatabaseOfAnotherUser reads the database as somebody who may not write where it is, while the
// daemon has it open and while nobody has.
func TestDatabaseOfAnotherUser(t *testing.T) {
	const variable = "TEST_GUIXDB_DATABASE"
	if name := os.Getenv(variable); name != "" {
		d, err := guixdb.Open(name, "/gnu/store", guixdb.Timeout)
		must(t, err)
		defer d.Close()
		if n, err := d.Item(context.Background(), strings.Repeat("a", 32)); err != nil || n.NarSize != 123 {
			t.Fatalf("item %+v, error %v", n, err)
		}
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("only root can be somebody else")
	}
	// Not t.TempDir, whose parents others may not enter.
	directory, err := os.MkdirTemp("/tmp", "guixdb-test-")
	must(t, err)
	defer os.RemoveAll(directory)
	program, err := os.ReadFile("/proc/self/exe")
	must(t, err)
	must(t, errors.Join(os.Chmod(directory, 0o755), os.WriteFile(directory+"/test", program, 0o755)))
	name := directory + "/db.sqlite"
	db := database(t, name, "INSERT INTO ValidPaths VALUES (1, '/gnu/store/"+strings.Repeat("a", 32)+"-a', 'sha256:"+strings.Repeat("00", 32)+"', 0, NULL, 123)")
	try := func(when string) {
		cmd := exec.Command(directory+"/test", "-test.run=^TestDatabaseOfAnotherUser$")
		cmd.Dir, cmd.Env = "/", append(os.Environ(), variable+"="+name)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		if output, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", when, err, output)
		}
	}
	try("while the daemon has it open")
	must(t, db.Close())
	try("while nobody has it open")
}

// TestDatabaseWhileWriting reads while another connection writes.
func TestDatabaseWhileWriting(t *testing.T) {
	name := t.TempDir() + "/db.sqlite"
	db := database(t, name)
	defer db.Close()
	d, err := guixdb.Open(name, "/gnu/store", guixdb.Timeout)
	must(t, err)
	defer d.Close()
	item := func(i int) string { return fmt.Sprintf("%032d", i) }
	written := make(chan int)
	go func() {
		defer close(written)
		for i := range 100 {
			// An item and its reference to itself appear together.
			tx, err := db.Begin()
			if err != nil {
				t.Error(err)
				return
			}
			_, err1 := tx.Exec("INSERT INTO ValidPaths VALUES (?, ?, ?, 0, NULL, 1)", i+1, "/gnu/store/"+item(i)+"-x", "sha256:"+strings.Repeat("00", 32))
			_, err2 := tx.Exec("INSERT INTO Refs VALUES (?, ?)", i+1, i+1)
			if err := errors.Join(err1, err2, tx.Commit()); err != nil {
				t.Error(err)
				return
			}
			written <- i
		}
	}()
	for last := range written {
		for _, i := range []int{last, last + 1} { // the second may be there already, or not
			n, err := d.Item(context.Background(), item(i))
			if err == nil && len(n.References) != 1 || err != nil && (i == last || !errors.Is(err, guixdb.ErrNoItem)) {
				t.Fatalf("item %d: %+v, error %v", i, n, err)
			}
		}
	}
}
