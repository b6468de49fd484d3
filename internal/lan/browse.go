// SPDX-License-Identifier: GPL-3.0-or-later

package lan

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/net/ipv4"
)

const (
	// MaxFound is how many servers Browse finds at most, and maxPerHost how many of one machine, so
	// that it cannot keep the others from being found.
	MaxFound, maxPerHost = 32, 2
	// multicastPort is the port of Multicast DNS.
	multicastPort = 5353
	// maxMessage bounds the length of a message (RFC 6762, section 17).
	maxMessage = 9000
)

// Browse asks the local network, once, which other machines have a service of a type, and calls
// found with the address of each, once. It listens until ctx ends, which should be soon: who is
// there answers within a tenth of a second (RFC 6762, sections 5.1 and 6). Answers from elsewhere
// do not count (section 11). The error is nil unless nobody could be asked.
func Browse(ctx context.Context, service string, found func(netip.AddrPort)) error {
	question, err := question(service)
	var socket *net.UDPConn
	if err == nil {
		socket, err = ask(question)
	}
	if err != nil {
		return fmt.Errorf("looking for %s on the local network: %w", service, err)
	}
	defer socket.Close()
	defer context.AfterFunc(ctx, func() { socket.SetReadDeadline(time.Unix(1, 0)) })()
	near := networks()
	b := make([]byte, maxMessage)
	seen, hosts := map[netip.AddrPort]bool{}, map[netip.Addr]int{}
	for {
		n, from, err := socket.ReadFromUDPAddrPort(b)
		if err != nil {
			return nil
		}
		sender := from.Addr().Unmap()
		own := slices.ContainsFunc(near, func(p netip.Prefix) bool { return p.Addr() == sender })
		if own || !slices.ContainsFunc(near, func(p netip.Prefix) bool { return p.Contains(sender) }) {
			continue
		}
		for _, port := range ports(b[:n], service) {
			a := netip.AddrPortFrom(sender, port)
			if !seen[a] && len(seen) < MaxFound && hosts[sender] < maxPerHost {
				seen[a] = true
				hosts[sender]++
				found(a)
			}
		}
	}
}

// networks returns those that this machine is on.
func networks() (near []netip.Prefix) {
	for _, i := range interfaces() {
		addresses, _ := i.Addrs()
		for _, a := range addresses {
			if p, err := netip.ParsePrefix(a.String()); err == nil {
				near = append(near, p)
			}
		}
	}
	return near
}

func question(service string) ([]byte, error) {
	name, err := dnsmessage.NewName(service + ".local.")
	if err != nil {
		return nil, err
	}
	m := dnsmessage.Message{Questions: []dnsmessage.Question{{Name: name, Type: dnsmessage.TypePTR, Class: dnsmessage.ClassINET}}}
	return m.Pack()
}

var errNobody = errors.New("no network interface can do that")

// ask sends a question to everybody, and returns where answers come. From another port than that of
// Multicast DNS, an answer comes to nobody else.
func ask(question []byte) (*net.UDPConn, error) {
	socket, err := net.ListenUDP("udp4", &net.UDPAddr{})
	if err != nil {
		return nil, err
	}
	if _, err := (everybody{socket}).Write(question); err != nil {
		socket.Close()
		return nil, err
	}
	return socket, nil
}

// everybody is a connection to the local network: what is written goes to all interfaces, by IPv4.
type everybody struct{ *net.UDPConn }

func (e everybody) Write(question []byte) (int, error) {
	err := errNobody
	to := &net.UDPAddr{IP: net.IPv4(224, 0, 0, 251), Port: multicastPort}
	for _, i := range interfaces() {
		if _, failed := ipv4.NewPacketConn(e.UDPConn).WriteTo(question, &ipv4.ControlMessage{IfIndex: i.Index}, to); failed == nil {
			err = nil
		}
	}
	return len(question), err
}

// SetDeadline has a lost question be asked again soon: who is there answers at once.
func (e everybody) SetDeadline(t time.Time) error {
	if soon := time.Now().Add(time.Second); t.After(soon) {
		t = soon
	}
	return e.UDPConn.SetDeadline(t)
}

// Resolver looks names of machines up that end in ".local", by asking the local network (RFC 6762,
// section 3): the resolver of Go knows the servers of DNS only, not what the system adds to them.
func Resolver() *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		socket, err := net.ListenUDP("udp4", &net.UDPAddr{})
		return everybody{socket}, err
	}}
}

// ports returns the ports of the services of a type that a message is about. Their address is that
// of whoever has sent it. What is no message has none.
func ports(message []byte, service string) (ports []uint16) {
	var p dnsmessage.Parser
	header, err := p.Start(message)
	if err != nil || !header.Response || p.SkipAllQuestions() != nil {
		return nil
	}
	// Where a service is stands beside the answer mostly (RFC 6763, section 12.1).
	answers, _ := p.AllAnswers()
	p.SkipAllAuthorities()
	more, _ := p.AllAdditionals()
	for _, r := range append(answers, more...) {
		srv, ok := r.Body.(*dnsmessage.SRVResource)
		name := strings.ToLower(r.Header.Name.String())
		if ok && srv.Port != 0 && strings.HasSuffix(name, "."+service+".local.") && len(ports) < MaxFound {
			ports = append(ports, srv.Port)
		}
	}
	return ports
}
