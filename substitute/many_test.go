// SPDX-License-Identifier: GPL-3.0-or-later

package substitute

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// TestManyItems checks that items that are decided are not looked at again with each answer of a
// server that is slow: of ten thousands that took longer than their signatures.
func TestManyItems(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mirrors := mirror.NewClient(mirror.Options{})
		defer mirrors.Close()
		s := New(Config{StoreDir: "/gnu/store", URLs: []string{"http://example.org"}, Mirrors: mirrors})
		server := s.servers[0]
		const n = 6400
		var paths []string
		for i := range n {
			path := fmt.Sprintf("/gnu/store/%032d-item", i)
			paths = append(paths, path)
			r := &record{server: server, narinfo: &narinfo.Narinfo{StorePath: path}, authorised: true}
			s.memory.Put(memoryKey{server, path}, r, 0, time.Now().Add(time.Minute))
		}
		server.late()
		turn := make(chan struct{}, 1)
		l := s.newLookup(paths, func(*record) {
			turn <- struct{}{} // Wait is for one goroutine
			synctest.Wait()    // until the lookup has looked what that decides
			<-turn
		})
		looked := 0
		l.counts = func(record) bool { looked++; return true }
		l.run(t.Context())
		if looked > 2*n {
			t.Errorf("of %d items, it was looked %d times whether one is decided", n, looked)
		}
	})
}

// TestRecordSize has a narinfo of short lines, which takes ten times as much memory as its text.
func TestRecordSize(t *testing.T) {
	text := "StorePath: /gnu/store/" + strings.Repeat("0", 32) + "-x\nReferences: \nCompression: none\n" +
		strings.Repeat("URL:x\n", narinfo.MaxURLs) + strings.Repeat("ERIS:x\n", 16)
	n, err := narinfo.Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	want := len(text) + len(n.URLs)*int(unsafe.Sizeof(narinfo.URL{})) + len(n.ERIS)*int(unsafe.Sizeof(narinfo.ERIS{}))
	if size := (&record{narinfo: n}).size(); size < want {
		t.Errorf("%d bytes, of at least %d", size, want)
	}
}
