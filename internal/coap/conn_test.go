// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"bytes"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// oneBlock is a handler that answers each GET by one block, and takes each PUT.
type oneBlock struct {
	conn  *Conn
	block []byte
	taken [][]byte
}

func (h *oneBlock) Request(r *Request) {
	h.conn.Lock()
	defer h.conn.Unlock()
	if r.Code == codes.GET {
		h.conn.Respond(r.Token, codes.Content, nil, h.block)
		return
	}
	h.taken = append(h.taken, bytes.Clone(r.Payload))
	h.conn.Respond(r.Token, codes.Created, nil, nil)
}

func (h *oneBlock) Dry()        {}
func (h *oneBlock) Written()    {}
func (h *oneBlock) Finish(bool) {}

// TestBothWays has two peers that request from each other over one connection, at the same time.
func TestBothWays(t *testing.T) {
	synctest.Test(t, testBothWays) // where the last words have time to arrive
}

func testBothWays(t *testing.T) {
	near, far := net.Pipe()
	var handlers [2]*oneBlock
	var runs sync.WaitGroup
	for i, conn := range []net.Conn{near, far} {
		h := &oneBlock{block: bytes.Repeat([]byte{byte(i + 1)}, int(eris.BlockSize32KiB))}
		h.conn = NewConn(conn, Config{Timeout: time.Minute, IdleTimeout: time.Minute, Window: 100, Pool: NewPool(), Paths: Paths{wellKnownBlocks}, Handler: h})
		handlers[i] = h
	}
	for _, h := range handlers {
		runs.Go(func() { _ = h.conn.Run() })
	}
	const count = 500
	store := NewRequests(WellKnownPath())
	var group sync.WaitGroup
	for i, h := range handlers {
		other := handlers[1-i]
		for n := range count {
			group.Add(1)
			x := &Exchange{Store: store, Size: eris.BlockSize32KiB, Dst: make([]byte, eris.BlockSize32KiB)}
			if n%10 == 0 {
				x.Payload = h.block
			}
			x.Done = func(x *Exchange) {
				defer group.Done()
				switch {
				case x.Err != nil:
					t.Error(x.Err)
				case x.Payload == nil && (x.Code != codes.Content || !bytes.Equal(x.Dst[:x.Length], other.block)):
					t.Errorf("answer %v with %d bytes", x.Code, x.Length)
				case x.Payload != nil && x.Code != codes.Created:
					t.Errorf("answer %v", x.Code)
				}
			}
			if !h.conn.Start(x) {
				t.Fatal("the connection takes no request")
			}
		}
	}
	group.Wait()
	end := errors.New("enough")
	handlers[0].conn.Release(0, end)
	runs.Wait()
	if _, err := handlers[0].conn.State(); err != end {
		t.Errorf("one side has ended by %v", err)
	}
	if _, err := handlers[1].conn.State(); err != ErrReleased {
		t.Errorf("the other side has ended by %v", err)
	}
	for i, h := range handlers {
		if len(h.taken) != count/10 || !bytes.Equal(h.taken[0], handlers[1-i].block) {
			t.Errorf("%d blocks were taken", len(h.taken))
		}
	}
}

// TestKeepAlive checks that a connection that one side keeps alive outlives the time of both for
// idle ones, and ends when the other side is gone without a word.
func TestKeepAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		gone := make(chan struct{})
		config := Config{Timeout: time.Minute, IdleTimeout: 2 * time.Minute, Window: 1, Pool: NewPool()}
		other := NewConn(vanishing{far, gone}, config)
		config.KeepAlive = 30 * time.Second
		c := NewConn(near, config)
		var runs sync.WaitGroup
		runs.Go(func() { _ = c.Run() })
		runs.Go(func() { _ = other.Run() })
		time.Sleep(time.Hour)
		for _, c := range []*Conn{c, other} {
			if _, err := c.State(); err != nil {
				t.Error(err)
			}
		}
		close(gone)
		time.Sleep(61 * time.Second)
		if _, err := c.State(); !errors.Is(err, ErrSilent) {
			t.Errorf("the connection ended by %v", err)
		}
		far.Close()
		runs.Wait()
	})
}

// vanishing is a connection whose side says nothing any more once it is gone.
type vanishing struct {
	net.Conn
	gone chan struct{}
}

func (v vanishing) Write(p []byte) (int, error) {
	select {
	case <-v.gone:
		return len(p), nil
	default:
		return v.Conn.Write(p)
	}
}

// TestReaderMemory checks that who gets short messages, one after the other, keeps little memory
// for them, and that long ones come whole.
func TestReaderMemory(t *testing.T) {
	short := encode(codes.GET, makeToken(1), nil, make([]byte, 100))
	long := encode(codes.Content, makeToken(1), nil, bytes.Repeat([]byte("long"), 10000))
	sent := slices.Concat(bytes.Repeat(short, 1000), long, short, long)
	r := newReader(iotest.OneByteReader(bytes.NewReader(sent)))
	var got []int
	for {
		head, body, ok, err := r.next()
		must(t, err)
		if ok {
			if got = append(got, len(body)); len(got) == 1000 && len(r.buffer) != firstBuffer {
				t.Errorf("short messages take %d bytes", len(r.buffer))
			}
			if head.Code == codes.Content && !bytes.HasSuffix(long, body) {
				t.Error("another message")
			}
		} else if err := r.fill(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if len(got) != 1003 || len(r.buffer) > readBuffer {
		t.Errorf("%d messages, in %d bytes", len(got), len(r.buffer))
	}
}

// slow is a handler that answers nothing until it may.
type slow struct {
	answers chan struct{}
	asked   chan struct{} // closed by the first request
}

func (h *slow) Request(*Request) { close(h.asked) }
func (h *slow) Dry()             {}
func (h *slow) Written()         {}
func (h *slow) Finish(bool)      { <-h.answers }

// unread is a connection whose other side takes everything.
type unread struct{ net.Conn }

func (unread) Write(p []byte) (int, error)      { return len(p), nil }
func (unread) SetWriteDeadline(time.Time) error { return nil }

// TestEndWithRequests checks that requests fail at once when the peer has ended the connection,
// although it is still being served, and that none are taken any more.
func TestEndWithRequests(t *testing.T) {
	near, far := net.Pipe()
	h := &slow{make(chan struct{}), make(chan struct{})}
	c := NewConn(unread{near}, Config{Timeout: time.Hour, IdleTimeout: time.Hour, Window: 1, Pool: NewPool(), Paths: Paths{wellKnownBlocks}, Handler: h})
	var runs sync.WaitGroup
	runs.Go(func() { _ = c.Run() })
	defer runs.Wait()
	defer close(h.answers)
	store, failed := NewRequests(WellKnownPath()), make(chan error, 2)
	for range cap(failed) { // one of which waits for its turn
		if !c.Start(&Exchange{Store: store, Size: eris.BlockSize1KiB, Done: func(x *Exchange) { failed <- x.Err }}) {
			t.Fatal("a request is not taken")
		}
	}
	if _, err := far.Write(slices.Concat(AppendHead(nil, codes.CSM, Token{}, 0), AppendHead(nil, codes.GET, Token{}, 0))); err != nil {
		t.Fatal(err)
	}
	<-h.asked
	far.Close()
	for range cap(failed) {
		select {
		case err := <-failed:
			if err != io.ErrUnexpectedEOF {
				t.Errorf("a request fails by %v", err)
			}
		case <-time.After(time.Minute):
			t.Fatal("a request goes on")
		}
	}
	if c.Start(&Exchange{Store: store}) {
		t.Error("a further request is taken")
	}
}

// TestReleaseWithoutStream checks that a connection that is still being made can be let go of.
func TestReleaseWithoutStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		end := errors.New("enough")
		c := NewConn(nil, Config{Timeout: time.Minute, IdleTimeout: time.Minute, Window: 1, Pool: NewPool(), Dial: func() (net.Conn, error) {
			time.Sleep(time.Minute)
			return nil, io.EOF
		}})
		time.AfterFunc(time.Second, func() { c.Release(time.Second, end) })
		if err := c.Run(); err != end {
			t.Errorf("it has ended by %v", err)
		}
	})
}

// TestAskedInVain checks that who serves nothing keeps a connection no longer for what it is asked.
func TestAskedInVain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		c := NewConn(near, Config{Timeout: time.Minute, IdleTimeout: time.Minute, Window: 1, Pool: NewPool()})
		var group sync.WaitGroup
		group.Go(func() { _ = c.Run() })
		group.Go(func() { _, _ = io.Copy(io.Discard, far) })
		began := time.Now()
		_, err := far.Write(AppendHead(nil, codes.CSM, Token{}, 0))
		for err == nil && time.Since(began) < time.Hour {
			time.Sleep(100 * time.Millisecond)
			_, err = far.Write(AppendHead(nil, codes.GET, Token{}, 0))
		}
		far.Close()
		group.Wait()
		if kept := time.Since(began); kept > 10*time.Minute || !c.Asks() {
			t.Errorf("it was kept for %v", kept)
		}
	})
}
