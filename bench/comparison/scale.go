// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
)

// samples is how many blocks are read of a large store.
const samples = 1 << 20

// scale fills a store with many blocks, and measures what that costs; then it has many clients get
// some of them from "serve" of the program, if that is not empty.
func scale(name, directory string, size, count, clients int, program string, duration time.Duration) error {
	report := func(what, format string, arguments ...any) {
		fmt.Printf("%-17s %5d  %-34s %s\n", name, size, what, fmt.Sprintf(format, arguments...))
	}
	store, err := engines[name](directory, size)
	if err != nil {
		return err
	}
	const writers, batch, parts = 4, 1024, 10
	stride := (count + samples - 1) / samples
	references := make([]eris.Reference, (count+stride-1)/stride)
	for part := range parts {
		begin := time.Now()
		var group errgroup.Group
		for w := range writers {
			group.Go(func() error {
				for n := part*count/parts + w*batch; n < (part+1)*count/parts; n += writers * batch {
					blocks := nextBlocks(n, min(batch, (part+1)*count/parts-n), size)
					for i, b := range blocks {
						if (n+i)%stride == 0 {
							references[(n+i)/stride] = b.reference
						}
					}
					if err := store.put(blocks); err != nil {
						return err
					}
				}
				return nil
			})
		}
		if err := group.Wait(); err != nil {
			return err
		}
		report(fmt.Sprintf("put, up to %d", (part+1)*count/parts), "%8.0f blocks/s  %s",
			float64(count/parts)/time.Since(begin).Seconds(), memory("self"))
	}
	opened := func(what string) error {
		begin := time.Now()
		if err := store.close(); err != nil {
			return err
		}
		closed := time.Since(begin)
		if what == "crash" {
			if err := os.Remove(filepath.Join(directory, "index.sum")); err != nil {
				return err
			}
		}
		begin = time.Now()
		if store, err = engines[name](directory, size); err != nil {
			return err
		}
		open := time.Since(begin)
		count++
		err := store.put(nextBlocks(count, 1, size))
		report("close; open, put after "+what, "%v; %v, %v", closed.Round(time.Millisecond), open.Round(time.Millisecond), time.Since(begin).Round(time.Millisecond))
		return err
	}
	if err := errors.Join(opened("end"), opened("crash")); err != nil {
		return err
	}
	report("disk", "%.1f bytes for each block beside it", float64(diskUsage(directory))/float64(count)-float64(size))
	for _, readers := range []int{1, 8, 8} {
		n, err := read(store, references, stride, size, readers, duration)
		if err != nil {
			return err
		}
		report(fmt.Sprintf("random reads, %d readers", readers), "%8.0f blocks/s  %s", n, memory("self"))
	}
	if err := store.close(); err != nil || program == "" {
		return err
	}
	return crowd(report, directory, program, references, size, clients, duration)
}

// crowd starts a server, connects clients to it, and has each of them get blocks one by one: one
// per second, and then as fast as it can.
func crowd(report func(what, format string, a ...any), directory, program string, references []eris.Reference, size, clients int, duration time.Duration) error {
	server := exec.Command(program, "serve", "--directory="+directory, "--socket=none", "--listen=coap+tcp://127.0.0.1:0",
		fmt.Sprint("--max-connections=", clients))
	if os.Geteuid() == 0 {
		server.Args = append(server.Args, "--user=root")
	}
	said, err := server.StderrPipe()
	if err != nil {
		return err
	}
	if err := server.Start(); err != nil {
		return err
	}
	defer server.Wait()
	defer server.Process.Signal(os.Interrupt)
	lines := bufio.NewScanner(said)
	url, last := "", ""
	for url == "" && lines.Scan() {
		last = lines.Text()
		if _, after, ok := strings.Cut(last, "serving on "); ok {
			url, _, _ = strings.Cut(after, " ")
		}
	}
	if url == "" {
		return fmt.Errorf("the server ended: %s", last)
	}
	go func() { // ends with the server
		for lines.Scan() {
			fmt.Println(lines.Text())
		}
	}()
	pid := fmt.Sprint(server.Process.Pid)
	report("serve, no clients", "%s", memory(pid))
	for _, pause := range []time.Duration{time.Second, time.Second, 0} {
		took, err := getEach(url, clients, references, eris.BlockSize(size), pause, 3*duration)
		if err != nil {
			return err
		}
		report(fmt.Sprintf("%d clients, pause %v", clients, pause), "%8.0f blocks/s  median %v, 99 %% %v, longest %v  %s",
			float64(len(took))/(3*duration).Seconds(), took[len(took)/2].Round(time.Microsecond), took[len(took)*99/100].Round(time.Microsecond),
			took[len(took)-1].Round(time.Microsecond), memory(pid))
	}
	return nil
}

// getEach has each of some clients get and verify one block after the other, and returns what these
// took, in order. First, each gets one that does not count.
func getEach(url string, clients int, references []eris.Reference, size eris.BlockSize, pause, duration time.Duration) ([]time.Duration, error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var ready sync.WaitGroup
	ready.Add(clients)
	taken := make([][]time.Duration, clients)
	var group errgroup.Group
	for n := range taken {
		s, err := coap.Open(url, coap.Options{})
		if err != nil {
			return nil, err
		}
		group.Go(func() error {
			defer s.Close()
			buffer := make([]byte, size)
			get := func() error {
				_, err := fetch.Get(context.Background(), s, references[rand.IntN(len(references))], size, buffer)
				return err
			}
			err := get()
			ready.Done()
			ready.Wait()
			for err == nil {
				select {
				case <-ctx.Done():
					return nil
				case <-time.After(time.Duration(rand.Int64N(int64(2*pause) + 1))):
				}
				begin := time.Now()
				err = get()
				taken[n] = append(taken[n], time.Since(begin))
			}
			return err
		})
	}
	ready.Wait()
	time.Sleep(duration)
	cancel()
	err := group.Wait()
	all := slices.Concat(taken...)
	slices.Sort(all)
	return all, err
}

// memory returns how much memory a process has: of its own, and of files that are mapped.
func memory(pid string) string {
	text, _ := os.ReadFile("/proc/" + pid + "/status")
	var own, mapped int64
	for line := range strings.Lines(string(text)) {
		_, _ = fmt.Sscanf(line, "RssAnon: %d", &own)
		_, _ = fmt.Sscanf(line, "RssFile: %d", &mapped)
	}
	return fmt.Sprintf("memory %d MiB, mapped %d MiB", own>>10, mapped>>10)
}
