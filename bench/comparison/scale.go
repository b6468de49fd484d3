// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
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

// scale fills a store with many blocks, and measures what that costs; then it has clients get some
// of them of "serve" of the program, if that is not empty.
func scale(name, directory string, size, count, clients int, program string, duration time.Duration) error {
	store, err := engines[name](directory, size)
	if err != nil {
		return err
	}
	const writers, batch, parts = 4, 1024, 10
	stride := (count + samples - 1) / samples
	references := make([]eris.Reference, (count+stride-1)/stride)
	for part := range parts {
		first, end, begin := part*count/parts, (part+1)*count/parts, time.Now()
		var group errgroup.Group
		for w := range writers {
			group.Go(func() error {
				for n := first + w*batch; n < end; n += writers * batch {
					blocks := nextBlocks(n, min(batch, end-n), size)
					for i := n + (stride-n%stride)%stride; i < n+len(blocks); i += stride {
						references[i/stride] = blocks[i-n].reference
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
		fmt.Printf("put, up to %d: %.0f blocks/s, %s\n", end, float64(end-first)/time.Since(begin).Seconds(), memory("self"))
	}
	fmt.Printf("disk: %.1f bytes for each block beside it\n", float64(diskUsage(directory))/float64(count)-float64(size))
	for _, readers := range []int{1, 8, 8} {
		n, err := read(store, references, stride, size, readers, duration)
		if err != nil {
			return err
		}
		fmt.Printf("random reads, %d readers: %.0f blocks/s, %s\n", readers, n, memory("self"))
	}
	for _, end := range []string{"an orderly end", "a crash"} {
		times := []time.Time{time.Now()}
		err := store.close()
		if end == "a crash" { // it leaves no checksum
			err = errors.Join(err, os.Remove(filepath.Join(directory, "index.sum")))
		}
		times = append(times, time.Now())
		if err == nil {
			store, err = engines[name](directory, size)
		}
		times = append(times, time.Now())
		if err == nil {
			count++
			err = store.put(nextBlocks(count, 1, size))
		}
		if err != nil {
			return err
		}
		fmt.Printf("closed in %v; after %s, open after %v, and writable after %v\n", times[1].Sub(times[0]), end, times[2].Sub(times[1]), time.Since(times[1]))
	}
	if err := store.close(); err != nil || program == "" {
		return err
	}
	return crowd(directory, program, references, eris.BlockSize(size), clients, duration)
}

// crowd starts a server, and has clients connect to it and get blocks one by one: one per second,
// again so by others, and then as fast as they can.
func crowd(directory, program string, references []eris.Reference, size eris.BlockSize, clients int, duration time.Duration) error {
	socket := filepath.Join(directory, "socket")
	server := exec.Command(program, "serve", "--directory="+directory, "--socket="+socket, fmt.Sprint("--max-connections=", clients))
	if os.Geteuid() == 0 {
		server.Args = append(server.Args, "--user=root")
	}
	server.Stderr = os.Stderr
	if err := server.Start(); err != nil {
		return err
	}
	defer server.Wait()
	defer server.Process.Signal(os.Interrupt)
	for range 100 { // 10 s, in which it listens or has ended
		if _, err := os.Stat(socket); err == nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	for _, pause := range []time.Duration{time.Second, time.Second, 0} {
		took, err := getEach("coap+unix://"+socket, clients, references, size, pause, duration)
		if err != nil {
			return err
		}
		n := len(took)
		fmt.Printf("%d clients, pause %v: %.0f blocks/s, median %v, 99 %% %v, longest %v, %s\n", clients, pause,
			float64(n)/duration.Seconds(), took[n/2], took[n*99/100], took[n-1], memory(fmt.Sprint(server.Process.Pid)))
	}
	return nil
}

// getEach has each of some clients get and verify one block after the other, and returns what these
// took, in order. First, each gets one that does not count.
func getEach(url string, clients int, references []eris.Reference, size eris.BlockSize, pause, duration time.Duration) ([]time.Duration, error) {
	ctx, cancel := context.WithCancel(context.Background())
	var ready sync.WaitGroup
	ready.Add(clients)
	taken := make([][]time.Duration, clients)
	var group errgroup.Group
	for n := range taken {
		group.Go(func() error {
			s, err := coap.Open(url, coap.Options{})
			if err == nil {
				defer s.Close()
				_, err = fetch.Get(context.Background(), s, references[n%len(references)], size, nil)
			}
			ready.Done()
			for ready.Wait(); err == nil; {
				select {
				case <-ctx.Done():
					return nil
				case <-time.After(rand.N(2*pause + 1)):
				}
				begin := time.Now()
				_, err = fetch.Get(context.Background(), s, references[rand.IntN(len(references))], size, nil)
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
	return fmt.Sprintf("%d MiB of memory and %d MiB of files", own>>10, mapped>>10)
}
