// SPDX-License-Identifier: GPL-3.0-or-later

// Package lan makes servers be found on the local network, and finds those of others, by DNS-Based
// Service Discovery over Multicast DNS (RFC 6763, RFC 6762). Nothing that is found is trusted:
// whatever comes from there must have the hash that an authorised narinfo has.
package lan

import (
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/brutella/dnssd"
	"github.com/brutella/dnssd/log"
	"golang.org/x/sys/unix"
)

// The types of services.
const (
	// Publish is a server of substitutes over HTTP (Guix, guix/scripts/publish.scm: run-publish).
	Publish = "_guix_publish._tcp"
	// Blocks is a server of ERIS blocks over CoAP and TCP, at .well-known/eris.
	Blocks = "_eris._tcp"
)

// Advertise makes a service be found that listens on a TCP port of all addresses of this machine.
// It does so until ctx ends, and a little longer, or returns an error that says why it cannot. The
// name of the service has that of the machine in it, as that of "guix publish" has.
func Advertise(ctx context.Context, service string, port uint16) error {
	host, err := os.Hostname()
	if err == nil {
		host, _, _ = strings.Cut(host, ".")
		kind := strings.ReplaceAll(strings.Trim(strings.TrimSuffix(service, "._tcp"), "_"), "_", "-")
		err = respond(ctx, dnssd.Config{Name: kind + "-" + host, Type: service, Host: host, Port: int(port)})
	}
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("advertising %s on the local network: %w", service, err)
	}
	return nil
}

func respond(ctx context.Context, c dnssd.Config) error {
	service, err := dnssd.NewService(c)
	if err != nil {
		return err
	}
	log.Info.Disable() // it would write to standard error
	responder, err := dnssd.NewResponder()
	if err != nil {
		return err
	}
	if err := onLink(); err != nil {
		return err
	}
	if _, err := responder.Add(service); err != nil {
		return err
	}
	responds := make(chan error, 1)
	go func() { responds <- responder.Respond(ctx) }()
	select {
	case err = <-responds:
	case <-ctx.Done():
		select {
		case <-responds:
		case <-time.After(goodbye):
		}
	}
	return err
}

// goodbye is how long it may take to say that a service ends. The library answers one question
// after the other, and pauses before each: a message of a neighbour can have thousands.
const goodbye = 2 * time.Second

// interfaces returns those on which there may be others.
func interfaces() []net.Interface {
	all, _ := net.Interfaces()
	return slices.DeleteFunc(all, func(i net.Interface) bool {
		return i.Flags&(net.FlagUp|net.FlagMulticast|net.FlagLoopback) != net.FlagUp|net.FlagMulticast
	})
}

// Instructions of a filter (Linux, Documentation/networking/filter.rst), and where it finds the
// header of the network.
const (
	load    = unix.BPF_LD | unix.BPF_ABS
	jump    = unix.BPF_JMP | unix.BPF_K
	network = 0xfff00000 // SKF_NET_OFF
)

// toGroups passes the datagrams that were sent to 224.0.0.251 or to a group of IPv6.
var toGroups = []unix.SockFilter{
	{Code: load | unix.BPF_B, K: network}, // the version is in the upper half
	{Code: jump | unix.BPF_JGE, K: 0x60, Jt: 2},
	{Code: load | unix.BPF_W, K: network + 16},
	{Code: jump | unix.BPF_JEQ, K: 0xe00000fb, Jt: 2, Jf: 3},
	{Code: load | unix.BPF_B, K: network + 24},
	{Code: jump | unix.BPF_JEQ, K: 0xff, Jf: 1},
	{Code: unix.BPF_RET, K: 1<<32 - 1},
	{Code: unix.BPF_RET},
}

// onLink has the sockets of Multicast DNS that are open take nothing but what was sent to its
// groups, which no router passes on. The library would answer whoever sends a question to this
// machine, with a longer message, at any address that it pretends to have; but only the local link
// is to be answered (RFC 6762, sections 5.5 and 11). An answer to an address that a sender on the
// link pretends to have ends at the first router.
func onLink() error {
	entries, err := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		fd, _ := strconv.Atoi(e.Name())
		if kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err != nil || kind != unix.SOCK_DGRAM || localPort(fd) != multicastPort {
			continue
		}
		program := unix.SockFprog{Len: uint16(len(toGroups)), Filter: &toGroups[0]}
		if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &program); err != nil {
			return fmt.Errorf("cannot leave out what comes from other networks: %w", err)
		}
		err4 := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_TTL, 1)
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, 1); err != nil && err4 != nil {
			return fmt.Errorf("cannot keep answers on this network: %w", err)
		}
	}
	return err
}

// localPort returns the port that a socket is bound to; 0 if it has none.
func localPort(fd int) int {
	switch address, _ := unix.Getsockname(fd); a := address.(type) {
	case *unix.SockaddrInet4:
		return a.Port
	case *unix.SockaddrInet6:
		return a.Port
	}
	return 0
}
