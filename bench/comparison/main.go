// SPDX-License-Identifier: GPL-3.0-or-later

// Command comparison measures how well-kept embedded databases keep ERIS blocks, and how package
// blockstore does beside them. Its results and the decision taken are in docs/blockstore.md.
//
//	go run . -store bbolt -size 1024         all measurements of one store
//	go run . -store bbolt -kill 20           kills a writer 20 times, looks for lost blocks
//	go run . -store bbolt -full              what happens on a full disk (needs root)
//	go run . -binaries                       size and start of a program that imports each
//	go run . -store blockstore -scale 10000000 -clients 5000 -program PATH
//	                                         many blocks, and many clients of "serve"
package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

func main() {
	store := flag.String("store", "", "design to measure: "+strings.Join(names(), ", "))
	directory := flag.String("directory", os.TempDir(), "directory to make the stores below")
	size := flag.Int("size", 1024, "size of a block in bytes")
	total := flag.Int("bytes", 1<<30, "bytes of blocks to fill the store with")
	duration := flag.Duration("duration", 3*time.Second, "duration of each measurement")
	kills := flag.Int("kill", 0, "kill a writer so many times instead")
	writer := flag.Bool("writer", false, "be that writer")
	full := flag.Bool("full", false, "fill a small file system instead")
	filler := flag.Bool("filler", false, "be who does that")
	binaries := flag.Bool("binaries", false, "measure the programs below binaries/ instead")
	blocks := flag.Int("scale", 0, "put so many blocks into the store, and measure what that costs, instead")
	clients := flag.Int("clients", 500, "after that, have so many clients get blocks of a server")
	program := flag.String("program", "", "the server's program; empty is none")
	flag.Parse()
	if err := func() error {
		switch {
		case *binaries:
			return measureBinaries()
		case engines[*store] == nil:
			return fmt.Errorf("unknown store %q", *store)
		case *writer:
			return writeUntilKilled(*store, *directory, *size)
		case *filler:
			return fillDisk(*store, *directory, *size)
		}
		temporary, err := os.MkdirTemp(*directory, "comparison-"+*store+"-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(temporary)
		if *full {
			return fullDisk(*store, temporary, *size)
		}
		if *blocks > 0 {
			return scale(*store, temporary, *size, *blocks, *clients, *program, *duration)
		}
		if *kills > 0 {
			return killWriters(*store, temporary, *size, *kills)
		}
		return measure(*store, temporary, *size, *total, *duration)
	}(); err != nil {
		fmt.Fprintln(os.Stderr, "comparison:", err)
		os.Exit(1)
	}
}

func names() []string {
	var names []string
	for name := range engines {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// measure fills a store and measures it.
func measure(name, directory string, size, total int, duration time.Duration) error {
	report := func(what, format string, arguments ...any) {
		fmt.Printf("%-17s %5d  %-34s %s\n", name, size, what, fmt.Sprintf(format, arguments...))
	}
	start := time.Now()
	store, err := engines[name](directory, size)
	if err != nil {
		return err
	}
	report("open, empty", "%v", time.Since(start).Round(100*time.Microsecond))

	// Fill.
	var references []eris.Reference
	count := total / size
	written, start := writtenBytes(), time.Now()
	for len(references) < count {
		batch := nextBlocks(len(references), min(256, count-len(references)), size)
		if err := store.put(batch); err != nil {
			return err
		}
		for _, b := range batch {
			references = append(references, b.reference)
		}
	}
	elapsed := time.Since(start)
	report("fill, batches of 256", "%8.0f blocks/s  %6.1f MB/s  written %.2f× used %.2f×",
		float64(count)/elapsed.Seconds(), float64(total)/1e6/elapsed.Seconds(),
		float64(writtenBytes()-written)/float64(total), float64(diskUsage(directory))/float64(total))
	runtime.GC()

	// Reopen, as a daemon does when it is started.
	start = time.Now()
	if err := store.close(); err != nil {
		return err
	}
	closed := time.Since(start)
	start = time.Now()
	if store, err = engines[name](directory, size); err != nil {
		return err
	}
	report("close, open", "%v, %v  used %.2f×", closed.Round(100*time.Microsecond),
		time.Since(start).Round(100*time.Microsecond), float64(diskUsage(directory))/float64(total))

	// Read everything once, so that caches are as warm as they get.
	buffer := make([]byte, 0, size)
	for i, reference := range references {
		if b, err := store.get(reference, buffer); err != nil || !bytes.Equal(b, content(i, size)) {
			return fmt.Errorf("block %d: wrong or absent: %w", i, err)
		}
	}
	for _, readers := range []int{1, 8} {
		n, err := read(store, references, 1, size, readers, duration)
		if err != nil {
			return err
		}
		report(fmt.Sprintf("random reads, %d readers", readers), "%8.0f blocks/s  %6.0f MB/s", n, n*float64(size)/1e6)
	}

	// Durable writes.
	next := count
	for _, batch := range []int{1, 16, 256} {
		blocks, commits, written, start := 0, 0, writtenBytes(), time.Now()
		for time.Since(start) < duration {
			if err := store.put(nextBlocks(next, batch, size)); err != nil {
				return err
			}
			next += batch
			blocks += batch
			commits++
		}
		elapsed := time.Since(start)
		report(fmt.Sprintf("durable writes, batches of %d", batch), "%8.0f blocks/s  %6.1f MB/s  commit %v  written %.1f×",
			float64(blocks)/elapsed.Seconds(), float64(blocks*size)/1e6/elapsed.Seconds(),
			(elapsed / time.Duration(commits)).Round(10*time.Microsecond),
			float64(writtenBytes()-written)/float64(blocks*size))
	}

	// Both at once.
	var failure error
	var blocks int
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for failure == nil {
			select {
			case <-stop:
				return
			default:
			}
			failure = store.put(nextBlocks(next, 64, size))
			next += 64
			blocks += 64
		}
	}()
	n, err := read(store, references, 1, size, 8, duration)
	close(stop)
	<-done
	if err != nil || failure != nil {
		return fmt.Errorf("mixed load: %w, %w", err, failure)
	}
	report("mixed, 8 readers, batches of 64", "%8.0f reads/s  %8.0f writes/s", n, float64(blocks)/duration.Seconds())

	// Churn, as at a size limit: remove the oldest, add as many, until everything has been replaced
	// once.
	oldest, live := 0, next
	start, written = time.Now(), writtenBytes()
	for oldest < live {
		k := min(256, live-oldest)
		var victims []eris.Reference
		for i := oldest; i < oldest+k; i++ {
			victims = append(victims, eris.Sum(content(i, size)))
		}
		oldest += k
		if err := store.remove(victims); err != nil {
			return fmt.Errorf("churn: %w", err)
		}
		if err := store.put(nextBlocks(next, k, size)); err != nil {
			return fmt.Errorf("churn: %w", err)
		}
		next += k
	}
	elapsed = time.Since(start)
	report("churn, batches of 256", "%8.0f blocks/s  %6.1f MB/s  written %.2f× used %.2f×",
		float64(live)/elapsed.Seconds(), float64(live*size)/1e6/elapsed.Seconds(),
		float64(writtenBytes()-written)/float64(live*size), float64(diskUsage(directory))/float64(live*size))
	if err := store.close(); err != nil {
		return err
	}
	report("memory", "%d MB of Go heap obtained", heap()>>20)
	return nil
}

// read reads random blocks and returns how many it read in a second. The references are those of
// every stride-th block.
func read(store engine, references []eris.Reference, stride, size, readers int, duration time.Duration) (float64, error) {
	ctx, cancel := context.WithTimeout(context.Background(), duration)
	defer cancel()
	var count atomic.Int64
	var failure atomic.Pointer[error]
	var group sync.WaitGroup
	start := time.Now()
	for reader := range readers {
		group.Go(func() {
			buffer := make([]byte, 0, size)
			random := rand.New(rand.NewPCG(uint64(reader), 2))
			for ctx.Err() == nil {
				for range 64 {
					i := random.IntN(len(references))
					b, err := store.get(references[i], buffer)
					if err == nil && (len(b) != size || binary.BigEndian.Uint64(b) != uint64(i*stride)) {
						err = fmt.Errorf("block %d: wrong or absent", i)
					}
					if err != nil {
						failure.Store(&err)
						return
					}
				}
				count.Add(64)
			}
		})
	}
	group.Wait()
	if err := failure.Load(); err != nil {
		return 0, *err
	}
	return float64(count.Load()) / time.Since(start).Seconds(), nil
}

// nextBlocks makes blocks number from to from+n-1.
func nextBlocks(from, n, size int) []item {
	blocks := make([]item, n)
	for i := range blocks {
		b := content(from+i, size)
		blocks[i] = item{eris.Sum(b), b}
	}
	return blocks
}

// writtenBytes returns how many bytes this process has caused to be written to disk.
func writtenBytes() int64 {
	text, _ := os.ReadFile("/proc/self/io")
	for line := range strings.Lines(string(text)) {
		var n int64
		if _, err := fmt.Sscanf(line, "write_bytes: %d", &n); err == nil {
			return n
		}
	}
	return 0
}

// diskUsage returns the bytes of disk that the files of a directory take.
func diskUsage(directory string) int64 {
	var total int64
	filepath.WalkDir(directory, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if info, err := d.Info(); err == nil {
			if stat, ok := info.Sys().(*syscall.Stat_t); ok {
				total += stat.Blocks * 512
			}
		}
		return nil
	})
	return total
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapSys
}
