// SPDX-License-Identifier: GPL-3.0-or-later

package unixsocket

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var must = testhelp.Must

func mustListen(t *testing.T, path string) net.Listener {
	t.Helper()
	l, err := Listen(path, 0o660, -1)
	must(t, err)
	t.Cleanup(func() { l.Close() })
	return l
}

func mustDial(t *testing.T, path string) {
	t.Helper()
	conn, err := net.Dial("unix", path)
	must(t, err)
	conn.Close()
}

// dead leaves a socket on which nobody listens.
func dead(t *testing.T, path string) {
	t.Helper()
	l, err := net.Listen("unix", path)
	must(t, err)
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
}

func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "b", "s")
	l, err := Listen(path, 0o620, os.Getgid())
	must(t, err)
	info, err := os.Lstat(path)
	if err != nil || info.Mode() != fs.ModeSocket|0o620 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	mustDial(t, path)
	if conn, err := l.Accept(); err != nil {
		t.Error(err)
	} else if _, ok := conn.(*net.UnixConn); !ok {
		t.Errorf("connections are %T", conn)
	}
	if _, err := Listen(path, 0o600, -1); !errors.Is(err, ErrInUse) {
		t.Errorf("with a living server: %v", err)
	}
	mustDial(t, path)
	must(t, l.Close())
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket stays: %v", err)
	}
	must(t, l.Close())
	mustListen(t, path)
}

// TestListenLeaves checks what is not replaced.
func TestListenLeaves(t *testing.T) {
	directory := t.TempDir()
	foreign := filepath.Join(directory, "foreign")
	other, err := net.Listen("unix", foreign)
	must(t, err)
	defer other.Close()
	if _, err := Listen(foreign, 0o600, -1); !errors.Is(err, ErrInUse) {
		t.Errorf("a living server without a lock: %v", err)
	}
	mustDial(t, foreign)

	file := filepath.Join(directory, "file")
	must(t, os.WriteFile(file, []byte("x"), 0o600))
	link := filepath.Join(directory, "link")
	must(t, os.Symlink(foreign, link))
	locked := filepath.Join(directory, "locked")
	must(t, os.Symlink(file, locked+".lock"))
	for _, path := range []string{file, link, directory, locked, "relative", filepath.Join(directory, strings.Repeat("x", 108))} {
		if l, err := Listen(path, 0o600, -1); err == nil {
			t.Errorf("%s: is replaced", path)
			l.Close()
		} else if !strings.Contains(err.Error(), path) {
			t.Errorf("error does not name %s: %v", path, err)
		}
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "x" {
		t.Errorf("%q, %v", b, err)
	}
}

// TestListenRace starts many servers at a dead socket: one of them gets it.
func TestListenRace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	for range 50 {
		dead(t, path)
		var (
			group sync.WaitGroup
			mu    sync.Mutex
			won   []net.Listener
		)
		for range 8 {
			group.Go(func() {
				l, err := Listen(path, 0o600, -1)
				if err == nil {
					mu.Lock()
					defer mu.Unlock()
					won = append(won, l)
				} else if !errors.Is(err, ErrInUse) {
					t.Error(err)
				}
			})
		}
		group.Wait()
		if len(won) != 1 {
			t.Fatalf("%d servers have the socket", len(won))
		}
		mustDial(t, path)
		must(t, won[0].Close())
	}
}

// TestCloseLeavesOthers closes a listener whose socket somebody has replaced.
func TestCloseLeavesOthers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l := mustListen(t, path)
	must(t, os.Remove(path))
	other, err := net.Listen("unix", path)
	must(t, err)
	defer other.Close()
	must(t, l.Close())
	mustDial(t, path)
}
