// SPDX-License-Identifier: GPL-3.0-or-later

// Package systemd takes sockets from a service manager that listens on behalf of its services, and
// tells it how the service fares (sd_listen_fds(3), sd_notify(3)). The Shepherd speaks the first
// protocol too.
package systemd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// firstDescriptor is the first descriptor of a socket (SD_LISTEN_FDS_START).
const firstDescriptor = 3

// maxSockets bounds the number of sockets.
const maxSockets = 64

// Socket is a socket that the service manager listens on. One of Listener and Packets is set.
type Socket struct {
	// Name is the name that the service manager gives it (FileDescriptorName= of
	// systemd.socket(5)); empty if there is none.
	Name     string
	Listener net.Listener
	Packets  net.PacketConn
}

// Sockets returns the sockets that the service manager has passed to this process; none if there is
// no service manager, or if the variables are meant for another process. It must be called once at
// most, before anything else opens files, and the program is to end if there is an error. The
// variables are removed from the environment, and the descriptors are not inherited by programs
// that are started.
func Sockets() ([]Socket, error) {
	pid, count, names := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"), os.Getenv("LISTEN_FDNAMES")
	for _, variable := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID"} {
		os.Unsetenv(variable)
	}
	if pid == "" || count == "" || pid != strconv.Itoa(os.Getpid()) {
		return nil, nil
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 0 || n > maxSockets {
		return nil, fmt.Errorf("LISTEN_FDS is %.20q, and must be a number of at most %d", count, maxSockets)
	}
	var sockets []Socket
	split := strings.Split(names, ":")
	for i := range n {
		s := Socket{}
		if len(split) == n && names != "" {
			s.Name = split[i]
		}
		if s.Listener, s.Packets, err = socket(firstDescriptor + i); err != nil {
			return nil, fmt.Errorf("socket %d of the service manager: %w", i, err)
		}
		sockets = append(sockets, s)
	}
	return sockets, nil
}

// socket takes a descriptor over.
func socket(fd int) (net.Listener, net.PacketConn, error) {
	f := os.NewFile(uintptr(fd), "socket")
	if f == nil {
		return nil, nil, errors.New("descriptor is not valid")
	}
	defer f.Close() // the net package duplicates it
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return nil, nil, fmt.Errorf("not a socket: %w", err)
	}
	if kind == unix.SOCK_STREAM {
		l, err := net.FileListener(f)
		return l, nil, err
	}
	p, err := net.FilePacketConn(f)
	return nil, p, err
}

// Notify tells the service manager about the state of the service: "READY=1", "STOPPING=1" and the
// like. It does nothing if none listens (NOTIFY_SOCKET is not set).
func Notify(state string) error {
	address := os.Getenv("NOTIFY_SOCKET")
	if address == "" {
		return nil
	}
	if address[0] != '/' && address[0] != '@' {
		return fmt.Errorf("NOTIFY_SOCKET is %.120q, which is not the address of a Unix socket", address)
	}
	conn, err := net.Dial("unixgram", address)
	if err != nil {
		return fmt.Errorf("notifying the service manager: %w", err)
	}
	_, err = conn.Write([]byte(state))
	return errors.Join(err, conn.Close())
}
