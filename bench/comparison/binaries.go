// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// measureBinaries builds the programs below binaries/, static and stripped, and measures their size
// and how long they take to start, do nothing and end: the least of many runs.
func measureBinaries() error {
	programs, err := filepath.Glob("binaries/*")
	if err != nil {
		return err
	}
	if len(programs) == 0 {
		return fmt.Errorf("no binaries/ here: run in the directory of the source")
	}
	directory, err := os.MkdirTemp("", "comparison-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(directory)
	for _, program := range programs {
		binary := filepath.Join(directory, filepath.Base(program))
		build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", binary, "./"+program)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if output, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("building %s: %w: %s", program, err, output)
		}
		info, err := os.Stat(binary)
		if err != nil {
			return err
		}
		least := time.Hour
		for range 200 {
			start := time.Now()
			if err := exec.Command(binary).Run(); err != nil {
				return err
			}
			least = min(least, time.Since(start))
		}
		fmt.Printf("%-12s %8.2f MB  %v\n", filepath.Base(program), float64(info.Size())/1e6, least.Round(10*time.Microsecond))
	}
	return nil
}
