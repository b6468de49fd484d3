// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap/coaptest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

// A peer is a block store that need not keep to anything: it is asked what to write for each
// request; nil is the end of the connection.
type peer struct {
	hello  []byte
	answer func(token coap.Token, block []byte) []byte
	close  bool // after an answer
}

// play serves a connection.
func (p *peer) play(conn net.Conn, blocks *sourcetest.Backend) {
	defer conn.Close()
	if _, err := conn.Write(p.hello); err != nil {
		return
	}
	r := bufio.NewReader(conn)
	for {
		get, err := coaptest.Read(r)
		if err != nil {
			return
		}
		if get.Code != codes.GET {
			continue
		}
		var block []byte
		for _, query := range get.Options[message.URIQuery] {
			if ref, err := eris.ParseReference(query); err == nil {
				block, _ = blocks.Get(context.Background(), ref, 0, nil)
			}
		}
		if answer := p.answer(get.Token, block); answer != nil {
			if _, err := conn.Write(answer); err != nil || p.close {
				return
			}
		}
	}
}

// listen serves a socket until the end of the test.
func (p *peer) listen(t *testing.T, socket string, blocks *sourcetest.Backend) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	must(t, err)
	ctx, stop := context.WithCancel(context.Background())
	var wait sync.WaitGroup
	wait.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			context.AfterFunc(ctx, func() { conn.Close() })
			wait.Go(func() { p.play(conn, blocks) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		stop()
		wait.Wait()
	})
}

// hostileMachine is a daemon's machine, and the narinfos of a directory.
type hostileMachine struct{ *chain }

func newHostileMachine(t *testing.T) *hostileMachine {
	c := newChain(t)
	writeFiles(t, c.directory+"/first", map[string]string{"acl": acl.NewACL(c.key.PublicKey()).Text(), "substitute-eris.toml": "policy = \"eris-first\"\n"})
	c.server = "file://" + c.directory + "/www"
	return &hostileMachine{c}
}

// publish writes the narinfo and the nar of an item, with a read capability.
func (h *hostileMachine) publish(path string, archive []byte, c eris.ReadCapability) {
	h.t.Helper()
	text := signedNarinfo(h.t, h.key, &narinfo.Narinfo{
		StorePath: path, NarDigest: sha256.Sum256(archive), NarSize: uint64(len(archive)), ERIS: []narinfo.ERIS{{URN: c.URN()}},
	}, narinfo.URL{URL: "nar/" + filepath.Base(path), Compression: "none"})
	writeFiles(h.t, h.directory+"/www", map[string][]byte{filepath.Base(path)[:32] + ".narinfo": []byte(text), "nar/" + filepath.Base(path): archive})
}

// fetch substitutes an item in both ways: with nars to fall back to, and without. It checks that
// what cannot be had leaves nothing behind. A good store that is late, where something stood still,
// is asked again.
func (h *hostileMachine) fetch(t *testing.T, path, store string, archive []byte, fromBlocks bool) {
	t.Helper()
	for _, etc := range []string{"etc", "first"} {
		destination, err := os.MkdirTemp(h.directory, "store")
		must(t, err)
		c := *h.chain
		c.t = t
		c.env = append(c.env[:len(c.env):len(c.env)], "GUIX_CONFIGURATION_DIRECTORY="+h.directory+"/"+etc)
		var reply, log string
		var used usage
		repeat(func() bool {
			reply, log, used = c.talk("substitute", store, "substitute "+path+" "+destination+"/item\n")
			return fromBlocks && strings.Contains(log, saysLate)
		})
		if etc == "first" || fromBlocks {
			checkTree(t, destination+"/item", hashText(sha256.Sum256(archive)))
			if !strings.HasPrefix(reply, "success ") {
				t.Errorf("%s: reply %q\n%s", etc, reply, log)
			}
			// A slow machine may be done with a store before that is.
			fallen, slow := strings.Contains(log, "trying to find an alternative"), strings.Contains(log, "it comes too slowly; another way")
			if fallen && fromBlocks || !fallen && !fromBlocks && !slow {
				t.Errorf("%s: it has come from elsewhere than expected\n%s", etc, log)
			}
		} else {
			if strings.HasPrefix(reply, "success ") || reply == "" {
				t.Errorf("%s: reply %q\n%s", etc, reply, log)
			}
			if left, err := os.ReadDir(destination); err != nil || len(left) > 0 {
				t.Errorf("%s: %v is left, error %v\n%s", etc, left, err, log)
			}
		}
		if used.memory > mostMiB {
			t.Errorf("%s: %d MiB in memory", etc, used.memory)
		}
		if strings.Contains(log, "\x1b[2J") {
			t.Errorf("%s: what a store has said clears the terminal", etc)
		}
		must(t, restore.Remove(destination))
	}
}

// TestHostileStore has block stores that do not do what they should.
func TestHostileStore(t *testing.T) {
	h := newHostileMachine(t)
	tree := h.directory + "/tree"
	for i := range 50 {
		writeFiles(t, tree, map[string][]byte{fmt.Sprint("bin/", i): bytes.Repeat([]byte{byte(i)}, i*3000)})
	}
	blocks := sourcetest.NewBackend()
	e, err := publish.Encode(t.Context(), tree, blocks.Put, erisfs.EncodeOptions{})
	must(t, err)
	archive := archiveOf(t, tree)
	path := "/gnu/store/" + strings.Repeat("a", 32) + "-tree"
	h.publish(path, archive, e.Capability)

	content := func(token coap.Token, payload []byte) []byte {
		return coaptest.Stream(codes.Content, token, nil, payload)
	}
	// after is a store that is good for some requests and then does something else.
	after := func(good int64, bad func(token coap.Token, block []byte) []byte) func(coap.Token, []byte) []byte {
		var mu sync.Mutex
		return func(token coap.Token, block []byte) []byte {
			mu.Lock()
			defer mu.Unlock()
			if good--; good >= 0 {
				return content(token, block)
			}
			return bad(token, block)
		}
	}
	wrongBytes := func(token coap.Token, block []byte) []byte {
		b := bytes.Clone(block)
		b[len(b)/2] ^= 1
		return content(token, b)
	}
	for name, test := range map[string]struct {
		peer
		good bool
	}{
		"honest": {peer{coaptest.CSM, content, false}, true},
		"answers twice": {peer{coaptest.CSM, func(token coap.Token, block []byte) []byte {
			return append(content(token, block), content(token, block)...)
		}, false}, true},
		"wrong bytes":       {peer{coaptest.CSM, wrongBytes, false}, false},
		"wrong bytes later": {peer{coaptest.CSM, after(40, wrongBytes), false}, false},
		"does not have it":  {peer{coaptest.CSM, func(token coap.Token, _ []byte) []byte { return coaptest.Stream(codes.NotFound, token, nil, "") }, false}, false},
		"loses blocks":      {peer{coaptest.CSM, after(40, func(token coap.Token, _ []byte) []byte { return coaptest.Stream(codes.NotFound, token, nil, "") }), false}, false},
		"fails with an escape": {peer{coaptest.CSM, func(token coap.Token, _ []byte) []byte {
			return coaptest.Stream(codes.InternalServerError, token, nil, "\x1b[2J\n")
		}, false}, false},
		"cuts an answer":       {peer{coaptest.CSM, func(token coap.Token, block []byte) []byte { return content(token, block)[:500] }, true}, false},
		"closes":               {peer{coaptest.CSM, func(coap.Token, []byte) []byte { return []byte{} }, true}, false},
		"closes later":         {peer{coaptest.CSM, after(40, func(coap.Token, []byte) []byte { return []byte{} }), true}, false},
		"length of 4 GiB":      {peer{coaptest.CSM, func(coap.Token, []byte) []byte { return []byte{0xf1, 0xff, 0xff, 0xff, 0xff, 0x45, 0x01} }, false}, false},
		"no protocol":          {peer{[]byte("HTTP/1.1 400 Bad Request\r\n\r\n"), content, false}, false},
		"endless capabilities": {peer{bytes.Repeat(coaptest.CSM, 100000), content, false}, false},
		"never answers":        {peer{coaptest.CSM, func(coap.Token, []byte) []byte { return nil }, false}, false},
		"silent":               {peer{nil, func(coap.Token, []byte) []byte { return nil }, false}, false},
		"stops in an answer": {peer{coaptest.CSM, after(40, func(token coap.Token, block []byte) []byte {
			return content(token, block)[:len(block)/2]
		}), false}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			socket := fmt.Sprintf("%s/%x", h.directory, sha256.Sum256([]byte(name)))[:len(h.directory)+9]
			test.listen(t, socket, blocks)
			h.fetch(t, path, "coap+unix://"+socket, archive, test.good)
		})
	}
}

// TestHostileContents has read capabilities, signed by somebody who is trusted or not, of contents
// that are no good; more of what is wrong with an index is in the tests of package erisfs. The
// store is honest.
func TestHostileContents(t *testing.T) {
	h := newHostileMachine(t)
	blocks := sourcetest.NewBackend()
	encode := func(content []byte) eris.ReadCapability {
		c, err := eris.Encode(t.Context(), bytes.NewReader(content), blocks.Put, eris.EncodeOptions{})
		must(t, err)
		return c
	}
	fileOf := func(c eris.ReadCapability) string { return "8200d901145842" + hex.EncodeToString(c.AppendBinary(nil)) }
	hello := encode([]byte("Hello world!"))
	file := fileOf(hello)
	index := func(entries string) []byte {
		b, err := hex.DecodeString("da65726974" + "8201" + strings.ReplaceAll(entries, " ", ""))
		must(t, err)
		return b
	}
	text := func(s string) string { return fmt.Sprintf("%02x", 0x60+len(s)) + hex.EncodeToString([]byte(s)) }
	outside := h.directory + "/outside"
	must(t, os.Mkdir(outside, 0o755))
	linkTo := "8202" + fmt.Sprintf("78%02x", len(outside)) + hex.EncodeToString([]byte(outside))

	// A tree of equal references: with 32 KiB blocks, two blocks a level.
	bomb := func(level int) eris.ReadCapability {
		put := func(plaintext []byte, level int) eris.Pair {
			key := eris.Key(eris.Sum(plaintext))
			block := make([]byte, eris.BlockSize32KiB)
			eris.Decrypt(block, plaintext, key, level) // the cipher is its own inverse
			ref := eris.Sum(block)
			blocks.Put(t.Context(), ref, block)
			return eris.Pair{Reference: ref, Key: key}
		}
		leaf := make([]byte, eris.BlockSize32KiB)
		full := put(leaf, 0)
		leaf[0] = 0x80
		path := put(leaf, 0)
		node := func(level int, last eris.Pair) eris.Pair {
			plaintext := make([]byte, 0, eris.BlockSize32KiB)
			for i := range eris.BlockSize32KiB.Arity() {
				pair := full
				if i == eris.BlockSize32KiB.Arity()-1 {
					pair = last
				}
				plaintext = append(append(plaintext, pair.Reference[:]...), pair.Key[:]...)
			}
			return put(plaintext, level)
		}
		for l := 1; l <= level; l++ {
			path = node(l, path)
			full = node(l, full)
		}
		return eris.ReadCapability{BlockSize: eris.BlockSize32KiB, Level: level, Root: path.Reference, Key: path.Key}
	}
	many := binary.BigEndian.AppendUint32([]byte{0xba}, 2<<20)
	for i := range 200000 { // of two million, in strictly ascending order
		many = append(append(many, 0x81, 0x65), fmt.Appendf(nil, "%05x", i)...)
		many = append(many, 0x82, 0x02, 0x61, 'x')
	}
	deep := "9907cf" + strings.Repeat("6164", 0x7cf) + file

	contents := map[string]eris.ReadCapability{
		"another file":     encode(index("a1 80 " + file)),
		"no tree":          encode([]byte("Hello world!")),
		"nothing":          encode(nil),
		"parent":           encode(index("a1 82" + text("..") + text("x") + file)),
		"absolute":         encode(index("a1 81" + text("/etc/x") + file)),
		"through a link":   encode(index("a2 81" + text("a") + linkTo + "82" + text("a") + text("x") + file)),
		"missing block":    encode(index("a1 81" + text("a") + "8200d901145842" + "0a00" + strings.Repeat("01", 64))),
		"many entries":     encode(append(index(""), many...)),
		"deep":             encode(index("a1" + deep)),
		"bomb":             bomb(6),
		"small bomb":       bomb(2),
		"bomb in an index": encode(index("a1 81" + text("a") + fileOf(bomb(4)))),
		"not a nar":        encode([]byte("\x0d\x00\x00\x00\x00\x00\x00\x00nix-archive-1\x00\x00\x00" + strings.Repeat("x", 1000))),
		"not compressed":   encode([]byte("\x1f\x8b" + strings.Repeat("x", 1000))),
	}
	peer := peer{coaptest.CSM, func(token coap.Token, block []byte) []byte {
		if block == nil {
			return coaptest.Stream(codes.NotFound, token, nil, "")
		}
		return coaptest.Stream(codes.Content, token, nil, block)
	}, false}
	socket := h.directory + "/p"
	peer.listen(t, socket, blocks)
	must(t, os.WriteFile(h.directory+"/good", []byte("good"), 0o644))
	archive := archiveOf(t, h.directory+"/good")
	i := 0
	t.Run("all", func(t *testing.T) { // ends when all have
		for name, c := range contents {
			i++
			path := fmt.Sprintf("/gnu/store/%032d-x", i)
			h.publish(path, archive, c)
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				h.fetch(t, path, "coap+unix://"+socket, archive, false)
			})
		}
	})
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("%v is outside of the store, error %v", left, err)
	}
}
