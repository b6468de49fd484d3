// SPDX-License-Identifier: GPL-3.0-or-later

package substitute_test

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/delta"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

// TestDelta gets an item by a delta where there is one that can be used, and from the nar
// elsewhere, without a warning.
func TestDelta(t *testing.T) {
	base, url := itemName(1, "x-1"), "delta"
	for _, test := range []struct {
		name     string
		policy   substitute.Policy
		line     narinfo.Delta // Size 1 stands for the right one
		unsigned bool          // capabilities that nobody has signed are used
		change   func(store string, served map[string]string)
		delta    bool // it comes from there
		asked    bool // the server is asked for it
	}{
		{name: "a file", line: narinfo.Delta{Base: base, URL: url, Size: 1}, delta: true, asked: true},
		{name: "a file, with nars first", policy: substitute.HTTPFirst, line: narinfo.Delta{Base: base, URL: url, Size: 1}, delta: true, asked: true},
		{name: "a file, with blocks only", policy: substitute.ERISOnly, line: narinfo.Delta{Base: base, URL: url, Size: 1}},
		{name: "blocks", line: narinfo.Delta{Base: base, URL: "urn", Size: 1}, unsigned: true, delta: true},
		{name: "blocks only", policy: substitute.ERISOnly, line: narinfo.Delta{Base: base, URL: "urn", Size: 1}, unsigned: true, delta: true},
		{name: "blocks that nobody has signed", line: narinfo.Delta{Base: base, URL: "urn", Size: 1}},
		{name: "blocks, with nars only", policy: substitute.HTTPOnly, line: narinfo.Delta{Base: base, URL: "urn", Size: 1}, unsigned: true},
		{name: "a draft", line: narinfo.Delta{Base: base, URL: "urn:erisx2:AAAA", Size: 1}, unsigned: true},
		{name: "no base", line: narinfo.Delta{Base: itemName(7, "x-1"), URL: url, Size: 1}},
		{name: "larger than the nar", line: narinfo.Delta{Base: base, URL: url, Size: 1e9}},
		{name: "of a file of ours", line: narinfo.Delta{Base: base, URL: "file:///etc/passwd", Size: 1}},
		{name: "gone", line: narinfo.Delta{Base: base, URL: url, Size: 1}, asked: true,
			change: func(_ string, served map[string]string) { delete(served, "/delta") }},
		{name: "no delta", line: narinfo.Delta{Base: base, URL: url, Size: 1}, asked: true,
			change: func(_ string, served map[string]string) { served["/delta"] = "not found, but here is a page" }},
		{name: "cut off", line: narinfo.Delta{Base: base, URL: url, Size: 1}, asked: true,
			change: func(_ string, served map[string]string) { served["/delta"] = served["/delta"][:40] }},
		{name: "another base", line: narinfo.Delta{Base: base, URL: url, Size: 1}, asked: true,
			change: func(store string, _ map[string]string) {
				os.Remove(store + "/" + base)
				os.WriteFile(store+"/"+base, []byte(strings.Repeat("?", 30e3)), 0o444)
			}},
	} {
		t.Run(test.name, func(t *testing.T) {
			store := t.TempDir()
			numbers := ""
			for i := range 5000 {
				numbers += fmt.Sprintln(i)
			}
			makeItem(t, store, base, itemName(2, "y"), numbers)
			want, archive := makeItem(t, store, itemName(3, "x-2"), itemName(2, "y"), numbers+"and more")
			var made bytes.Buffer
			size, err := delta.Write(t.Context(), &made, want.StorePath, store+"/"+base, delta.WriteOptions{})
			must(t, err)
			must(t, restore.Remove(want.StorePath))
			blocks := sourcetest.NewBackend()
			c, err := eris.Encode(t.Context(), bytes.NewReader(made.Bytes()), blocks.Put, eris.EncodeOptions{})
			must(t, err)
			line := test.line
			if line.Size == 1 {
				line.Size = uint64(size)
			}
			if line.URL == "urn" {
				line.URL = c.URN()
			}
			key := acl.GenerateSigningKey()
			server := newTestServer(t)
			server.has(want.StorePath, signInfo(t, key, want)+line.Text()+"\n")
			server.texts["/nar"], server.texts["/delta"] = string(archive), made.String()
			if test.change != nil {
				test.change(store, server.texts)
			}
			s, log := withLog(t, key, server.url)
			s.StoreDir, s.Policy, s.UnsignedCapabilities = store, test.policy, test.unsigned
			s.Blocks, s.Speeds = newMemoryBlocks(t, blocks, 0), &knownSpeed{speed: substitute.Speed{Rate: 1e5, Known: true}}
			outcome := s.Substitute(t.Context(), want.StorePath, want.StorePath)
			if test.policy == substitute.ERISOnly && !test.delta {
				if outcome.Status != substitute.NotFound {
					t.Errorf("status %d", outcome.Status)
				}
				return
			}
			if outcome.Status != substitute.Success {
				t.Fatalf("status %d:\n%s", outcome.Status, log)
			}
			checkRestored(t, want.StorePath, outcome.NarHash)
			if nar := strings.Contains(log.String(), "/nar"); nar == test.delta {
				t.Errorf("the nar is used: %t:\n%s", nar, log)
			}
			requests := int64(1) // for the narinfo
			if test.asked {
				requests++
			}
			if !test.delta {
				requests++
			}
			if n := server.asked.Load(); n != requests {
				t.Errorf("%d requests instead of %d", n, requests)
			}
			log.warned(t)
		})
	}
}
