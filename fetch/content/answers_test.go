// SPDX-License-Identifier: GPL-3.0-or-later

package content

import (
	"bufio"
	"bytes"
	"io"
	"os"
	"testing"

	"golang.org/x/crypto/blake2b"
	"golang.org/x/crypto/chacha20"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
)

// The first is official vector 0; the others were computed with two independent programs.
func TestKnownAnswers(t *testing.T) {
	for _, test := range []struct {
		content string
		size    eris.BlockSize
		urn     string
	}{
		{"Hello world!", eris.BlockSize1KiB, "urn:eris:BIAD77QDJMFAKZYH2DXBUZYAP3MXZ3DJZVFYQ5DFWC6T65WSFCU5S2IT4YZGJ7AC4SYQMP2DM2ANS2ZTCP3DJJIRV733CRAAHOSWIYZM3M"},
		{"Hail ERIS!", eris.BlockSize1KiB, "urn:eris:BIAAV4OIFHWY67XFEHAOQVXUOWTYDVG5TEY6S6IW4PJ4SQLVJJF4MIKNDLKUDPPHDCKLBUIAJQ3U2IEARRPFHEHWFW5NJY7BJUGFESPGDQ"},
		{"", eris.BlockSize1KiB, "urn:eris:BIADFUKDPYKJNLGCVSIIDI3FVKND7MO5AGOCXBK2C4ITT5MAL4LSCZF62B4PDOFQCLLNL7AXXSJFGINUYXVGVTDCQ2V7S7W5S234WFXCJ4"},
		{"", eris.BlockSize32KiB, "urn:eris:B4AC3MKL2BYR3E2WPMY2QRA6QZBLY4VNWJEBTSK5KWD66BRIT2EXVQVWY6TWVKJCZLC66RE3T2PKWDU3TBAKZZZIZRBTMP6BSOPE4CRXII"},
	} {
		capability, m := mustEncode(t, []byte(test.content), eris.EncodeOptions{BlockSize: test.size})
		if got := capability.URN(); got != test.urn {
			t.Errorf("%q in blocks of %v: %s, want %s", test.content, test.size, got, test.urn)
		}
		content, err := readAll(t.Context(), open(t, m.Get), capability, int64(len(test.content)), fetch.Window{})
		if err != nil || string(content) != test.content {
			t.Errorf("%q in blocks of %v: decoded %q, %v", test.content, test.size, content, err)
		}
	}
	capability, _ := mustEncode(t, []byte("Hello world!"), eris.EncodeOptions{})
	if want := "urn:blake2b:H77AGSYKAVTQPUHODJTQA7WZPTWGTTKLRB2GLMF5H53NEKFJ3FUQ"; capability.Root.URN() != want {
		t.Errorf("root %s, want %s", capability.Root.URN(), want)
	}
}

// The contents of the large known answers of ERIS 1.0.0 are ChaCha20 key streams. They take from a
// second to the better part of an hour, so they run only where they are asked for by a variable in
// the environment: ERIS_BIG_TESTS, which .ci/run sets, for all but the greatest.
func TestLargeKnownAnswers(t *testing.T) {
	for _, test := range []struct {
		variable string
		name     string
		length   int64
		size     eris.BlockSize
		level    int
		urn      string
	}{
		{"ERIS_BIG_TESTS", "100MiB (block size 1KiB)", 100 << 20, eris.BlockSize1KiB, 5, "urn:eris:BIC6F5EKY2PMXS2VNOKPD3AJGKTQBD3EXSCSLZIENXAXBM7PCTH2TCMF5OKJWAN36N4DFO6JPFZBR3MS7ECOGDYDERIJJ4N5KAQSZS67YY"},
		{"ERIS_BIG_TESTS", "1GiB (block size 32KiB)", 1 << 30, eris.BlockSize32KiB, 2, "urn:eris:B4BL4DKSEOPGMYS2CU2OFNYCH4BGQT774GXKGURLFO5FDXAQQPJGJ35AZR3PEK6CVCV74FVTAXHRSWLUUNYYA46ZPOPDOV2M5NVLBETWVI"},
		{"ERIS_HUGE_TESTS", "256GiB (block size 32KiB)", 256 << 30, eris.BlockSize32KiB, 3, "urn:eris:B4B5DNZVGU4QDCN7TAYWQZE5IJ6ESAOESEVYB5PPWFWHE252OY4X5XXJMNL4JMMFMO5LNITC7OGCLU4IOSZ7G6SA5F2VTZG2GZ5UCYFD5E"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if os.Getenv(test.variable) == "" {
				t.Skipf("takes long; set %s=1 to run it", test.variable)
			}
			check := func(capability eris.ReadCapability, err error) {
				t.Helper()
				must(t, err)
				if capability.URN() != test.urn || capability.Level != test.level {
					t.Errorf("%v of level %d, want %s of level %d", capability, capability.Level, test.urn, test.level)
				}
			}
			check(eris.Encode(t.Context(), keyStreamReader(test.name, test.length), nil, eris.EncodeOptions{BlockSize: test.size}))
			if test.variable == "ERIS_HUGE_TESTS" {
				return
			}

			m := sourcetest.NewBackend()
			capability, err := eris.Encode(t.Context(), keyStreamReader(test.name, test.length), m.Put, eris.EncodeOptions{BlockSize: test.size})
			check(capability, err)
			r, err := Open(t.Context(), open(t, m.Get), capability, test.length, fetch.Window{})
			must(t, err)
			defer r.Close()
			compare := &comparer{want: bufio.NewReaderSize(keyStreamReader(test.name, test.length), 1<<20)}
			if n, err := io.Copy(compare, r); err != nil || n != test.length {
				t.Errorf("decoded %d bytes: %v", n, err)
			}
		})
	}
}

// comparer is a writer that wants to be given what a reader gives.
type comparer struct {
	want   io.Reader
	buffer []byte
}

func (c *comparer) Write(p []byte) (int, error) {
	if cap(c.buffer) < len(p) {
		c.buffer = make([]byte, len(p))
	}
	want := c.buffer[:len(p)]
	if _, err := io.ReadFull(c.want, want); err != nil {
		return 0, err
	}
	if !bytes.Equal(p, want) {
		return 0, io.ErrNoProgress
	}
	return len(p), nil
}

// keyStreamReader reads the contents of the large known answers: a ChaCha20 key stream whose key is
// the hash of a name.
func keyStreamReader(name string, n int64) io.Reader {
	key := blake2b.Sum256([]byte(name))
	cipher, err := chacha20.NewUnauthenticatedCipher(key[:], make([]byte, chacha20.NonceSize))
	if err != nil {
		panic(err)
	}
	return io.LimitReader(zerosThrough{cipher}, n)
}

type zerosThrough struct{ cipher *chacha20.Cipher }

func (z zerosThrough) Read(p []byte) (int, error) {
	clear(p)
	z.cipher.XORKeyStream(p, p)
	return len(p), nil
}
