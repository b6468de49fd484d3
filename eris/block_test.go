// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/chacha20"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

// A block is what the ChaCha20 package makes of the plaintext, and comes back.
func TestDecrypt(t *testing.T) {
	for _, size := range bothSizes {
		for _, level := range []int{0, 1, 255} {
			plaintext, key := randomContent(7, int(size)), Key{1, 2, 31: 3}
			cipher, err := chacha20.NewUnauthenticatedCipher(key[:], []byte{byte(level), 11: 0})
			testhelp.Must(t, err)
			block := make([]byte, size)
			cipher.XORKeyStream(block, plaintext)
			got := make([]byte, size)
			if Decrypt(got, block, key, level); !bytes.Equal(got, plaintext) {
				t.Errorf("%v, level %d: does not come back", size, level)
			}
			if Decrypt(block, block, key, level); !bytes.Equal(block, plaintext) {
				t.Errorf("%v, level %d: does not come back in place", size, level)
			}
		}
	}
	b := make([]byte, 2048)
	for name, f := range map[string]func(){
		"512 bytes":  func() { Decrypt(b[:512], b[:512], Key{}, 0) },
		"2048 bytes": func() { Decrypt(b, b, Key{}, 0) },
		"level 256":  func() { Decrypt(b[:1024], b[:1024], Key{}, 256) },
		"level -1":   func() { Decrypt(b[:1024], b[:1024], Key{}, -1) },
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("did not panic")
				}
			}()
			f()
		})
	}
}

func TestNoAllocations(t *testing.T) {
	for _, size := range bothSizes {
		plaintext, block := make([]byte, size), make([]byte, size)
		plaintext[0] = 1
		refs, blocks := make([]Reference, 20), make([][]byte, 20)
		for i := range blocks {
			blocks[i] = block
		}
		text := []byte(Sum(block).String())
		for name, f := range map[string]func(){
			"Decrypt":        func() { Decrypt(block, block, Key{}, 1) },
			"SumAll":         func() { SumAll(refs, blocks) },
			"ParseNode":      func() { _, _ = ParseNode(plaintext) },
			"ParseReference": func() { _, _ = ParseReference(text) },
		} {
			if n := testing.AllocsPerRun(100, f); n != 0 {
				t.Errorf("%s of %v: %v allocations", name, size, n)
			}
		}
	}
}

func TestVerify(t *testing.T) {
	block := randomContent(1, 1024)
	ref := Sum(block)
	testhelp.Must(t, Verify(ref, block))
	block[1023] ^= 1
	for name, test := range map[string]struct {
		ref   Reference
		block []byte
		text  string
	}{
		"one bit": {ref, block, "do not have this hash"},
		"cut":     {ref, block[:1023], "1023 bytes is not a block size"},
		"empty":   {Sum(nil), nil, "0 bytes is not a block size"},
		// The hash is right, but no block is so long.
		"2048 bytes": {Sum(make([]byte, 2048)), make([]byte, 2048), "2048 bytes is not a block size"},
	} {
		err := Verify(test.ref, test.block)
		var blockError *BlockError
		if !errors.As(err, &blockError) || blockError.Reference != test.ref || blockError.Length != len(test.block) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !strings.Contains(err.Error(), test.text) || !strings.Contains(err.Error(), test.ref.String()) {
			t.Errorf("%s: text %q", name, err)
		}
	}
}

func TestPadding(t *testing.T) {
	for _, size := range bothSizes {
		for _, n := range []int{0, 1, int(size) - 1, int(size), int(size) + 1, 2*int(size) - 1, 2 * int(size)} {
			content := bytes.Repeat([]byte{0x80}, n)
			padded := pad(bytes.Clone(content), size)
			if want := (n/int(size) + 1) * int(size); len(padded) != want {
				t.Fatalf("%d bytes padded to %d, want %d", n, len(padded), want)
			}
			if padded[n] != 0x80 || !bytes.Equal(padded[:n], content) || len(bytes.Trim(padded[n+1:], "\x00")) != 0 {
				t.Errorf("%d bytes padded wrongly", n)
			}
			back, err := Unpad(padded)
			if err != nil || !bytes.Equal(back, content) {
				t.Errorf("%d bytes came back as %d, %v", n, len(back), err)
			}
		}
	}
	leaf := make([]byte, 1024)
	for name, spoil := range map[string]func(){
		"all zero":            func() {},
		"ends in 0x42":        func() { leaf[1023] = 0x42 },
		"0x42 in the padding": func() { leaf[500], leaf[600] = 0x80, 0x42 },
		"ends in 0x81":        func() { leaf[1023] = 0x81 },
	} {
		clear(leaf)
		spoil()
		if content, err := Unpad(leaf); err == nil {
			t.Errorf("%s: %d bytes", name, len(content))
		}
	}
	clear(leaf)
	leaf[0] = 0x80
	if content, err := Unpad(leaf); err != nil || len(content) != 0 {
		t.Errorf("leaf of padding only: %d bytes, %v", len(content), err)
	}
}

func TestParseNode(t *testing.T) {
	for _, size := range bothSizes {
		full := bytes.Repeat([]byte{1}, int(size))
		for _, n := range []int{1, 2, size.Arity() - 1, size.Arity()} {
			plaintext := make([]byte, size)
			copy(plaintext, full[:n*pairSize])
			if node, err := ParseNode(plaintext); err != nil || node.Len() != n {
				t.Errorf("%v, %d pairs: %d, %v", size, n, node.Len(), err)
			}
			// A key of zeros is a key, and a reference with a single bit is one, too.
			clear(plaintext[(n-1)*pairSize : n*pairSize])
			plaintext[(n-1)*pairSize+31] = 1
			if node, err := ParseNode(plaintext); err != nil || node.Len() != n {
				t.Errorf("%v, %d pairs, the last almost zero: %d, %v", size, n, node.Len(), err)
			}
		}
		for name, spoil := range map[string]func(plaintext []byte) error{
			"all zero":                     func([]byte) error { return errNodeEmpty },
			"null reference with a key":    func(p []byte) error { copy(p, full[:3*pairSize]); p[3*pairSize+32] = 1; return errNodeTail },
			"last byte after null pairs":   func(p []byte) error { copy(p, full[:3*pairSize]); p[len(p)-1] = 1; return errNodeTail },
			"pair after a null pair":       func(p []byte) error { copy(p, full); clear(p[64:128]); return errNodeTail },
			"null reference first":         func(p []byte) error { copy(p[64:], full[64:]); return errNodeTail },
			"key only":                     func(p []byte) error { p[63] = 1; return errNodeTail },
			"last pair has only its key":   func(p []byte) error { copy(p, full); clear(p[len(p)-64 : len(p)-32]); return errNodeTail },
			"null reference in the middle": func(p []byte) error { copy(p, full); clear(p[512 : 512+32]); return errNodeTail },
		} {
			plaintext := make([]byte, size)
			want := spoil(plaintext)
			if node, err := ParseNode(plaintext); err != want {
				t.Errorf("%v, %s: %d pairs, %v", size, name, node.Len(), err)
			}
		}
	}
	for _, n := range []int{0, 64, 1023, 1025, 65536} {
		if _, err := ParseNode(make([]byte, n)); err == nil {
			t.Errorf("node of %d bytes parsed", n)
		}
	}
}

func TestSumAll(t *testing.T) {
	var blocks [][]byte
	var want []Reference
	for i, n := range []int{1024, 1024, 32768, 0, 5, 1024, 32768, 32768, 32768, 128} {
		blocks = append(blocks, randomContent(byte(i), n))
	}
	for i := range 100 {
		blocks = append(blocks, randomContent(byte(100+i), 1024))
	}
	for _, b := range blocks {
		want = append(want, Sum(b))
	}
	got := make([]Reference, len(blocks))
	for n := range blocks {
		clear(got)
		SumAll(got[:n], blocks[:n])
		if !slices.Equal(got[:n], want[:n]) {
			t.Fatalf("wrong references of %d blocks", n)
		}
	}
}
