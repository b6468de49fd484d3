// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// fullDisk mounts a small file system and has a process of its own fill it, because not every store
// survives that.
func fullDisk(name, directory string, size int) error {
	executable, err := os.Executable()
	if err != nil {
		return err
	}
	if err := syscall.Mount("tmpfs", directory, "tmpfs", 0, "size=512m"); err != nil {
		return fmt.Errorf("mounting a small file system: %w", err)
	}
	defer syscall.Unmount(directory, 0)
	// Some space to be given back, once the rest is full.
	if err := os.WriteFile(filepath.Join(directory, "ballast"), make([]byte, 256<<20), 0o600); err != nil {
		return err
	}
	filler := exec.Command(executable, "-store", name, "-directory", directory, "-size", strconv.Itoa(size), "-filler")
	output, err := filler.CombinedOutput()
	if err != nil {
		first, _, _ := strings.Cut(strings.TrimSpace(string(output)), "\n")
		if i := strings.LastIndex(string(output), "\ncomparison: "); i >= 0 {
			first = string(output[i+1:])
		}
		fmt.Printf("%-17s %5d  full disk: %v: %.200q\n", name, size, err, first)
		return nil
	}
	fmt.Printf("%-17s %5d  full disk: %s", name, size, output)
	return nil
}

// fillDisk puts blocks until that fails, looks whether all that were acknowledged are there, and
// whether more can be put when there is space again.
func fillDisk(name, directory string, size int) error {
	stores := filepath.Join(directory, "store")
	if err := os.Mkdir(stores, 0o700); err != nil {
		return err
	}
	store, err := engines[name](stores, size)
	if err != nil {
		return fmt.Errorf("opening: %w", err)
	}
	next := 0
	var acknowledged []int
	fill := func() error {
		for {
			batch := nextBlocks(next, 32, size)
			if err := store.put(batch); err != nil {
				return err
			}
			for i := range batch {
				acknowledged = append(acknowledged, next+i)
			}
			next += len(batch)
		}
	}
	check := func() error {
		for _, i := range acknowledged {
			want := content(i, size)
			if b, err := store.get(eris.Sum(want), nil); err != nil || !bytes.Equal(b, want) {
				return fmt.Errorf("block %d of %d acknowledged: absent or wrong: %w", i, len(acknowledged), err)
			}
		}
		return nil
	}
	if err := fill(); !errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("full, but not said so: %w", err)
	}
	first := len(acknowledged)
	if err := check(); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(directory, "ballast")); err != nil {
		return err
	}
	failure := fill()
	if err := check(); err != nil {
		return err
	}
	fmt.Printf("%d blocks acknowledged and there; with twice the space %d (then: %v)\n", first, len(acknowledged), failure)
	return nil
}
