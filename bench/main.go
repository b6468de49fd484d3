// SPDX-License-Identifier: GPL-3.0-or-later

// Command bench measures the whole program as guix-daemon drives it, beside other programs that do
// the same work, in one run on one machine. "make bench" runs it.
//
// Each row of the table is the median of several runs, taken in turns with those of its rivals, so
// that what else the machine does hits all of them. Files are in memory where there is a tmpfs, and
// servers are on loopback.
package main

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"time"
)

func main() {
	runs := flag.Int("runs", 5, "`NUMBER` of runs of each row")
	size := flag.Int("size", 200, "length of the large items in `MEGABYTES`")
	only := flag.String("only", "", "rows whose group matches this regular `EXPRESSION`")
	write := flag.String("write", "", "write the table into `FILE`, between its markers")
	scratch := flag.String("directory", "", "work in `DIRECTORY`; by default in memory")
	before := flag.String("before", "", "measure the `PROGRAM`, of another commit, in turns with ours")
	flag.Parse()
	if err := bench(*runs, *size, *only, *write, *scratch, *before); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func bench(runs, size int, only, write, scratch, before string) error {
	pattern, err := regexp.Compile(only)
	if err != nil {
		return err
	}
	if scratch == "" {
		scratch = os.TempDir()
		if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() {
			scratch = "/dev/shm"
		}
	}
	directory, err := os.MkdirTemp(scratch, "guix-substitute-eris-bench-")
	if err != nil {
		return err
	}
	w := &workshop{directory: directory, size: size << 20, runs: runs, before: before}
	defer w.close()
	if err := w.prepare(); err != nil {
		return err
	}
	var table strings.Builder
	fmt.Fprintf(&table, "Measured on %s, %s, %d cores, %s, %s; median of %d runs; wall, user and system time in seconds, peak memory in MiB.\n\n",
		time.Now().Format("2006-01-02"), processor(), runtime.NumCPU(), kernel(), revision(), runs)
	table.WriteString("| what | program | wall | user | sys | memory | ratio of wall |\n|---|---|---|---|---|---|---|\n")
	fmt.Print(table.String())
	for _, g := range groups {
		if !pattern.MatchString(g.name) {
			continue
		}
		rows, err := w.measure(g)
		if err != nil {
			return fmt.Errorf("%s: %w", g.name, err)
		}
		for _, r := range rows {
			line := r.line(g.name, rows[0])
			table.WriteString(line)
			fmt.Print(line)
		}
	}
	if write == "" {
		return nil
	}
	return replaceBetween(write, "<!-- bench:begin -->\n", "<!-- bench:end -->", table.String())
}

// replaceBetween replaces what is between two markers in a file.
func replaceBetween(name, begin, end, text string) error {
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(b), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		return fmt.Errorf("%s lacks the markers of the table", name)
	}
	return os.WriteFile(name, []byte(before+begin+text+end+after), 0o644)
}

func processor() string {
	b, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

func kernel() string {
	b, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	release, _, _ := strings.Cut(strings.TrimSpace(string(b)), "-")
	return "Linux " + release
}

func revision() string {
	out, err := exec.Command("git", "describe", "--always", "--dirty").Output()
	if err != nil {
		return "unknown revision"
	}
	return "revision " + strings.TrimSpace(string(out))
}

// root is the directory of the module that is measured.
func root() (string, error) {
	const module = "codeberg.org/guix-substitute-eris/guix-substitute-eris"
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", module).Output()
	if err != nil {
		return "", fmt.Errorf("run this in the directory bench: %w", err)
	}
	return filepath.Clean(strings.TrimSpace(string(out))), nil
}
