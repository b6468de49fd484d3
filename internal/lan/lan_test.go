// SPDX-License-Identifier: GPL-3.0-or-later

package lan

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/net/ipv4"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

// TestMain is, in a network namespace, one of the machines of TestBrowse.
func TestMain(m *testing.M) {
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Second)
	defer cancel()
	switch os.Getenv("LAN_TEST") {
	case "advertise":
		if err := Advertise(ctx, Blocks, 5683); err != nil {
			println(err.Error())
			os.Exit(1)
		}
	case "browse":
		// As often as it takes: how soon the others are there depends on the machine.
		var found []string
		for wait := 300 * time.Millisecond; len(found) < 2 && ctx.Err() == nil; wait *= 2 {
			found = nil
			once, end := context.WithTimeout(ctx, wait)
			if err := Browse(once, Blocks, func(a netip.AddrPort) { found = append(found, a.String()) }); err != nil {
				println(err.Error())
			}
			end()
		}
		slices.Sort(found)
		os.Stdout.WriteString(strings.Join(found, " "))
	case "name":
		if err := lookUp(ctx); err != nil {
			println(err.Error())
			os.Exit(1)
		}
	case "named":
		println(beNamed().Error())
	case "end":
		if err := endUnderQuestions(ctx); err != nil {
			println(err.Error())
			os.Exit(1)
		}
	case "unicast":
		if err := askAlone(ctx, netip.MustParseAddr("192.0.2.1")); err != nil {
			println(err.Error())
			os.Exit(1)
		}
	default:
		os.Exit(m.Run())
	}
}

// lookUp looks up, as often as it takes, the name of a machine that answers as mDNS responders do.
func lookUp(ctx context.Context) error {
	for {
		found, err := Resolver().LookupNetIP(ctx, "ip4", "other.local")
		if err == nil && found[0] == netip.MustParseAddr("192.0.2.1") {
			return nil
		} else if ctx.Err() != nil {
			return fmt.Errorf("found %v: %w", found, err)
		}
	}
}

// beNamed answers questions about the address of other.local.
func beNamed() error {
	socket, err := net.ListenMulticastUDP("udp4", &interfaces()[0], &net.UDPAddr{IP: net.IPv4(224, 0, 0, 251), Port: multicastPort})
	b := make([]byte, maxMessage)
	for err == nil {
		var n int
		var from netip.AddrPort
		n, from, err = socket.ReadFromUDPAddrPort(b)
		var m dnsmessage.Message
		if err != nil || m.Unpack(b[:n]) != nil || m.Response || m.Questions[0].Type != dnsmessage.TypeA {
			continue
		}
		m.Response, m.Additionals = true, nil
		m.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: m.Questions[0].Name, Class: dnsmessage.ClassINET, TTL: 10},
			Body:   &dnsmessage.AResource{A: [4]byte{192, 0, 2, 1}},
		}}
		if answer, failed := m.Pack(); failed == nil && m.Questions[0].Name.String() == "other.local." {
			socket.WriteToUDPAddrPort(answer, from)
		}
	}
	return err
}

// askAlone asks one machine, and then all of them, as often as it takes until that one answers. It
// is an error if it has answered the question that was not for all.
func askAlone(ctx context.Context, machine netip.Addr) error {
	question, err := question(Blocks)
	if err != nil {
		return err
	}
	alone, err := net.ListenUDP("udp4", nil)
	if err != nil {
		return err
	}
	defer alone.Close()
	b := make([]byte, maxMessage)
	for answered := false; !answered && ctx.Err() == nil; {
		if _, err := alone.WriteToUDPAddrPort(question, netip.AddrPortFrom(machine, multicastPort)); err != nil {
			return err
		}
		socket, err := ask(question)
		if err != nil {
			return err
		}
		socket.SetReadDeadline(time.Now().Add(time.Second))
		p := ipv4.NewPacketConn(socket)
		err = p.SetControlMessage(ipv4.FlagTTL, true)
		for !answered && err == nil {
			var control *ipv4.ControlMessage
			var from net.Addr
			_, control, from, err = p.ReadFrom(b)
			answered = err == nil && from.(*net.UDPAddr).AddrPort().Addr().Unmap() == machine
			if answered && control.TTL != 1 {
				return fmt.Errorf("routers pass its answers on: TTL %d", control.TTL)
			}
		}
		socket.Close()
	}
	// The answer to what came first would be here by now.
	alone.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if _, _, err := alone.ReadFromUDPAddrPort(b); err == nil {
		return errors.New("it answers a question that need not have come from its network")
	}
	return ctx.Err()
}

// endUnderQuestions advertises a service while messages with hundreds of questions come. It is an
// error if that does not end soon.
func endUnderQuestions(ctx context.Context) error {
	advertised, end := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- Advertise(advertised, Blocks, 5683) }()
	m := dnsmessage.Message{Questions: slices.Repeat([]dnsmessage.Question{{
		Name: dnsmessage.MustNewName(Blocks + ".local."), Type: dnsmessage.TypePTR, Class: dnsmessage.ClassINET,
	}}, 500)}
	questions, err := m.Pack()
	for range 30 { // for as long as it takes to begin
		if err == nil {
			var socket *net.UDPConn
			socket, err = ask(questions)
			socket.Close()
		}
		time.Sleep(100 * time.Millisecond)
	}
	end()
	select {
	case e := <-done:
		return errors.Join(err, e)
	case <-time.After(15 * goodbye): // to answer all of them would take many minutes
		return errors.New("it does not end")
	}
}

// lan makes a bridge with four machines, in namespaces of its own. The first is on another network,
// from which packets come nevertheless.
const lan = `
set -e
ip link set lo up
ip link add bridge type bridge
ip link set bridge up
for i in 0 1 2 3; do
	unshare --net sleep 300 &
	eval pid$i=$!
	for try in $(seq 10000); do
		[ "$(readlink /proc/$!/ns/net)" != "$(readlink /proc/self/ns/net)" ] && break
		sleep 0.01
	done
	ip link add port$i type veth peer name lan0 netns $!
	ip link set port$i master bridge up
	nsenter -t $! -n sh -c "ip link set lo up; ip address add 192.0.2.$i/24 dev lan0; ip link set lan0 up"
done
nsenter -t $pid0 -n sh -c "ip address flush dev lan0; ip address add 198.51.100.1/24 dev lan0; ip route add 192.0.2.0/24 dev lan0"
nsenter -t $pid3 -n sh -c "echo 0 | tee /proc/sys/net/ipv4/conf/all/rp_filter >/proc/sys/net/ipv4/conf/lan0/rp_filter"
trap 'kill $pid0 $pid1 $pid2 $pid3 $others || true' EXIT
LAN_TEST=advertise nsenter -t $pid0 -n "$0" &
others=$!
LAN_TEST=advertise nsenter -t $pid1 -n "$0" &
others="$others $!"
LAN_TEST=advertise nsenter -t $pid2 -n "$0" &
others="$others $!"
LAN_TEST=browse nsenter -t $pid3 -n "$0"
LAN_TEST=named nsenter -t $pid1 -n "$0" &
others="$others $!"
LAN_TEST=name nsenter -t $pid3 -n "$0"
LAN_TEST=unicast nsenter -t $pid3 -n "$0"
LAN_TEST=end nsenter -t $pid3 -n "$0"
`

// TestBrowse has one machine of a network find two others, and not one of another network. Those
// who are found answer nobody but the local link, and end soon whatever they are asked. The address
// of a name is found as well.
func TestBrowse(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can make network namespaces")
	}
	for _, program := range []string{"ip", "unshare", "nsenter"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(err)
		}
	}
	var said strings.Builder
	command := exec.Command("unshare", "--net", "sh", "-c", lan, os.Args[0])
	command.Stderr = &said
	out, err := command.Output()
	if strings.Contains(said.String(), "not permitted") || strings.Contains(said.String(), "not supported") {
		t.Skip(said.String())
	}
	if err != nil || string(out) != "192.0.2.1:5683 192.0.2.2:5683" {
		t.Errorf("found %q, %v: %s", out, err, said.String())
	}
}

func response(t testing.TB, name string, port uint16) []byte {
	owner, target := dnsmessage.MustNewName(name), dnsmessage.MustNewName("a.local.")
	m := dnsmessage.Message{
		Header: dnsmessage.Header{Response: true},
		Additionals: []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: owner, Class: dnsmessage.ClassINET, TTL: 120},
			Body:   &dnsmessage.SRVResource{Port: port, Target: target},
		}},
	}
	b, err := m.Pack()
	testhelp.Must(t, err)
	return b
}

func TestPorts(t *testing.T) {
	for _, test := range []struct {
		message []byte
		want    []uint16
	}{
		{response(t, "eris-a._eris._tcp.local.", 5683), []uint16{5683}},
		{response(t, "eris-a._ERIS._tcp.local.", 5683), []uint16{5683}},
		{response(t, "printer._ipp._tcp.local.", 631), nil},
		{response(t, "eris-a._eris._tcp.local.", 0), nil},
		{nil, nil},
	} {
		if got := ports(test.message, Blocks); !slices.Equal(got, test.want) {
			t.Errorf("%q: %v, want %v", test.message, got, test.want)
		}
	}
	question, err := question(Blocks)
	if err != nil || ports(question, Blocks) != nil {
		t.Errorf("a question has ports, or %v", err)
	}
}

func FuzzPorts(f *testing.F) {
	f.Add(response(f, "eris-a._eris._tcp.local.", 5683))
	f.Fuzz(func(t *testing.T, message []byte) {
		if got := ports(message, Blocks); len(got) > MaxFound || slices.Contains(got, 0) {
			t.Errorf("%v", got)
		}
	})
}
