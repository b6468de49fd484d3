// SPDX-License-Identifier: GPL-3.0-or-later

package content

import (
	"bytes"
	"encoding/base32"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
)

// vector is one of the official test vectors of ERIS 1.0.0. All binary members are Base32.
type vector struct {
	ID                int               `json:"id"`
	Type              string            `json:"type"`
	Name              string            `json:"name"`
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
	checkSameBlocks(t, blocks, store)

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

func checkSameBlocks(t *testing.T, got, want *sourcetest.Backend) {
	t.Helper()
	if !maps.EqualFunc(got.All(), want.All(), bytes.Equal) {
		t.Errorf("%d blocks, not those of the %d that are expected", len(got.All()), len(want.All()))
	}
}
