// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver_test

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
)

// program returns the path of the first of the programs that is installed, or skips the test.
func program(t *testing.T, names ...string) string {
	for _, name := range names {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	t.Skipf("%s is not installed", names[0])
	return ""
}

func coapClient(t *testing.T) string {
	return program(t, "coap-client", "coap-client-notls", "coap-client-openssl", "coap-client-gnutls")
}

// run runs a program and returns what it wrote to standard error.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	var out, errors bytes.Buffer
	command := exec.Command(name, args...)
	command.Stdout, command.Stderr = &out, &errors
	if err := command.Run(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, errors.String())
	}
	return errors.String() + out.String()
}

// TestLibcoapClient gets and puts blocks with the client of libcoap, by TCP and UDP, whole and in
// parts of forced sizes, with and without Size1, and by a Unix socket through socat.
func TestLibcoapClient(t *testing.T) {
	client := coapClient(t)
	store := newMemory()
	tcp := serve(t, "tcp", store)
	udp := serve(t, "udp", store)
	endpoints := map[string]string{"tcp": "coap+tcp://" + tcp, "udp": "coap://" + udp}
	if socat, err := exec.LookPath("socat"); err == nil {
		endpoints["unix"] = "coap+tcp://" + bridge(t, socat, serve(t, "unix", store))
	} else {
		t.Log("without a Unix socket: socat is not installed")
	}
	for network, url := range endpoints {
		for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
			for _, part := range []int{0, 1024, 256, 64, 16} {
				if part == 16 && size == eris.BlockSize32KiB && network == "udp" {
					part = 32 // 16 bytes take long
				}
				name := network + "/" + size.String() + "/" + strconv.Itoa(part)
				t.Run(name, func(t *testing.T) {
					var args []string
					if part != 0 {
						args = append(args, "-b", strconv.Itoa(part))
					}
					path := url + "/.well-known/eris/blocks"
					ref, want := store.Add(size)
					out := filepath.Join(t.TempDir(), "out")
					run(t, client, append(args, "-B", "20", "-m", "get", "-o", out, path+"?"+ref.String())...)
					if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, want) {
						t.Errorf("GET gave %d bytes, which are not the block; %v", len(got), err)
					}
					run(t, client, append(args, "-B", "20", "-m", "get", "-O", "60,0x"+strconv.FormatInt(int64(size), 16), "-o", out, path+"?"+ref.String())...)
					if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, want) {
						t.Errorf("GET with Size1 gave %d bytes, which are not the block; %v", len(got), err)
					}

					ref, block := sourcetest.NewBlock(size)
					in := filepath.Join(t.TempDir(), "in")
					if err := os.WriteFile(in, block, 0o600); err != nil {
						t.Fatal(err)
					}
					text := run(t, client, append(args, "-B", "20", "-m", "put", "-f", in, path)...)
					if !store.Has(ref) {
						t.Errorf("the block that was PUT is not there: %s", text)
					}
				})
			}
		}
	}
	for network, url := range endpoints {
		for _, v := range []struct {
			name string
			args []string
			want string
		}{
			{"missing", []string{"-m", "get", url + "/.well-known/eris/blocks?" + eris.Sum(nil).String()}, "4.04"},
			{"no reference", []string{"-m", "get", url + "/.well-known/eris/blocks"}, "4.00"},
			{"other path", []string{"-m", "get", url + "/.well-known/core"}, "4.04"},
			{"delete", []string{"-m", "delete", url + "/.well-known/eris/blocks"}, "4.05"},
			{"other size", []string{"-m", "put", "-e", "hello", url + "/.well-known/eris/blocks"}, "4.00"},
			{"unknown critical option", []string{"-O", "2049,x", "-m", "get", url + "/.well-known/eris/blocks"}, "4.02"},
		} {
			if text := run(t, client, append([]string{"-B", "20"}, v.args...)...); !strings.Contains(text, v.want) {
				t.Errorf("%s, %s: client says %q, want %s", network, v.name, text, v.want)
			}
		}
	}
}

// bridge lets TCP reach a Unix socket, and returns the address.
func bridge(t *testing.T, socat, socket string) string {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	port := address[strings.LastIndexByte(address, ':')+1:]
	listener.Close()
	command := exec.Command(socat, "TCP-LISTEN:"+port+",bind=127.0.0.1,fork,reuseaddr", "UNIX-CONNECT:"+socket)
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		command.Process.Kill()
		command.Wait()
	})
	for range 1000 {
		if conn, err := net.Dial("tcp", address); err == nil {
			conn.Close()
			return address
		}
		pause()
	}
	t.Fatal("socat does not listen")
	return ""
}
