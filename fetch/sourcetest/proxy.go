// SPDX-License-Identifier: GPL-3.0-or-later

package sourcetest

import (
	"context"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// Proxy passes connections to a TCP address on until the end of the test, and returns the address
// where they are to be made. What passes takes half of the round trip in each direction. After
// cutAfter bytes from the target, if that is above 0, a connection is cut.
func Proxy(tb testing.TB, target string, roundTrip time.Duration, cutAfter int64) (address string) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	group.Go(func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", target)
			if err != nil {
				near.Close()
				continue
			}
			cut := func() {
				near.Close()
				far.Close()
			}
			context.AfterFunc(ctx, cut)
			group.Go(func() { carry(far, near, roundTrip/2) })
			group.Go(func() {
				defer cut()
				var down io.Reader = far
				if cutAfter > 0 {
					down = io.LimitReader(far, cutAfter)
				}
				carry(near, down, roundTrip/2)
			})
		}
	})
	tb.Cleanup(func() {
		listener.Close()
		cancel()
		group.Wait()
	})
	return listener.Addr().String()
}

// portion is a run of bytes, and when it comes out at the other end.
type portion struct {
	bytes []byte
	due   time.Time
}

// carry writes what it reads, some time later, and tells the end.
func carry(dst net.Conn, src io.Reader, delay time.Duration) {
	portions := make(chan portion, 1<<12)
	var writing sync.WaitGroup
	writing.Go(func() {
		for p := range portions {
			time.Sleep(time.Until(p.due))
			dst.Write(p.bytes) // once it fails it fails again, until the other side has ended, too
		}
		dst.(*net.TCPConn).CloseWrite()
	})
	for {
		b := make([]byte, 64<<10)
		n, err := src.Read(b)
		if n > 0 {
			portions <- portion{b[:n], time.Now().Add(delay)}
		}
		if err != nil {
			break
		}
	}
	close(portions)
	writing.Wait()
}
