// SPDX-License-Identifier: GPL-3.0-or-later

package dir

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/local"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var must = testhelp.Must

func mustOpen(tb testing.TB, url string) *Store {
	tb.Helper()
	s, err := Open(url)
	must(tb, err)
	tb.Cleanup(func() { s.Close() })
	return s
}

// path returns where a block is below a directory.
func path(directory string, flat bool, ref eris.Reference) string {
	return filepath.Join(directory, file(flat, ref.String()))
}

func mustWrite(tb testing.TB, path string, content []byte) {
	tb.Helper()
	must(tb, os.MkdirAll(filepath.Dir(path), 0o777))
	must(tb, os.WriteFile(path, content, 0o666))
}

func TestConformance(t *testing.T) {
	for _, name := range []string{"sharded", "flat"} {
		t.Run(name, func(t *testing.T) {
			sourcetest.Test(t, func(t *testing.T, backend *sourcetest.Backend) sourcetest.Fixture {
				directory := t.TempDir()
				open := func(query string) *Store {
					s, err := Open("file://" + directory + "?layout=" + name + query)
					must(t, err)
					t.Cleanup(func() { s.Close() }) // waits for operations that Close did not wait for
					s.Store = local.New(s.URL, sourcetest.Files{Files: adapter{s}, Backend: backend})
					return s
				}
				return sourcetest.Fixture{Source: open(""), ReadOnly: open("&get"), Held: 4}
			})
		})
	}
}

func get(s *Store, ref eris.Reference, size eris.BlockSize) ([]byte, error) {
	return fetch.Get(context.Background(), s, ref, size, nil)
}

func TestLayouts(t *testing.T) {
	directory := t.TempDir()
	s := mustOpen(t, "file://"+directory)
	for i := range 20 {
		for _, flat := range []bool{true, false} {
			ref, block := sourcetest.NewBlock(eris.BlockSize1KiB)
			mustWrite(t, path(directory, flat, ref), block)
			if got, err := get(s, ref, eris.BlockSize1KiB); err != nil || !bytes.Equal(got, block) {
				t.Errorf("%d: flat %v: %v", i, flat, err)
			}
		}
	}
	// What is written is where it belongs, and nothing else is left.
	for query, flat := range map[string]bool{"": false, "?layout=sharded": false, "?layout=flat": true} {
		directory := filepath.Join(t.TempDir(), "new directory")
		s := mustOpen(t, "file://"+strings.ReplaceAll(directory, " ", "%20")+query)
		ref, block := sourcetest.NewBlock(eris.BlockSize32KiB)
		must(t, s.Put(t.Context(), ref, block))
		if got, err := os.ReadFile(path(directory, flat, ref)); err != nil || !bytes.Equal(got, block) {
			t.Errorf("%s: %v", query, err)
		}
		if left, err := os.ReadDir(filepath.Join(directory, incoming)); err != nil || len(left) > 0 {
			t.Errorf("%s: %v is left, %v", query, left, err)
		}
	}
}

// TestHostileDirectory has things in the place of blocks that are none. None of them may be read,
// waited for, or do harm.
func TestHostileDirectory(t *testing.T) {
	outside := t.TempDir()
	for name, flat := range map[string]bool{"sharded": false, "flat": true} {
		for what, place := range map[string]func(path string, block []byte) error{
			"symbolic link": func(path string, block []byte) error {
				target := filepath.Join(outside, filepath.Base(path))
				mustWrite(t, target, block)
				return os.Symlink(target, path)
			},
			"symbolic link inside": func(path string, block []byte) error {
				mustWrite(t, path+"x", block)
				return os.Symlink(filepath.Base(path)+"x", path)
			},
			"symbolic link to itself": func(path string, _ []byte) error { return os.Symlink(filepath.Base(path), path) },
			"pipe":                    func(path string, _ []byte) error { return unix.Mkfifo(path, 0o666) },
			"directory":               func(path string, _ []byte) error { return os.Mkdir(path, 0o777) },
			"empty file":              func(path string, _ []byte) error { return os.WriteFile(path, nil, 0o666) },
			"terabyte": func(path string, _ []byte) error {
				if err := os.WriteFile(path, nil, 0o666); err != nil {
					return err
				}
				return os.Truncate(path, 1<<40)
			},
			"truncated file": func(path string, block []byte) error { return os.WriteFile(path, block[:len(block)-1], 0o666) },
			"lower case": func(path string, block []byte) error {
				return os.WriteFile(filepath.Join(filepath.Dir(path), strings.ToLower(filepath.Base(path))), block, 0o666)
			},
		} {
			t.Run(name+"/"+what, func(t *testing.T) {
				directory := t.TempDir()
				s := mustOpen(t, "file://"+directory+"?layout="+name)
				ref, block := sourcetest.NewBlock(eris.BlockSize1KiB)
				file := path(directory, flat, ref)
				must(t, os.MkdirAll(filepath.Dir(file), 0o777))
				if err := place(file, block); err != nil {
					t.Skip(err)
				}
				_, err := get(s, ref, eris.BlockSize1KiB)
				var wrong *eris.BlockError
				wantWrong := what == "terabyte" || what == "truncated file"
				if wantWrong && (!errors.As(err, &wrong) || wrong.Reference != ref) || !wantWrong && !errors.Is(err, eris.ErrNotFound) {
					t.Errorf("error is %v", err)
				}
				err = s.Put(t.Context(), ref, block)
				if what == "directory" {
					if err == nil {
						t.Error("a directory was replaced")
					}
					return
				}
				must(t, err)
				if got, err := get(s, ref, eris.BlockSize1KiB); err != nil || !bytes.Equal(got, block) {
					t.Errorf("the block did not take the place: %v", err)
				}
				if info, err := os.Lstat(file); err != nil || !info.Mode().IsRegular() {
					t.Errorf("there is no regular file: %v, %v", info, err)
				}
			})
		}
	}
	t.Run("subdirectories that are links", func(t *testing.T) {
		directory := t.TempDir()
		s := mustOpen(t, "file://"+directory)
		ref, block := sourcetest.NewBlock(eris.BlockSize1KiB)
		mustWrite(t, path(outside, false, ref), block)
		must(t, os.Symlink(filepath.Join(outside, ref.String()[:2]), filepath.Join(directory, ref.String()[:2])))
		if _, err := get(s, ref, eris.BlockSize1KiB); err == nil {
			t.Error("Get followed a link")
		}
		other, block := sourcetest.NewBlock(eris.BlockSize1KiB)
		for other.String()[:2] == ref.String()[:2] {
			other, block = sourcetest.NewBlock(eris.BlockSize1KiB)
		}
		must(t, os.Symlink(outside, filepath.Join(directory, incoming)))
		before, _ := os.ReadDir(outside)
		if err := s.Put(t.Context(), other, block); err == nil {
			t.Error("Put followed a link")
		}
		if after, _ := os.ReadDir(outside); len(after) != len(before) {
			t.Error("something was written elsewhere")
		}
	})
}

// TestDamaged checks that a damaged file is replaced, and that one of the wrong size does not hide
// a good one.
func TestDamaged(t *testing.T) {
	directory := t.TempDir()
	s := mustOpen(t, "file://"+directory+"?layout=flat")
	ref, block := sourcetest.NewBlock(eris.BlockSize1KiB)
	wrong := bytes.Clone(block)
	wrong[0] ^= 1
	mustWrite(t, path(directory, true, ref), wrong)
	var blockError *eris.BlockError
	if _, err := get(s, ref, eris.BlockSize1KiB); !errors.As(err, &blockError) {
		t.Errorf("error is %v", err)
	}
	must(t, s.Put(t.Context(), ref, block))
	if got, err := os.ReadFile(path(directory, true, ref)); err != nil || !bytes.Equal(got, block) {
		t.Errorf("the damaged file was not replaced: %v", err)
	}
	mustWrite(t, path(directory, true, ref), block[1:])
	mustWrite(t, path(directory, false, ref), block)
	if got, err := get(s, ref, eris.BlockSize1KiB); err != nil || !bytes.Equal(got, block) {
		t.Errorf("error is %v", err)
	}
	if err := s.Put(t.Context(), ref, wrong); !errors.As(err, &blockError) {
		t.Errorf("wrong bytes were put: %v", err)
	}
}

// TestOtherDirectory has the directory come, go, and another one take its place, as happens with
// media.
func TestOtherDirectory(t *testing.T) {
	parent := t.TempDir()
	directory := filepath.Join(parent, "usb")
	s := mustOpen(t, "file://"+directory)
	ref, block := sourcetest.NewBlock(eris.BlockSize1KiB)
	expire := func() {
		s.mu.Lock()
		s.checked = time.Time{}
		s.mu.Unlock()
	}
	if _, err := get(s, ref, eris.BlockSize1KiB); err == nil || errors.Is(err, eris.ErrNotFound) {
		t.Errorf("without a directory, the error is %v", err)
	}
	mustWrite(t, path(directory, false, ref), block)
	if _, err := get(s, ref, eris.BlockSize1KiB); err != nil {
		t.Errorf("with the directory: %v", err)
	}
	must(t, os.Rename(directory, directory+"-old"))
	other, otherBlock := sourcetest.NewBlock(eris.BlockSize1KiB)
	expire()
	if _, err := get(s, other, eris.BlockSize1KiB); err == nil || errors.Is(err, eris.ErrNotFound) {
		t.Errorf("when the directory has gone, the error is %v", err)
	}
	mustWrite(t, path(directory, false, other), otherBlock)
	expire()
	if _, err := get(s, other, eris.BlockSize1KiB); err != nil {
		t.Errorf("in the new directory: %v", err)
	}
	expire()
	if _, err := get(s, ref, eris.BlockSize1KiB); !errors.Is(err, eris.ErrNotFound) {
		t.Errorf("what was in the old directory: %v", err)
	}
	must(t, os.RemoveAll(directory))
	expire()
	if err := s.Put(t.Context(), ref, block); err == nil {
		t.Error("Put into a directory that has gone did not fail")
	}
	if err := s.Put(t.Context(), ref, block); err != nil {
		t.Errorf("Put does not make the directory again: %v", err)
	}
}

func TestClean(t *testing.T) {
	directory := t.TempDir()
	old, fresh, foreign := "0123456789abcdef", "fedcba9876543210", "photo.jpg"
	for _, name := range []string{old, fresh, foreign} {
		mustWrite(t, filepath.Join(directory, incoming, name), []byte("x"))
	}
	long := time.Now().Add(-2 * forgotten)
	for _, name := range []string{old, foreign} {
		must(t, os.Chtimes(filepath.Join(directory, incoming, name), long, long))
	}
	s := mustOpen(t, "file://"+directory)
	ref, block := sourcetest.NewBlock(eris.BlockSize1KiB)
	must(t, s.Put(t.Context(), ref, block))
	for name, want := range map[string]bool{old: false, fresh: true, foreign: true} {
		if _, err := os.Lstat(filepath.Join(directory, incoming, name)); (err == nil) != want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// refusing are files that cannot be written.
type refusing struct {
	local.Files
	err error
}

func (r refusing) Write(eris.Reference, []byte) (func() error, error) {
	return nil, &os.PathError{Err: r.err}
}

func TestFailures(t *testing.T) {
	ref, block := sourcetest.NewBlock(eris.BlockSize1KiB)
	s := mustOpen(t, "file://"+t.TempDir()+"?put")
	must(t, s.Put(t.Context(), ref, block))
	if _, err := get(s, ref, eris.BlockSize1KiB); !errors.Is(err, eris.ErrNotFound) {
		t.Errorf("what may not be got: %v", err)
	}
	s = mustOpen(t, "file://"+filepath.Join(t.TempDir(), "a", "b"))
	if err := s.Put(t.Context(), ref, block); err == nil || !strings.Contains(err.Error(), "/a does not exist; make it, or plug the medium in") {
		t.Errorf("error is %v", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	mustWrite(t, file, nil)
	s = mustOpen(t, "file://"+file)
	if err := s.Put(t.Context(), ref, block); err == nil {
		t.Error("a file was taken for a directory")
	}
	for _, err := range []error{unix.EROFS, unix.EACCES, unix.EPERM} {
		s := mustOpen(t, "file://"+t.TempDir())
		s.Store = local.New(s.URL, refusing{adapter{s}, err})
		if err := s.Put(t.Context(), ref, block); !errors.Is(err, fetch.ErrReadOnly) {
			t.Errorf("error is %v", err)
		}
	}
	if os.Getuid() != 0 {
		directory := t.TempDir()
		os.Chmod(directory, 0o555)
		s = mustOpen(t, "file://"+directory)
		if err := s.Put(t.Context(), ref, block); !errors.Is(err, fetch.ErrReadOnly) {
			t.Errorf("error is %v", err)
		}
	}
	for _, url := range []string{"file:", "http://x", "file://host/x", "file:///x?layout=round", "file:///x?x"} {
		if _, err := Open(url); err == nil {
			t.Errorf("%s is taken", url)
		}
	}
}

func putAll(b *testing.B, s *Store, refs []eris.Reference, blocks [][]byte) {
	pipeline := fetch.NewPipeline(b.Context(), s)
	for i, ref := range refs {
		must(b, pipeline.Put(b.Context(), ref, blocks[i]))
	}
	must(b, pipeline.Flush())
}

// BenchmarkPut puts as an encoder does: thousands at a time.
func BenchmarkPut(b *testing.B) {
	for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
		b.Run(size.String(), func(b *testing.B) {
			s := mustOpen(b, "file://"+b.TempDir())
			refs, blocks := make([]eris.Reference, b.N), make([][]byte, b.N)
			for i := range refs {
				refs[i], blocks[i] = sourcetest.NewBlock(size)
			}
			b.SetBytes(int64(size))
			b.ResetTimer()
			putAll(b, s, refs, blocks)
		})
	}
}

// BenchmarkGet gets from files in the page cache, some at a time, as readers do.
func BenchmarkGet(b *testing.B) {
	for _, window := range []int{1, 64} {
		for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
			b.Run(fmt.Sprintf("window=%d/%v", window, size), func(b *testing.B) {
				s := mustOpen(b, "file://"+b.TempDir())
				refs, blocks := make([]eris.Reference, 512), make([][]byte, 512)
				for i := range refs {
					refs[i], blocks[i] = sourcetest.NewBlock(size)
				}
				putAll(b, s, refs, blocks)
				b.SetBytes(int64(size))
				b.ReportAllocs()
				b.ResetTimer()
				var group errgroup.Group
				group.SetLimit(window)
				for i := range b.N {
					group.Go(func() error {
						_, err := get(s, refs[i%len(refs)], size)
						return err
					})
				}
				must(b, group.Wait())
			})
		}
	}
}
