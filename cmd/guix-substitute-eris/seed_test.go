// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A store of this machine that takes nothing of what is to be seeded holds up no request, also when
// stores of the local network come and go.
func TestSeedsHoldUpNothing(t *testing.T) {
	directory := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(directory, "s"))
	must(t, err)
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			go io.Copy(io.Discard, c)
		}
	}()
	a := newAheadTest(t, 0, fmt.Sprintf("policy = \"http-first\"\nseed-nars = true\nahead-items = 0\neris-stores = [\"coap+unix://%s/s\"]\n", directory))
	for i := range a.env {
		a.env[i] = strings.Replace(a.env[i], "discover=false", "discover=true", 1)
	}
	kept := filepath.Join(filepath.Dir(a.store), "state/cache/guix/substitute-eris")
	neighbours := filepath.Join(kept, "neighbours")
	err = errors.Join(os.MkdirAll(kept+"/seeds", 0o700), os.WriteFile(kept+"/seeds/nar-1", make([]byte, 10000), 0o600), os.WriteFile(neighbours, nil, 0o600))
	must(t, err)
	a.query()
	d := a.start("substitute")
	order := a.order()
	a.substitute(d, order[0], order[0].path)
	must(t, os.WriteFile(neighbours, []byte("coap+tcp://127.0.0.1:9\n"), 0o600))
	begin := time.Now()
	a.substitute(d, order[1], order[1].path)
	if took := time.Since(begin); took > 8*time.Second {
		t.Errorf("it took %v", took)
	}
	must(t, syscall.Kill(-d.cmd.Process.Pid, syscall.SIGKILL))
	d.close() // which says that it was killed
}
