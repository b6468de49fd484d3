// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

// A group is rows that are measured in turns; the first is ours.
type group struct {
	name string
	rows func(w *workshop) ([]contestant, error)
}

// A contestant is a program that does the work of a group.
type contestant struct {
	name string
	run  func() (sample, error)
}

// errAbsent is returned by rows whose program is not installed.
var errAbsent = errors.New("not installed")

type sample struct {
	wall, user, sys time.Duration
	memory          int64 // bytes
	note            string
}

type result struct {
	name string
	sample
	absent bool
}

// measure runs the rows of a group in turns, and returns medians.
func (w *workshop) measure(g group) ([]result, error) {
	contestants, err := g.rows(w)
	if err != nil {
		return nil, err
	}
	for _, c := range contestants {
		if w.before != "" && strings.HasPrefix(c.name, "ours") {
			contestants = append(contestants, contestant{"before: " + c.name, func() (sample, error) { return w.runBefore(c) }})
		}
	}
	samples := make([][]sample, len(contestants))
	for run := range w.runs + 1 {
		for i, c := range contestants {
			s, err := c.run()
			if errors.Is(err, errAbsent) {
				continue
			} else if err != nil {
				return nil, fmt.Errorf("%s: %w", c.name, err)
			}
			if run > 0 { // the first fills caches
				samples[i] = append(samples[i], s)
			}
		}
	}
	var results []result
	for i, c := range contestants {
		r := result{name: c.name, absent: len(samples[i]) == 0}
		if !r.absent {
			r.sample = median(samples[i])
		}
		results = append(results, r)
	}
	return results, nil
}

// runBefore measures the program as it was before. What that cannot do yet is absent.
func (w *workshop) runBefore(c contestant) (sample, error) {
	ours := w.binary
	w.binary = w.before
	defer func() { w.binary = ours }()
	s, err := c.run()
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s before: %v\n", c.name, err)
		err = errAbsent
	}
	return s, err
}

// median takes the median of each number.
func median(samples []sample) (m sample) {
	pick := func(f func(sample) int64) int64 {
		var v []int64
		for _, s := range samples {
			v = append(v, f(s))
		}
		slices.Sort(v)
		return v[len(v)/2]
	}
	m.wall = time.Duration(pick(func(s sample) int64 { return int64(s.wall) }))
	m.user = time.Duration(pick(func(s sample) int64 { return int64(s.user) }))
	m.sys = time.Duration(pick(func(s sample) int64 { return int64(s.sys) }))
	m.memory = pick(func(s sample) int64 { return s.memory })
	m.note = samples[0].note
	return m
}

func (r result) line(group string, first result) string {
	if r.absent {
		return fmt.Sprintf("| %s | %s | – | – | – | – | not installed |\n", group, r.name)
	}
	ratio := ""
	if r.name != first.name && r.wall > 0 {
		ratio = fmt.Sprintf("ours ÷ this: %.2f", first.wall.Seconds()/r.wall.Seconds())
	}
	switch {
	case strings.HasSuffix(r.note, "."): // it says all
		ratio = r.note
	case r.note != "":
		ratio = strings.TrimSpace(r.note + " " + ratio)
	}
	return fmt.Sprintf("| %s | %s | %.3f | %.3f | %.3f | %.0f | %s |\n", group, r.name,
		r.wall.Seconds(), r.user.Seconds(), r.sys.Seconds(), float64(r.memory)/(1<<20), ratio)
}

// run runs a program to its end.
func run(cmd *exec.Cmd) (sample, error) {
	var stderr bytes.Buffer
	if cmd.Stderr == nil {
		cmd.Stderr = &stderr
	}
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		return sample{}, err
	}
	var peak int64
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for {
			n := peakMemory(cmd.Process.Pid)
			if n == 0 {
				return
			}
			peak = max(peak, n)
			time.Sleep(5 * time.Millisecond)
		}
	}()
	err := cmd.Wait()
	s := usageOf(cmd, time.Since(begin))
	<-watched
	s.memory = peak
	if err != nil {
		err = fmt.Errorf("%w: %.1000s", err, stderr.String())
	}
	return s, err
}

// peakMemory is how much memory a process that runs has had at most, in bytes; 0 if it does not
// run. What the kernel tells at the end includes what we had when the process was forked.
func peakMemory(pid int) int64 {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := bytes.Cut(status, []byte("VmHWM:"))
	var kib int64
	fmt.Sscan(string(rest), &kib)
	return kib << 10
}

func usageOf(cmd *exec.Cmd, wall time.Duration) sample {
	s := sample{wall: wall}
	if state := cmd.ProcessState; state != nil {
		s.user, s.sys = state.UserTime(), state.SystemTime()
	}
	return s
}

// A helperRun is a run of the program as the daemon has it run.
type helperRun struct {
	program   []string // and its first arguments
	mode      string   // query or substitute
	arguments []string // further ones
	url       string
	store     string // the store directory; the usual one if it is empty
	requests  []string
	options   string
	env       []string
	fresh     bool // without what earlier runs have cached
	firstOnly bool // stop the clock at the first reply
}

// helper runs a helper with the given requests, one by one.
func (w *workshop) helper(h helperRun) (sample, error) {
	state := filepath.Join(w.directory, "state-"+filepath.Base(h.program[0]))
	if h.fresh {
		os.RemoveAll(state)
	}
	replies, repliesOut, err := os.Pipe()
	if err != nil {
		return sample{}, err
	}
	defer replies.Close()
	stdin, requests, err := os.Pipe()
	if err != nil {
		return sample{}, err
	}
	defer requests.Close()
	var log bytes.Buffer
	cmd := exec.Command(h.program[0], slices.Concat(h.program[1:], []string{"substitute", "--" + h.mode}, h.arguments)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &log, &log
	cmd.ExtraFiles = []*os.File{stdin, repliesOut}
	environment := slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "XDG_CACHE_HOME=") || strings.HasPrefix(v, "ERIS_STORE_URL=")
	})
	cmd.Env = append(append(environment,
		"_NIX_OPTIONS=discover=false\nsubstitute-urls="+h.url+"\nuntrusted-print-extended-build-trace=1\n"+h.options,
		"GUIX_STATE_DIRECTORY="+state,
		"GUIX_CONFIGURATION_DIRECTORY="+filepath.Join(w.directory, "etc"),
	), h.env...)
	if h.store != "" {
		cmd.Env = append(cmd.Env, "NIX_STORE_DIR="+h.store)
	}
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		return sample{}, err
	}
	stdin.Close()
	repliesOut.Close()
	var first time.Duration
	failure := func() error {
		buffer := make([]byte, 1<<20)
		for _, request := range h.requests {
			if _, err := io.WriteString(requests, request+"\n"); err != nil {
				return err
			}
			reply := []byte{}
			for len(reply) == 0 || h.mode == "query" && !bytes.HasSuffix(reply, []byte("\n\n")) && !bytes.Equal(reply, []byte("\n")) {
				n, err := replies.Read(buffer)
				reply = append(reply, buffer[:n]...)
				if err != nil {
					return fmt.Errorf("after %q: %w", reply, err)
				}
			}
			if h.mode == "query" {
				// One that has not answered for all has not done all of the work.
				if asked, told := strings.Count(request, " "), bytes.Count(reply, []byte(cmp.Or(h.store, "/gnu/store")+"/")); told < asked {
					return fmt.Errorf("reply about %d of %d items", told, asked)
				}
			}
			if h.mode == "substitute" && !bytes.HasPrefix(reply, []byte("success ")) {
				return fmt.Errorf("reply %q to %.200q", reply, request)
			}
			if first == 0 {
				first = time.Since(begin)
			}
		}
		return nil
	}()
	all := time.Since(begin)
	memory := peakMemory(cmd.Process.Pid)
	requests.Close()
	err = cmd.Wait()
	if failure != nil {
		err = failure
	}
	s := usageOf(cmd, all)
	s.memory = memory
	if h.firstOnly {
		s.wall = first
	}
	if err != nil {
		err = fmt.Errorf("%w; log:\n%.2000s", err, log.String())
	}
	return s, err
}

// destination is where items go, empty.
func (w *workshop) destination() (string, error) {
	d := filepath.Join(w.directory, "out")
	if err := restore.Remove(d); err != nil {
		return "", err
	}
	return d, os.Mkdir(d, 0o755)
}

// stock is the program that guix is, or nil.
func stock() []string {
	if g := os.Getenv("GUIX"); g != "" {
		return []string{g}
	}
	return nil
}

// look finds a program.
func look(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return "", errAbsent
	}
	return path, nil
}
