// SPDX-License-Identifier: GPL-3.0-or-later

// Package wire joins two network namespaces of this machine by a wire on which packets take time,
// wait in a queue and get lost, for tests and benchmarks in which the kernel's own TCP is at both
// ends. It does what the queueing discipline netem does, with two TUN devices and a goroutine for
// each direction, so that it works with kernels that were built without netem. It needs Linux and
// root. Start with [New].
//
// Package link is another simulation: it needs no privileges, and carries streams instead of
// packets, so that there is nothing in it of windows, buffers and retransmissions of TCP.
package wire

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Options say what a wire is like, in each direction.
type Options struct {
	// RoundTrip is the time that a packet and the answer to it are on the way, without the time in
	// queues.
	RoundTrip time.Duration
	// Rate is how many bytes per second pass, heads of packets included; 0 stands for no bound.
	Rate int64
	// Queue is how many bytes wait at most for their turn; what comes when it is full is lost.
	// Default: what passes in one round trip, at least 256 KiB.
	Queue int64
	// Loss is the share of packets that are lost, from 0 to 1.
	Loss float64
}

const (
	// packetSize is the greatest length of a packet in bytes, that of Ethernet.
	packetSize = 1500
	// maxUnderWay is how many packets are on the way at most in one direction; further ones are
	// lost.
	maxUnderWay = 1 << 17
	// Addresses that are meant for benchmarks (RFC 2544, section C.2.2).
	nearAddress, farAddress = "198.18.0.1", "198.18.0.2"
)

// A Wire joins two namespaces, which exist as long as it does. It is safe for concurrent use, and
// must be closed.
type Wire struct {
	near, far *namespace
	up, down  *direction
	stop      context.CancelFunc
	group     sync.WaitGroup
	closeOnce sync.Once
}

// New makes two namespaces and the wire between them. The error wraps [os.ErrPermission] or
// [os.ErrNotExist] where that is not possible, because we are not root or the kernel has no TUN
// devices.
func New(o Options) (*Wire, error) {
	if o.Queue <= 0 {
		o.Queue = max(256<<10, int64(float64(o.Rate)*o.RoundTrip.Seconds()))
	}
	near, err := newNamespace(nearAddress)
	if err != nil {
		return nil, err
	}
	far, err := newNamespace(farAddress)
	if err != nil {
		near.close()
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	w := &Wire{near: near, far: far, stop: stop}
	w.up = newDirection(o, near.device, far.device, 1)
	w.down = newDirection(o, far.device, near.device, 2)
	for _, d := range []*direction{w.up, w.down} {
		w.group.Go(d.take)
		w.group.Go(func() { d.deliver(ctx) })
	}
	return w, nil
}

// Close takes the wire and its namespaces away. Connections that are still open get no further
// packets.
func (w *Wire) Close() {
	w.closeOnce.Do(func() {
		w.stop()
		w.near.close()
		w.far.close()
		w.group.Wait()
	})
}

// Listen returns a listener at the far end, on a port that the system chooses.
func (w *Wire) Listen() (net.Listener, error) {
	var l net.Listener
	err := w.far.do(func() (err error) {
		l, err = net.Listen("tcp", net.JoinHostPort(farAddress, "0"))
		return err
	})
	return l, err
}

// Near calls f in a thread at the near end: sockets that f makes itself, not in another goroutine,
// are sockets there.
func (w *Wire) Near(f func() error) error { return w.near.do(f) }

// Far calls f in a thread at the far end, as [Wire.Near] does at the near one.
func (w *Wire) Far(f func() error) error { return w.far.do(f) }

// Traffic is what has passed a wire in one direction.
type Traffic struct {
	// Packets and Bytes are what was delivered, heads included.
	Packets, Bytes int64
	// Lost is how many packets were lost on the way, or because the queue was full.
	Lost int64
}

// Traffic returns what has passed the wire to the far end and from it.
func (w *Wire) Traffic() (up, down Traffic) { return w.up.traffic(), w.down.traffic() }

// A namespace is a network namespace with the end of a wire in it.
type namespace struct {
	handle *os.File
	device *os.File
}

// newNamespace makes a namespace whose device has the given address; the other end is in the same
// network.
func newNamespace(address string) (*namespace, error) {
	n := &namespace{}
	err := inThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return os.NewSyscallError("unshare", err)
		}
		var err error
		if n.handle, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		if err := configure("lo", ""); err != nil {
			return err
		}
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: "/dev/net/tun", Err: err}
		}
		request, err := unix.NewIfreq("wire")
		if err == nil {
			request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
		}
		if err == nil {
			// A file that can be waited for has to be a device already.
			n.device = os.NewFile(uintptr(fd), "/dev/net/tun")
			err = configure("wire", address)
		}
		if err != nil {
			unix.Close(fd)
		}
		return err
	})
	if err != nil {
		if n.handle != nil {
			n.handle.Close()
		}
		return nil, fmt.Errorf("making a network namespace: %w", err)
	}
	return n, nil
}

// configure gives a device its address and starts it, in the namespace of this thread.
func configure(device, address string) error {
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(socket)
	request, err := unix.NewIfreq(device)
	if err != nil {
		return err
	}
	if address != "" {
		for _, v := range []struct {
			call  uint
			value net.IP
		}{{unix.SIOCSIFADDR, net.ParseIP(address)}, {unix.SIOCSIFNETMASK, net.IPv4(255, 255, 255, 0)}} {
			if err := request.SetInet4Addr(v.value.To4()); err != nil {
				return err
			}
			if err := unix.IoctlIfreq(socket, v.call, request); err != nil {
				return fmt.Errorf("address of %s: %w", device, err)
			}
		}
		// What waits in front of the device would be a queue of ours to no purpose, but what does
		// not fit would be lost.
		request.SetUint32(10000)
		if err := unix.IoctlIfreq(socket, unix.SIOCSIFTXQLEN, request); err != nil {
			return fmt.Errorf("queue of %s: %w", device, err)
		}
	}
	request.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(socket, unix.SIOCSIFFLAGS, request); err != nil {
		return fmt.Errorf("starting %s: %w", device, err)
	}
	return nil
}

// do calls f in a thread of the namespace.
func (n *namespace) do(f func() error) error {
	return inThread(func() error {
		if err := unix.Setns(int(n.handle.Fd()), unix.CLONE_NEWNET); err != nil {
			return os.NewSyscallError("setns", err)
		}
		return f()
	})
}

func (n *namespace) close() {
	n.device.Close()
	n.handle.Close()
}

// inThread calls f in a thread that is not used for anything else, before or after.
func inThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		done <- f()
	}()
	return <-done
}

// direction is one direction of a wire.
type direction struct {
	Options
	from, to *os.File
	random   *rand.Rand
	packets  chan *packet
	pool     sync.Pool

	delivered, bytes, lost atomic.Int64
}

type packet struct {
	at     time.Time // when it arrives
	length int
	bytes  [packetSize]byte
}

func newDirection(o Options, from, to *os.File, seed uint64) *direction {
	d := &direction{Options: o, from: from, to: to, random: rand.New(rand.NewPCG(seed, seed)), packets: make(chan *packet, maxUnderWay)}
	d.pool.New = func() any { return new(packet) }
	return d
}

func (d *direction) traffic() Traffic {
	return Traffic{Packets: d.delivered.Load(), Bytes: d.bytes.Load(), Lost: d.lost.Load()}
}

// take takes what comes in at one end and says when it comes out at the other.
func (d *direction) take() {
	defer close(d.packets)
	var free time.Time // when the last packet in the queue will have been sent
	for {
		p := d.pool.Get().(*packet)
		n, err := d.from.Read(p.bytes[:])
		if err != nil {
			return // closed
		}
		now := time.Now()
		if free.Before(now) {
			free = now
		}
		if d.Rate > 0 {
			waiting := int64(free.Sub(now).Seconds() * float64(d.Rate))
			if waiting+int64(n) > d.Queue {
				d.lost.Add(1)
				d.pool.Put(p)
				continue
			}
			free = free.Add(time.Duration(float64(n) / float64(d.Rate) * float64(time.Second)))
		}
		if d.Loss > 0 && d.random.Float64() < d.Loss {
			d.lost.Add(1)
			d.pool.Put(p)
			continue
		}
		p.length, p.at = n, free.Add(d.RoundTrip/2)
		select {
		case d.packets <- p:
		default:
			d.lost.Add(1)
			d.pool.Put(p)
		}
	}
}

// deliver lets packets out when it is their time.
func (d *direction) deliver(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for p := range d.packets {
		if wait := time.Until(p.at); wait > 0 {
			timer.Reset(wait)
			select {
			case <-timer.C:
			case <-ctx.Done():
				return
			}
		}
		if _, err := d.to.Write(p.bytes[:p.length]); err == nil {
			d.delivered.Add(1)
			d.bytes.Add(int64(p.length))
		} else if errors.Is(err, os.ErrClosed) {
			return
		} else {
			d.lost.Add(1)
		}
		d.pool.Put(p)
	}
}

// SetTCPMemory sets how much memory a connection may have for what it receives and for what it
// sends, in bytes, in the namespace of the thread, as an administrator does with sysctl (Linux,
// Documentation/networking/ip-sysctl.rst: tcp_rmem and tcp_wmem). It is to be called by the
// function given to [Wire.Near] or [Wire.Far].
func SetTCPMemory(receive, send int) error {
	for name, most := range map[string]int{"tcp_rmem": receive, "tcp_wmem": send} {
		file := "/proc/sys/net/ipv4/" + name
		old, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		fields := strings.Fields(string(old))
		if len(fields) != 3 {
			return fmt.Errorf("%s: %q is not three numbers", file, old)
		}
		if err := os.WriteFile(file, fmt.Appendf(nil, "%s %s %d", fields[0], fields[1], most), 0); err != nil {
			return err
		}
	}
	return nil
}
