// SPDX-License-Identifier: GPL-3.0-or-later

package systemd

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var must = testhelp.Must

// TestMain plays a service if it is told to: it prints what sockets it has, and answers one client
// on each.
func TestMain(m *testing.M) {
	if os.Getenv("TEST_SERVICE") == "" {
		os.Exit(m.Run())
	}
	if os.Getenv("LISTEN_PID") == "self" {
		os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
	}
	sockets, err := Sockets()
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(0)
	}
	for _, s := range sockets {
		if s.Packets != nil {
			fmt.Println("packets", s.Name)
			b := make([]byte, 10)
			n, addr, _ := s.Packets.ReadFrom(b)
			s.Packets.WriteTo(b[:n], addr)
		} else {
			fmt.Println("stream", s.Name)
			conn, _ := s.Listener.Accept()
			io.Copy(conn, conn)
			conn.Close()
		}
	}
	for _, variable := range os.Environ() {
		if strings.HasPrefix(variable, "LISTEN_") {
			fmt.Println("left:", variable)
		}
	}
	more, err := Sockets()
	fmt.Println("end", len(more), err, Notify("READY=1"))
}

func service(t *testing.T, files []*os.File, env ...string) *exec.Cmd {
	program, err := os.Executable()
	must(t, err)
	cmd := exec.Command(program)
	cmd.Env = append(append(os.Environ(), "TEST_SERVICE=1"), env...)
	cmd.ExtraFiles = files
	return cmd
}

func TestSockets(t *testing.T) {
	directory := t.TempDir()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer tcp.Close()
	unix, err := net.Listen("unix", filepath.Join(directory, "s"))
	must(t, err)
	defer unix.Close()
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	must(t, err)
	defer udp.Close()
	var files []*os.File
	for _, c := range []interface{ File() (*os.File, error) }{tcp.(*net.TCPListener), unix.(*net.UnixListener), udp.(*net.UDPConn)} {
		f, err := c.File()
		must(t, err)
		defer f.Close()
		files = append(files, f)
	}
	states, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(directory, "n"), Net: "unixgram"})
	must(t, err)
	defer states.Close()
	cmd := service(t, files, "LISTEN_PID=self", "LISTEN_FDS=3", "LISTEN_FDNAMES=one:two?get:", "NOTIFY_SOCKET="+filepath.Join(directory, "n"))
	var out strings.Builder
	cmd.Stdout = &out
	must(t, cmd.Start())
	for _, addr := range []net.Addr{tcp.Addr(), unix.Addr(), udp.LocalAddr()} {
		conn, err := net.Dial(addr.Network(), addr.String())
		must(t, err)
		io.WriteString(conn, "hello")
		if c, ok := conn.(interface{ CloseWrite() error }); ok {
			c.CloseWrite()
		}
		b := make([]byte, 10)
		if n, err := conn.Read(b); string(b[:n]) != "hello" {
			t.Errorf("%s answers %q, %v", addr.Network(), b[:n], err)
		}
		conn.Close()
	}
	must(t, cmd.Wait())
	if want := "stream one\nstream two?get\npackets \nend 0 <nil> <nil>\n"; out.String() != want {
		t.Errorf("%q, want %q", out.String(), want)
	}
	b := make([]byte, 100)
	if n, err := states.Read(b); string(b[:n]) != "READY=1" {
		t.Errorf("state %q, %v", b[:n], err)
	}
}

func TestNoSockets(t *testing.T) {
	for _, v := range []struct {
		env  []string
		want string
	}{
		{nil, "end 0 <nil> <nil>\n"},
		{[]string{"LISTEN_PID=1", "LISTEN_FDS=1"}, "end 0 <nil> <nil>\n"},
		{[]string{"LISTEN_PID=self", "LISTEN_FDS=0"}, "end 0 <nil> <nil>\n"},
		{[]string{"LISTEN_PID=self", "LISTEN_FDS=-1"}, "error: LISTEN_FDS is \"-1\", and must be a number of at most 64\n"},
		{[]string{"LISTEN_PID=self", "LISTEN_FDS=65"}, "error: LISTEN_FDS is \"65\", and must be a number of at most 64\n"},
		{[]string{"LISTEN_PID=self", "LISTEN_FDS=2", "LISTEN_FDNAMES=a"}, "error: socket 0 of the service manager: not a socket: "},
	} {
		null, err := os.Open(os.DevNull)
		must(t, err)
		out, err := service(t, []*os.File{null}, v.env...).Output()
		null.Close()
		if err != nil {
			t.Errorf("%v: %v", v.env, err)
		}
		if !strings.HasPrefix(string(out), v.want) {
			t.Errorf("%v: %q, want %q", v.env, out, v.want)
		}
	}
}

func TestNotify(t *testing.T) {
	for _, v := range []struct {
		address string
		ok      bool
	}{
		{"", true},
		{"vsock:1:2", false},
		{filepath.Join(t.TempDir(), "absent"), false},
	} {
		t.Setenv("NOTIFY_SOCKET", v.address)
		if err := Notify("READY=1"); (err == nil) != v.ok {
			t.Errorf("%q: %v", v.address, err)
		}
	}
}
