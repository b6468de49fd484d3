// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"sync/atomic"
	"testing"
)

// The test binary, run with this in its environment, is a writer to be killed: see TestKill.
const writerVariable = "ERIS_BLOCKSTORE_TEST_WRITER"

func TestMain(m *testing.M) {
	if arguments := os.Getenv(writerVariable); arguments != "" {
		panic(writeUntilKilled(arguments))
	}
	os.Exit(m.Run())
}

// writeUntilKilled puts blocks, and prints the number of each that was acknowledged. Its arguments
// are the number of the first block, the limit of the store, and its directory.
func writeUntilKilled(arguments string) error {
	var first, limit int64
	var directory string
	if _, err := fmt.Sscanf(arguments, "%d %d %q", &first, &limit, &directory); err != nil {
		return err
	}
	s, err := Open(directory, Options{MaxBytes: limit})
	if err != nil {
		return err
	}
	var next atomic.Int64
	next.Store(first)
	failures := make(chan error)
	for range 32 {
		go func() {
			for {
				i := int(next.Add(1) - 1)
				ref, block := testBlock(i, mixedSize(i))
				if err := s.Put(context.Background(), ref, block); err != nil {
					failures <- err
					return
				}
				fmt.Println(i) // one write, so lines stay whole
			}
		}()
	}
	return <-failures
}

// A process that puts blocks is killed again and again. Every block that it acknowledged is there
// afterwards, unless the store has a limit, and the store is consistent.
func TestKill(t *testing.T) {
	for name, limit := range map[string]int64{"without limit": 0, "with limit": 4 << 20} {
		t.Run(name, func(t *testing.T) {
			directory := t.TempDir()
			random := rand.New(rand.NewPCG(uint64(limit), 1))
			var acknowledged []int
			evicted := false
			for round := range 6 {
				first := 0
				if len(acknowledged) > 0 {
					first = acknowledged[len(acknowledged)-1] / 100000 * 100000
				}
				first += 100000 // numbers that no earlier writer used
				if round%3 == 2 {
					first -= 100000 // duplicates, of blocks acknowledged or not
				}
				writer := exec.Command(os.Args[0])
				writer.Env = append(os.Environ(), fmt.Sprintf("%s=%d %d %q", writerVariable, first, limit, directory))
				writer.Stderr = os.Stderr
				output, err := writer.StdoutPipe()
				must(t, err)
				must(t, writer.Start())
				n, count := random.IntN(600), 0
				for lines := bufio.NewScanner(output); lines.Scan(); {
					i, err := strconv.Atoi(lines.Text())
					must(t, err)
					acknowledged = append(acknowledged, i)
					if count++; count == n {
						must(t, writer.Process.Kill())
					}
				}
				if err := writer.Wait(); err == nil || writer.ProcessState.Exited() {
					t.Fatalf("the writer was not killed: %v", err)
				}
				s := testOpen(t, directory, Options{MaxBytes: limit})
				stats := s.Stats()
				if limit > 0 && stats.Bytes > limit {
					t.Errorf("%+v", stats)
				}
				for _, i := range acknowledged {
					if limit == 0 {
						mustHave(t, s, i, mixedSize(i))
					} else if !has(t, s, i, mixedSize(i)) {
						evicted = true
					}
				}
				if stats := s.Stats(); stats.Damaged != 0 {
					t.Errorf("%+v", stats)
				}
				checkStore(t, s)
			}
			if len(acknowledged) == 0 || evicted != (limit > 0) {
				t.Errorf("%d blocks were acknowledged; evicted: %v", len(acknowledged), evicted)
			}
		})
	}
}
