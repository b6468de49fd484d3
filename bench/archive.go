// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bytes"
	"math/rand/v2"
)

// words returns n bytes of something like text, the same for the same seed.
func words(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	vocabulary := make([]string, 300)
	for i := range vocabulary {
		b := make([]byte, 2+r.IntN(9))
		for j := range b {
			b[j] = 'a' + byte(r.IntN(26)*r.IntN(26)/26)
		}
		vocabulary[i] = string(b)
	}
	var b bytes.Buffer
	for b.Len() < n {
		b.WriteString(vocabulary[r.IntN(len(vocabulary))*r.IntN(len(vocabulary))/len(vocabulary)])
		b.WriteByte(" \n"[r.IntN(20)/19])
	}
	return b.Bytes()[:n]
}

// archive returns n bytes of the kinds that are in archives of store items: text, something like
// machine code, tables, runs of zeros, and what is compressed already. They are always the same.
// Compressors make about a quarter of them.
func archive(n int) []byte {
	r := rand.New(rand.NewPCG(1, 2))
	b := make([]byte, 0, n+1<<20)
	text := words(40, 4<<20)
	var code []byte
	for len(code) < 1<<18 {
		code = append(code, "\x48\x89\x8b\xe8\x0f\xc3\x00\xff"[r.IntN(8)], byte(r.IntN(16)*r.IntN(17)))
	}
	for len(b) < n {
		switch r.IntN(10) {
		case 0, 1, 2: // text
			for range 20 {
				at, size := r.IntN(len(text)-100000), 20+r.IntN(2000)
				b = append(b, text[at:at+size]...)
			}
		case 3, 4, 5, 6: // instructions, some with operands, in sequences that recur
			for range 1200 {
				at := r.IntN(len(code)-200) * r.IntN(1000) / 1000
				b = append(b, code[at:at+5+r.IntN(60)]...)
				b = append(b, byte(r.Uint32()), byte(r.IntN(4)), 0, 0)
			}
		case 7, 8: // a table
			for i := range 4000 {
				b = append(b, byte(i), byte(i>>8), 0, 0, byte(r.IntN(20)), 0, 0x40, 0)
			}
		default:
			b = append(b, make([]byte, r.IntN(20000))...)
			for range 5000 {
				b = append(b, byte(r.Uint32()))
			}
		}
	}
	return b[:n]
}
