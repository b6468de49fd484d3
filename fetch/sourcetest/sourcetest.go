// SPDX-License-Identifier: GPL-3.0-or-later

// Package sourcetest is the suite that every [fetch.Source] and [fetch.Store] passes: it gets
// blocks, also ones that are missing, of the wrong size or of wrong bytes, and many at a time; has
// answers come late, in another order or never; gives calls up, one by one and by closing the
// source; restarts the server and breaks its connections; and does the same with putting.
//
// # How to add a source
//
// CONTRIBUTING.md says what it takes. For the call of [Test], start a server for a [Backend], open
// the source on it, and hand both to the suite:
//
//	func TestConformance(t *testing.T) {
//		sourcetest.Test(t, func(t *testing.T, backend *sourcetest.Backend) sourcetest.Fixture {
//			server := startServer(t, backend)
//			source := open(server.URL)
//			return sourcetest.Fixture{Source: source, Restart: server.Restart}
//		})
//	}
//
// A source without a server, whose blocks are in files, is given [Files]: see the tests of packages
// fetch/dir and fetch/dump.
//
// What a fixture does not offer is not tested. What is particular to a transport, above all what a
// peer can do that does not keep to its protocol, has to be tested beside the suite.
package sourcetest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// Fixture is a source to be tested. All fields but Source are optional.
type Fixture struct {
	// Source gets from the Backend, through a server that permits everything. The suite closes it.
	// If it is a fetch.Store, putting is tested as well.
	Source fetch.Source
	// ReadOnly is a store whose server takes no blocks from it. The suite closes it.
	ReadOnly fetch.Store
	// Restart ends the server of Source, whatever it is doing, and starts it again at the same
	// address.
	Restart func()
	// Break breaks the connections of Source, but lets the server run.
	Break func()
	// Secret is a part of the URL of Source that must not be shown.
	Secret string
	// Bans says that the source does not ask a server again that has given wrong bytes.
	Bans bool
	// Held is how many requests the server serves at a time at least; 0 stands for one.
	Held int
}

// Test runs the suite. Open is called for every test of it; servers are to be ended by t.Cleanup.
func Test(t *testing.T, open func(t *testing.T, backend *Backend) Fixture) {
	for _, test := range []struct {
		name string
		run  func(t *testing.T, s *suite)
	}{
		{"Get", testGet},
		{"Missing", testMissing},
		{"Have", testHave},
		{"WrongSize", testWrongSize},
		{"WrongBytes", testWrongBytes},
		{"BackendFails", testBackendFails},
		{"CancelBefore", testCancelBefore},
		{"CancelSome", testCancelSome},
		{"CancelSilent", testCancelSilent},
		{"StartAgain", testStartAgain},
		{"CloseInFlight", testCloseInFlight},
		{"Many", testMany},
		{"SlowAndFast", testSlowAndFast},
		{"Restart", func(t *testing.T, s *suite) { testInterruption(t, s, s.Restart) }},
		{"Break", func(t *testing.T, s *suite) { testInterruption(t, s, s.Break) }},
		{"Progress", testProgress},
		{"String", testString},
		{"Put", testPut},
		{"PutMany", testPutMany},
		{"PutFails", testPutFails},
		{"PutCancel", testPutCancel},
		{"PutRestart", func(t *testing.T, s *suite) { testPutInterruption(t, s, s.Restart) }},
		{"PutBreak", func(t *testing.T, s *suite) { testPutInterruption(t, s, s.Break) }},
		{"PutReadOnly", testPutReadOnly},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := runtime.NumGoroutine()
			t.Run("suite", func(t *testing.T) {
				s := &suite{backend: NewBackend()}
				s.Fixture = open(t, s.backend)
				s.closeSource = sync.OnceValue(s.Source.Close)
				defer s.close(t)
				test.run(t, s)
			})
			AwaitGoroutines(t, before)
		})
	}
}

// AwaitGoroutines waits until there are no more goroutines than before. If that never comes to
// pass, it says which there are.
func AwaitGoroutines(t *testing.T, before int) {
	t.Helper()
	for range 6000 {
		if runtime.NumGoroutine() <= before {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	stacks := make([]byte, 1<<16)
	t.Errorf("goroutines are left:\n%s", stacks[:runtime.Stack(stacks, true)])
}

type suite struct {
	Fixture
	backend     *Backend
	closeSource func() error // does nothing the second time
}

func (s *suite) close(t *testing.T) {
	if err := s.closeSource(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if s.ReadOnly != nil {
		if err := s.ReadOnly.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	}
}

// NewBlock returns a new block.
func NewBlock(size eris.BlockSize) (eris.Reference, []byte) {
	b := make([]byte, size)
	rand.Read(b)
	return eris.Sum(b), b
}

// add adds a new block to the backend.
func (s *suite) add(size eris.BlockSize) (eris.Reference, []byte) { return s.backend.Add(size) }

func (s *suite) get(ctx context.Context, ref eris.Reference, size eris.BlockSize) ([]byte, error) {
	return fetch.Get(ctx, s.Source, ref, size, make([]byte, 0, size))
}

// mustGet gets a block and checks that it is the right one.
func (s *suite) mustGet(t *testing.T, ref eris.Reference, want []byte) {
	t.Helper()
	got, err := s.get(t.Context(), ref, eris.BlockSize(len(want)))
	if err != nil {
		t.Errorf("Get: %v", err)
	} else if !bytes.Equal(got, want) {
		t.Errorf("Get returned something else")
	}
}

// mustMiss gets a block that nobody has.
func (s *suite) mustMiss(t *testing.T, size eris.BlockSize) {
	t.Helper()
	ref, _ := NewBlock(size)
	if _, err := s.get(t.Context(), ref, size); !errors.Is(err, eris.ErrNotFound) {
		t.Errorf("%v: error is %v, not that the block is missing", size, err)
	}
}

// getAgain gets a block; failures are forgiven for longer than a source rests.
func (s *suite) getAgain(t *testing.T, ref eris.Reference, want []byte) {
	t.Helper()
	for range 2000 {
		if _, err := s.get(t.Context(), ref, eris.BlockSize(len(want))); err == nil {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	s.mustGet(t, ref, want)
}

// mixed is the size of the i-th of many blocks.
func mixed(i int) eris.BlockSize {
	if i%16 == 0 {
		return eris.BlockSize32KiB
	}
	return eris.BlockSize1KiB
}

// awaitHeld waits until as many calls are held as there are, or as the server serves at a time.
func (s *suite) awaitHeld(calls int) { s.backend.AwaitHeld(max(1, min(s.Held, calls))) }

var bothSizes = []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB}

func testGet(t *testing.T, s *suite) {
	for _, size := range bothSizes {
		ref, want := s.add(size)
		for range 3 {
			s.mustGet(t, ref, want)
		}
		// More room than is needed, with something behind it.
		memory := bytes.Repeat([]byte{0xa5}, int(size)+64)
		got, err := fetch.Get(t.Context(), s.Source, ref, size, memory[:0])
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%v: Get with more room: %v", size, err)
		}
		if !bytes.Equal(memory[size:], bytes.Repeat([]byte{0xa5}, 64)) {
			t.Errorf("%v: Get wrote behind the block", size)
		}
	}
}

func testMissing(t *testing.T, s *suite) {
	for _, size := range bothSizes {
		s.mustMiss(t, size)
		other, want := s.add(size)
		s.mustGet(t, other, want)
	}
}

// testHave asks which of many blocks are there, and cancels that.
func testHave(t *testing.T, s *suite) {
	asks, ok := s.Source.(interface{ AsksHave() bool })
	if !ok || !asks.AsksHave() {
		t.Skip("the source cannot be asked what it has")
	}
	const count = 100
	var question []byte
	for i := range count {
		ref, _ := NewBlock(mixed(i))
		if i%3 == 0 {
			ref, _ = s.add(mixed(i))
		}
		question = append(question, ref[:fetch.HavePrefix]...)
	}
	const most = count/8 + 1
	ask := func() *fetch.Request {
		r := &fetch.Request{Have: question, Size: most, Dst: make([]byte, 0, most)}
		fetch.Await(t.Context(), s.Source, r)
		return r
	}
	for range 2 {
		r := ask()
		if r.Err != nil || len(r.Block) != most {
			t.Fatalf("answer of %d bytes, error %v", len(r.Block), r.Err)
		}
		for i := range count {
			if has, known := fetch.Has(r.Block, i); !known || has != (i%3 == 0) {
				t.Errorf("answer to %d is %v, %v", i, has, known)
			}
		}
		// The same request can be one for a block.
		ref, want := s.add(eris.BlockSize1KiB)
		r.Have, r.Pair.Reference, r.Size, r.Dst = nil, ref, eris.BlockSize1KiB, make([]byte, 0, eris.BlockSize1KiB)
		if fetch.Await(t.Context(), s.Source, r); r.Err != nil || !bytes.Equal(r.Block, want) {
			t.Errorf("block after an answer: %v", r.Err)
		}
	}
	r := &fetch.Request{Have: question, Size: 64, Dst: make([]byte, 0, 64)}
	done := make(chan struct{}, 2)
	r.Done = func(*fetch.Request) { done <- struct{}{} }
	s.Source.Start(r)
	s.Source.Cancel(r)
	<-done
	s.closeSource()
	if r := ask(); r.Err == nil {
		t.Error("a question after Close has an answer")
	}
}

func testWrongSize(t *testing.T, s *suite) {
	for i, size := range bothSizes {
		ref, _ := s.add(size)
		_, err := s.get(t.Context(), ref, bothSizes[1-i])
		if !errors.Is(err, eris.ErrNotFound) && !errors.As(err, new(*eris.BlockError)) {
			t.Errorf("%v: error is %v, neither that the block is missing nor that it is wrong", size, err)
		}
	}
	ref, want := s.add(eris.BlockSize1KiB)
	s.mustGet(t, ref, want)
}

func testWrongBytes(t *testing.T, s *suite) {
	for _, size := range bothSizes {
		ref, b := s.add(size)
		wrong := bytes.Clone(b)
		wrong[len(wrong)-1] ^= 1
		s.backend.Set(ref, wrong)
		_, err := s.get(t.Context(), ref, size)
		var blockError *eris.BlockError
		if !errors.As(err, &blockError) || blockError.Reference != ref {
			t.Errorf("%v: error is %v, not that the block is wrong", size, err)
		}
		if s.Bans {
			return
		}
		other, want := s.add(size)
		s.mustGet(t, other, want)
	}
}

func testBackendFails(t *testing.T, s *suite) {
	ref, want := s.add(eris.BlockSize1KiB)
	s.backend.Fail(true)
	_, err := s.get(t.Context(), ref, eris.BlockSize1KiB)
	if err == nil || fetch.Lacks(err) {
		t.Errorf("error is %v, which says something about the block", err)
	}
	s.backend.Fail(false)
	s.getAgain(t, ref, want)
}

// errGivenUp is the cause of contexts that the suite ends.
var errGivenUp = errors.New("given up")

func isGivenUp(err error) bool { return errors.Is(err, errGivenUp) || errors.Is(err, context.Canceled) }

func testCancelBefore(t *testing.T, s *suite) {
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errGivenUp)
	ref, want := s.add(eris.BlockSize1KiB)
	if _, err := s.get(ctx, ref, eris.BlockSize1KiB); err != nil && !isGivenUp(err) {
		t.Errorf("error is %v, not that of the context", err)
	}
	s.mustGet(t, ref, want)
}

// testCancelSome gives up half of the calls that are under way; the others must not notice.
func testCancelSome(t *testing.T, s *suite) {
	const calls = 40
	release := s.backend.Hold()
	defer release()
	ctx, cancel := context.WithCancelCause(t.Context())
	var kept, givenUp sync.WaitGroup
	for i := range calls {
		ref, want := s.add(bothSizes[i/2%2])
		if i%2 == 0 {
			kept.Go(func() { s.mustGet(t, ref, want) })
			continue
		}
		givenUp.Go(func() {
			if _, err := s.get(ctx, ref, eris.BlockSize(len(want))); !isGivenUp(err) {
				t.Errorf("error is %v, not that of the context", err)
			}
		})
	}
	s.awaitHeld(calls)
	cancel(errGivenUp)
	givenUp.Wait()
	release()
	kept.Wait()
}

// started is a request that tells when it is over.
type started struct {
	fetch.Request
	want  []byte
	times atomic.Int32
	done  chan struct{}
}

// start starts a request for a new block.
func (s *suite) start(size eris.BlockSize) *started {
	r := &started{done: make(chan struct{}, 10)}
	r.Pair.Reference, r.want = s.add(size)
	r.Size, r.Dst = size, make([]byte, 0, size)
	r.Done = func(*fetch.Request) {
		r.times.Add(1)
		r.done <- struct{}{}
	}
	s.Source.Start(&r.Request)
	return r
}

// testCancelSilent cancels requests of a server that does not answer, again and again: each ends
// once, and its memory is left alone then.
func testCancelSilent(t *testing.T, s *suite) {
	release := s.backend.Hold()
	defer release()
	var requests []*started
	for i := range 40 {
		requests = append(requests, s.start(bothSizes[i%2]))
	}
	s.backend.AwaitHeld(1)
	var group sync.WaitGroup
	for _, r := range slices.Concat(requests, requests) {
		group.Go(func() { s.Source.Cancel(&r.Request) })
	}
	group.Wait()
	for i, r := range requests {
		<-r.done
		s.Source.Cancel(&r.Request)
		if r.Err == nil {
			t.Errorf("request %d was answered by a server that does not answer", i)
		}
		copy(r.Dst[:r.Size], bytes.Repeat([]byte{0x5a}, int(r.Size)))
	}
	release()
	for _, r := range requests[:20] {
		ref, want := s.add(eris.BlockSize1KiB)
		s.getAgain(t, ref, want)
		s.getAgain(t, r.Pair.Reference, r.want)
	}
	for i, r := range requests {
		if n := r.times.Load(); n != 1 {
			t.Errorf("request %d ended %d times", i, n)
		}
		if !bytes.Equal(r.Dst[:r.Size], bytes.Repeat([]byte{0x5a}, int(r.Size))) {
			t.Errorf("the memory of request %d was written to after its end", i)
		}
	}
}

// testStartAgain uses a request again, for other blocks, after it was over and then cancelled,
// which does nothing.
func testStartAgain(t *testing.T, s *suite) {
	r := s.start(eris.BlockSize1KiB)
	for i := range 100 {
		<-r.done
		if r.Err != nil || !bytes.Equal(r.Block, r.want) {
			t.Fatalf("request %d: %v", i, r.Err)
		}
		s.Source.Cancel(&r.Request)
		r.Pair.Reference, r.want = s.add(eris.BlockSize1KiB)
		s.Source.Start(&r.Request)
	}
	<-r.done
	if n := r.times.Load(); n != 101 {
		t.Errorf("101 requests ended %d times", n)
	}
}

func testCloseInFlight(t *testing.T, s *suite) {
	release := s.backend.Hold()
	defer release()
	var requests []*started
	for range 20 {
		requests = append(requests, s.start(eris.BlockSize1KiB))
	}
	s.awaitHeld(len(requests))
	if err := s.closeSource(); err != nil {
		t.Errorf("Close: %v", err)
	}
	requests = append(requests, s.start(eris.BlockSize1KiB))
	for i, r := range requests {
		if <-r.done; r.Err == nil {
			t.Errorf("request %d did not fail", i)
		}
	}
}

func testMany(t *testing.T, s *suite) {
	const calls = 1000
	var group sync.WaitGroup
	for i := range calls {
		ref, want := s.add(mixed(i))
		group.Go(func() { s.mustGet(t, ref, want) })
		if i%100 == 0 {
			group.Go(func() { s.mustMiss(t, eris.BlockSize1KiB) })
		}
	}
	group.Wait()
}

// testSlowAndFast has one answer wait for others.
func testSlowAndFast(t *testing.T, s *suite) {
	if s.Held < 2 {
		t.Skip("the server serves one request at a time")
	}
	slow, wantSlow := s.add(eris.BlockSize32KiB)
	release := s.backend.Hold()
	defer release()
	done := make(chan struct{})
	go func() {
		s.mustGet(t, slow, wantSlow)
		close(done)
	}()
	s.backend.AwaitHeld(1)
	for range 100 {
		ref, want := s.add(eris.BlockSize1KiB)
		s.backend.passOthers()
		s.mustGet(t, ref, want)
	}
	select {
	case <-done:
		t.Error("the answer that is held came")
	default:
	}
	release()
	<-done
}

// testInterruption interrupts the server while calls are held: they may fail or not, but must come
// to an end, and those that do not fail must return their blocks. Then it does so without calls.
func testInterruption(t *testing.T, s *suite, interrupt func()) {
	if interrupt == nil {
		t.Skip("the server or its connections cannot be interrupted")
	}
	ref, want := s.add(eris.BlockSize1KiB)
	s.mustGet(t, ref, want)
	release := s.backend.Hold()
	defer release()
	var requests []*started
	for range 50 {
		requests = append(requests, s.start(eris.BlockSize1KiB))
	}
	s.awaitHeld(len(requests))
	interrupt()
	release()
	for i, r := range requests {
		if <-r.done; errors.Is(r.Err, eris.ErrNotFound) || r.Err == nil && !bytes.Equal(r.Block, r.want) {
			t.Errorf("request %d: a block of %d bytes, error %v", i, len(r.Block), r.Err)
		}
	}
	for range 3 {
		s.getAgain(t, ref, want)
		interrupt()
	}
	s.getAgain(t, ref, want)
}

// testProgress looks whether a slow line can be told from silence: what comes is counted.
func testProgress(t *testing.T, s *suite) {
	source, ok := s.Source.(interface{ Progress() int64 })
	_, store := s.Source.(fetch.Store) // others hide what they are
	if !store || s.Break == nil || strings.HasPrefix(s.Source.String(), "coap+unix:") {
		t.Skip("it is not on a network")
	} else if !ok {
		t.Fatal("the source does not say how many bytes have come")
	}
	ref, want := s.add(eris.BlockSize32KiB)
	before := source.Progress()
	s.mustGet(t, ref, want)
	if came := source.Progress() - before; came < 16<<10 {
		t.Errorf("%d bytes of a block of 32 KiB have come", came)
	}
}

func testString(t *testing.T, s *suite) {
	text := s.Source.String()
	if text == "" {
		t.Error("String returns nothing")
	}
	ref, _ := NewBlock(eris.BlockSize1KiB)
	_, err := s.get(t.Context(), ref, eris.BlockSize1KiB)
	if err == nil {
		t.Fatal("a block that is missing was found")
	}
	if s.Secret != "" && (strings.Contains(text, s.Secret) || strings.Contains(err.Error(), s.Secret)) {
		t.Errorf("the secret is shown: %s; %v", text, err)
	}
}

// store returns the source as a store, or skips the test.
func (s *suite) store(t *testing.T) fetch.Store {
	store, ok := s.Source.(fetch.Store)
	if !ok {
		t.Skip("the source takes no blocks")
	}
	return store
}

// mustPut puts a block and checks that it is there.
func (s *suite) mustPut(t *testing.T, store fetch.Store, ref eris.Reference, block []byte) {
	t.Helper()
	if err := store.Put(t.Context(), ref, block); err != nil || !s.backend.Has(ref) {
		t.Errorf("%d bytes were put, error %v; they are there: %v", len(block), err, s.backend.Has(ref))
	}
}

func testPut(t *testing.T, s *suite) {
	store := s.store(t)
	for _, size := range bothSizes {
		ref, b := NewBlock(size)
		for range 2 { // a block that is there already may be put again
			s.mustPut(t, store, ref, b)
		}
		s.mustGet(t, ref, b)
	}
	if err := store.Put(t.Context(), eris.Sum(nil), nil); err == nil {
		t.Error("Put of no block did not fail")
	}
}

func testPutMany(t *testing.T, s *suite) {
	store := s.store(t)
	var group sync.WaitGroup
	for i := range 300 {
		ref, b := NewBlock(mixed(i))
		group.Go(func() { s.mustPut(t, store, ref, b) })
	}
	group.Wait()
}

func testPutFails(t *testing.T, s *suite) {
	store := s.store(t)
	s.backend.Fail(true)
	for _, size := range bothSizes {
		ref, b := NewBlock(size)
		if err := store.Put(t.Context(), ref, b); err == nil || errors.Is(err, fetch.ErrReadOnly) {
			t.Errorf("%v: error is %v, although the store failed", size, err)
		}
	}
	s.backend.Fail(false)
	ref, b := NewBlock(eris.BlockSize32KiB)
	s.mustPut(t, store, ref, b)
}

func testPutCancel(t *testing.T, s *suite) {
	store := s.store(t)
	for _, size := range bothSizes {
		ref, b := NewBlock(size)
		release := s.backend.Hold()
		ctx, cancel := context.WithCancelCause(t.Context())
		done := make(chan error)
		go func() { done <- store.Put(ctx, ref, b) }()
		s.backend.AwaitHeld(1)
		cancel(errGivenUp)
		if err := <-done; !isGivenUp(err) {
			t.Errorf("%v: error is %v, not that of the context", size, err)
		}
		clear(b)
		release()
		next, b := NewBlock(size)
		s.mustPut(t, store, next, b)
	}
}

// testPutInterruption interrupts the server twice while a block is put, which has to be there then.
func testPutInterruption(t *testing.T, s *suite, interrupt func()) {
	store := s.store(t)
	if interrupt == nil {
		t.Skip("the server or its connections cannot be interrupted")
	}
	for _, size := range bothSizes {
		ref, b := NewBlock(size)
		s.mustPut(t, store, ref, b)
		release := s.backend.Hold()
		before := s.backend.ever.Load()
		next, b := NewBlock(size)
		ctx, end := context.WithCancel(t.Context())
		go func() {
			defer end()
			s.mustPut(t, store, next, b)
		}()
		for i := range int64(2) {
			for s.backend.ever.Load() <= before+i && ctx.Err() == nil { // the call of before may be held still
				time.Sleep(time.Millisecond)
			}
			interrupt()
		}
		release()
		<-ctx.Done()
	}
}

func testPutReadOnly(t *testing.T, s *suite) {
	if s.ReadOnly == nil {
		t.Skip("there is no store that takes no blocks")
	}
	for _, size := range bothSizes {
		ref, b := NewBlock(size)
		if err := s.ReadOnly.Put(t.Context(), ref, b); !errors.Is(err, fetch.ErrReadOnly) {
			t.Errorf("%v: error is %v, not that the store is read-only", size, err)
		}
		if s.backend.Has(ref) {
			t.Errorf("%v: the block was stored all the same", size)
		}
		ref, b = s.add(size)
		if got, err := fetch.Get(t.Context(), s.ReadOnly, ref, size, make([]byte, 0, size)); err != nil || !bytes.Equal(got, b) {
			t.Errorf("%v: Get: %v", size, err)
		}
	}
}
