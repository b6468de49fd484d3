// SPDX-License-Identifier: GPL-3.0-or-later

package content

import (
	"bytes"
	"crypto/cipher"
	"crypto/sha256"
	"encoding/base32"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
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
			got, want := sha256.New(), sha256.New()
			n, err := io.Copy(got, r)
			io.Copy(want, keyStreamReader(test.name, test.length))
			if err != nil || n != test.length || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
				t.Errorf("decoded %d bytes: %v", n, err)
			}
		})
	}
}

// keyStreamReader reads the contents of the large known answers: a ChaCha20 key stream whose key is
// the hash of a name.
func keyStreamReader(name string, n int64) io.Reader {
	key := blake2b.Sum256([]byte(name))
	stream, err := chacha20.NewUnauthenticatedCipher(key[:], make([]byte, chacha20.NonceSize))
	if err != nil {
		panic(err)
	}
	return io.LimitReader(cipher.StreamReader{S: stream, R: zeros{}}, n)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// vector is one of the official test vectors of ERIS 1.0.0. All binary members are Base32.
type vector struct {
	ID                int               `json:"id"`
	Type              string            `json:"type"`
	URN               string            `json:"urn"`
	Blocks            map[string]string `json:"blocks"`
	Content           string            `json:"content"`
	ConvergenceSecret string            `json:"convergence-secret"`
	BlockSize         int               `json:"block-size"`
	ReadCapability    struct {
		BlockSize     int    `json:"block-size"`
		Level         int    `json:"level"`
		RootReference string `json:"root-reference"`
		RootKey       string `json:"root-key"`
	} `json:"read-capability"`
}

// store returns the blocks of a vector, right or wrong.
func (v *vector) store(t *testing.T) *sourcetest.Backend {
	m := sourcetest.NewBackend()
	for ref, block := range v.Blocks {
		r, err := eris.ParseReference(ref)
		must(t, err)
		m.Set(r, mustBase32(t, block))
	}
	return m
}

func mustBase32(t *testing.T, text string) []byte {
	t.Helper()
	b, err := base32.StdEncoding.WithPadding(base32.NoPadding).DecodeString(text)
	must(t, err)
	return b
}

// negativeKinds tells what each negative vector is about. A wrong block size cannot be told from a
// source's wrong answer.
var negativeKinds = map[int]string{
	13: "missing", 14: "block", 15: "missing", 16: "block", 17: "content", 18: "content",
	19: "content", 20: "block", 21: "block", 22: "content", 23: "content", 24: "content",
}

func TestOfficialVectors(t *testing.T) {
	t.Parallel()
	const directory = "../../../shared/testdata/eris-test-vectors"
	paths, err := filepath.Glob(filepath.Join(directory, "*.json"))
	must(t, err)
	if len(paths) == 0 {
		t.Skipf("the official ERIS test vectors are not in %s", directory)
	}
	if len(paths) != 25 {
		t.Errorf("%d vectors instead of 25", len(paths))
	}
	for _, path := range paths {
		data, err := os.ReadFile(path)
		must(t, err)
		var v vector
		must(t, json.Unmarshal(data, &v))
		t.Run(filepath.Base(path), func(t *testing.T) {
			capability, err := eris.ParseURN(v.URN)
			must(t, err)
			want := eris.ReadCapability{BlockSize: eris.BlockSize(v.ReadCapability.BlockSize), Level: v.ReadCapability.Level}
			copy(want.Root[:], mustBase32(t, v.ReadCapability.RootReference))
			copy(want.Key[:], mustBase32(t, v.ReadCapability.RootKey))
			if capability != want {
				t.Errorf("capability %+v, want %+v", capability, want)
			}
			if got := capability.URN(); got != v.URN {
				t.Errorf("URN %s, want %s", got, v.URN)
			}
			switch v.Type {
			case "positive":
				testPositiveVector(t, &v, capability)
			case "negative":
				testNegativeVector(t, &v, capability)
			default:
				t.Errorf("type %q", v.Type)
			}
		})
	}
}

func testPositiveVector(t *testing.T, v *vector, capability eris.ReadCapability) {
	content, store := mustBase32(t, v.Content), v.store(t)
	secret, err := eris.ParseConvergenceSecret(v.ConvergenceSecret)
	must(t, err)

	encoded, blocks := mustEncode(t, content, eris.EncodeOptions{BlockSize: eris.BlockSize(v.BlockSize), Secret: secret})
	if encoded != capability {
		t.Errorf("Encode: %v, want %v", encoded, capability)
	}
	if !maps.EqualFunc(blocks.All(), store.All(), bytes.Equal) {
		t.Errorf("%d blocks, not those of the %d that are expected", len(blocks.All()), len(store.All()))
	}

	decoded, err := readAll(t.Context(), open(t, store.Get), capability, int64(len(content)), fetch.Window{})
	if err != nil || !bytes.Equal(decoded, content) {
		t.Errorf("decoded %d bytes, want %d; error %v", len(decoded), len(content), err)
	}
	if len(content) > 0 {
		if _, err := Open(t.Context(), open(t, store.Get), capability, int64(len(content))-1, fetch.Window{}); !errors.Is(err, ErrTooLarge) {
			t.Errorf("one byte less allowed: error %v", err)
		}
	}
}

func testNegativeVector(t *testing.T, v *vector, capability eris.ReadCapability) {
	for way, err := range readEveryWay(t, verified(v.store(t).Get), capability, 1<<30) {
		if kind := errorKind(err); kind != negativeKinds[v.ID] {
			t.Errorf("%s: error %v is of kind %q, want %q", way, err, kind, negativeKinds[v.ID])
		}
	}
}
