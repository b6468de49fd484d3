// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bufio"
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// killWriters starts a writer, kills it (SIGKILL) in the middle, and does so again; in the end
// every block that a writer acknowledged must be there.
func killWriters(name, directory string, size, kills int) error {
	executable, err := os.Executable()
	if err != nil {
		return err
	}
	acknowledged, reopen := 0, time.Duration(0)
	for range kills {
		writer := exec.Command(executable, "-store", name, "-directory", directory, "-size", strconv.Itoa(size), "-writer")
		writer.Stderr = os.Stderr
		output, err := writer.StdoutPipe()
		if err != nil {
			return err
		}
		if err := writer.Start(); err != nil {
			return err
		}
		time.AfterFunc(500*time.Millisecond+rand.N(500*time.Millisecond), func() { writer.Process.Kill() })
		for lines := bufio.NewScanner(output); lines.Scan(); {
			if n, err := strconv.Atoi(lines.Text()); err == nil {
				acknowledged = max(acknowledged, n)
			}
		}
		writer.Wait()
		start := time.Now()
		store, err := engines[name](directory, size)
		if err != nil {
			return fmt.Errorf("opening after a kill: %w", err)
		}
		reopen = max(reopen, time.Since(start))
		for i := range acknowledged {
			want := content(i, size)
			if b, err := store.get(eris.Sum(want), nil); err != nil || !bytes.Equal(b, want) {
				return fmt.Errorf("block %d of %d acknowledged: absent or wrong: %w", i, acknowledged, err)
			}
		}
		if err := store.close(); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(directory, "next"), []byte(strconv.Itoa(acknowledged)), 0o600); err != nil {
			return err
		}
	}
	fmt.Printf("%-17s %5d  killed %d times: all of %d acknowledged blocks there; slowest opening %v\n",
		name, size, kills, acknowledged, reopen.Round(100*time.Microsecond))
	return nil
}

// writeUntilKilled stores blocks in batches and prints how many have been acknowledged.
func writeUntilKilled(name, directory string, size int) error {
	text, _ := os.ReadFile(filepath.Join(directory, "next"))
	next, _ := strconv.Atoi(string(text))
	store, err := engines[name](directory, size)
	if err != nil {
		return err
	}
	for {
		if err := store.put(nextBlocks(next, 32, size)); err != nil {
			return err
		}
		next += 32
		fmt.Println(next)
	}
}
