// SPDX-License-Identifier: GPL-3.0-or-later

package coap_test

import (
	"bytes"
	"errors"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
)

// libcoapServer starts the example server of libcoap, with dynamic resources, and returns its port.
// Such a server has one content per path, whatever the query.
func libcoapServer(t *testing.T, args ...string) (port string) {
	var name string
	for _, candidate := range []string{"coap-server", "coap-server-notls", "coap-server-openssl", "coap-server-gnutls"} {
		if path, err := exec.LookPath(candidate); err == nil {
			name = path
			break
		}
	}
	if name == "" {
		t.Skip("coap-server is not installed")
	}
	// It needs the same port for TCP and UDP.
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	listener.Close()
	port = address[strings.LastIndexByte(address, ':')+1:]
	runServer(t, "tcp", address, name, append([]string{"-A", "127.0.0.1", "-p", port, "-d", "100"}, args...)...)
	return port
}

// runServer runs a program until the end of the test, and waits until it listens at an address.
func runServer(t *testing.T, network, address, program string, args ...string) {
	t.Helper()
	command := exec.Command(program, args...)
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		command.Process.Kill()
		command.Wait()
	})
	for range 1000 {
		if conn, err := net.Dial(network, address); err == nil {
			conn.Close()
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("%s does not listen", program)
}

// TestLibcoapServer puts blocks to the server of libcoap and gets them back, by TCP and UDP, with
// messages that it limits, and by a Unix socket through socat.
func TestLibcoapServer(t *testing.T) {
	port := libcoapServer(t)
	// This one takes no message of 32 KiB, and so forces BERT.
	limited := libcoapServer(t, "-X", "5000")
	urls := map[string]string{
		"tcp":          "coap+tcp://127.0.0.1:" + port + "/",
		"tcp, limited": "coap+tcp://127.0.0.1:" + limited + "/",
		"udp":          "coap://127.0.0.1:" + port + "/",
	}
	if socat, err := exec.LookPath("socat"); err == nil {
		socket := filepath.Join(t.TempDir(), "s")
		runServer(t, "unix", socket, socat, "UNIX-LISTEN:"+socket+",fork", "TCP:127.0.0.1:"+port)
		urls["unix"] = "coap+unix://" + escape(socket) + "/"
	} else {
		t.Log("without a Unix socket: socat is not installed")
	}
	for name, url := range urls {
		for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
			t.Run(name+"/"+size.String(), func(t *testing.T) {
				store := mustOpen(t, url+strings.ReplaceAll(name, ", ", "-")+size.String(), coap.Options{})
				defer store.Close()
				block := make([]byte, size)
				for i := range block {
					block[i] = byte(i>>4) ^ byte(i*7)
				}
				ref := eris.Sum(block)
				if err := store.Put(t.Context(), ref, block); err != nil {
					t.Fatalf("Put: %v", err)
				}
				var group sync.WaitGroup
				for range 20 {
					group.Go(func() {
						if got, err := get(t, store, ref, size); err != nil || !bytes.Equal(got, block) {
							t.Errorf("Get: %v", err)
						}
					})
				}
				group.Wait()
				// It has nothing that answers what it has, and says so, whatever else it does.
				done := make(chan struct{})
				r := &fetch.Request{
					Have: bytes.Repeat(ref[:fetch.HavePrefix], fetch.MaxHave), Size: 128, Dst: make([]byte, 0, 128),
					Done: func(*fetch.Request) { close(done) },
				}
				store.Start(r)
				if <-done; !errors.Is(r.Err, fetch.ErrCannotSay) {
					t.Errorf("answer is %x, %v", r.Block, r.Err)
				}
				if got, err := get(t, store, ref, size); err != nil || !bytes.Equal(got, block) {
					t.Errorf("Get after a question: %v", err)
				}
			})
		}
	}
}
