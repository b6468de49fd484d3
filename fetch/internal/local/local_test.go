// SPDX-License-Identifier: GPL-3.0-or-later

package local

import (
	"context"
	"errors"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

func TestParseURL(t *testing.T) {
	for text, want := range map[string]struct {
		url  URL
		show string
	}{
		"file:///media/usb":            {URL{"file", "/media/usb", true, true, nil}, "file:///media/usb"},
		"FILE:/media/usb":              {URL{"file", "/media/usb", true, true, nil}, "file:///media/usb"},
		"file://localhost/a%20b":       {URL{"file", "/a b", true, true, nil}, "file:///a%20b"},
		"file:blocks":                  {URL{"file", "blocks", true, true, nil}, "file:blocks"},
		"file:../a/b?get":              {URL{"file", "../a/b", true, false, nil}, "file:../a/b"},
		"file:///a?put&layout=flat":    {URL{"file", "/a", false, true, []string{"layout=flat"}}, "file:///a"},
		"file:///a?get&put":            {URL{"file", "/a", true, true, nil}, "file:///a"},
		"file:///100%25%3F%23%FFü?x&y": {URL{"file", "/100%?#\xffü", true, true, []string{"x", "y"}}, "file:///100%25%3F%23%FF%C3%BC"},
	} {
		got, err := ParseURL(text, "file")
		if err != nil || !reflect.DeepEqual(got, want.url) {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
		if got.String() != want.show {
			t.Errorf("%s: shown as %s, want %s", text, got, want.show)
		}
		if again, err := ParseURL(got.String(), "file"); err != nil || again.Path != got.Path {
			t.Errorf("%s: what is shown is read as %+v, %v", text, again, err)
		}
	}
	for _, text := range []string{
		"", "file", "file:", "file://", "file://localhost", "file://host/a", "file://media", "dump:a", "files:a", "/a", "file:a#b", "file:%",
		"file:%zz", "file:a%00", "file:a\n", "file:" + strings.Repeat("a", maxURLSize),
	} {
		if u, err := ParseURL(text, "file"); err == nil {
			t.Errorf("%.40q is taken: %+v", text, u)
		} else if strings.ContainsAny(err.Error(), "\n\x00") || len(err.Error()) > 300 {
			t.Errorf("%.40q: the error is not fit to be shown: %.400q", text, err)
		}
	}
}

var errTest = errors.New("test")

func TestCalls(t *testing.T) {
	var released atomic.Int32
	c := NewCalls(2, func() { released.Add(1) })
	order := ""
	finished, err := c.Do(t.Context(), func() error { order += "1"; return nil }, func() error { order += "2"; return errTest })
	if !finished || err != errTest || order != "12" {
		t.Errorf("%v, %v, %s", finished, err, order)
	}
	finished, err = c.Do(t.Context(), func() error { return errTest }, func() error { t.Error("end after an error"); return nil })
	if !finished || err != errTest {
		t.Errorf("%v, %v", finished, err)
	}

	// A call is given up while its operation hangs; so is one that waits for its turn.
	hang, started := make(chan struct{}), make(chan struct{})
	hanging := func() error { started <- struct{}{}; <-hang; return nil }
	ctx, cancel := context.WithCancelCause(t.Context())
	var group sync.WaitGroup
	for range 2 {
		group.Go(func() {
			if finished, err := c.Do(ctx, hanging, nil); finished || err != errTest {
				t.Errorf("%v, %v", finished, err)
			}
		})
		<-started
	}
	group.Go(func() {
		if finished, err := c.Do(ctx, func() error { t.Error("too many operations"); return nil }, nil); !finished || err != errTest {
			t.Errorf("%v, %v", finished, err)
		}
	})
	cancel(errTest)
	group.Wait()

	if c.Close() {
		t.Error("Close says that operations have come to an end")
	}
	if finished, err := c.Do(t.Context(), hanging, nil); !finished || err != ErrClosed {
		t.Errorf("after Close: %v, %v", finished, err)
	}
	if released.Load() != 0 {
		t.Error("released while in use")
	}
	close(hang)
	first, again := c.Close(), c.Close()
	if !first || !again || released.Load() != 1 {
		t.Errorf("released %d times", released.Load())
	}
}

// TestCallsEnds checks that ends are not among those whose number is limited.
func TestCallsEnds(t *testing.T) {
	c := NewCalls(1, func() {})
	const calls = 20
	var all, group sync.WaitGroup
	all.Add(calls)
	for range calls {
		group.Go(func() {
			c.Do(t.Context(), func() error { return nil }, func() error { all.Done(); all.Wait(); return nil })
		})
	}
	group.Wait()
	c.Close()
}

// TestCommits checks that a commit that covers a call has begun after the call, that those who wait share one, and that errors
// reach those whom they concern.
func TestCommits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		commits, proceed := 0, make(chan error)
		c := NewCommits(func() error {
			commits++
			return <-proceed
		})
		results := make(chan error)
		call := func() { go func() { results <- c.Do() }() }
		call()
		synctest.Wait()
		const calls = 100
		for range calls {
			call()
		}
		synctest.Wait()
		if commits != 1 {
			t.Errorf("%d commits at a time", commits)
		}
		proceed <- errTest
		if err := <-results; err != errTest {
			t.Errorf("error is %v", err)
		}
		synctest.Wait()
		select {
		case <-results:
			t.Error("a call was done by a commit that had begun before it")
		default:
		}
		proceed <- nil
		for range calls {
			if err := <-results; err != nil {
				t.Errorf("error is %v", err)
			}
		}
		if commits != 2 {
			t.Errorf("%d commits", commits)
		}
	})
}
