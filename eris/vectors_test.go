// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"
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
func (v *vector) store(t *testing.T) *memory {
	m := newMemory()
	for ref, block := range v.Blocks {
		r, err := ParseReference(ref)
		if err != nil {
			t.Fatal(err)
		}
		m.blocks[r] = mustBase32(t, block)
	}
	return m
}

func mustBase32(t *testing.T, text string) []byte {
	t.Helper()
	b, err := base32Text.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// negativeKinds tells what each negative vector is about. A wrong block size cannot be told from a source's wrong answer.
var negativeKinds = map[int]string{
	13: "missing", 14: "block", 15: "missing", 16: "block", 17: "content", 18: "content",
	19: "content", 20: "block", 21: "block", 22: "content", 23: "content", 24: "content",
}

func TestOfficialVectors(t *testing.T) {
	t.Parallel()
	const directory = "../../shared/testdata/eris-test-vectors"
	paths, err := filepath.Glob(filepath.Join(directory, "*.json"))
	if err != nil {
		t.Fatal(err)
	}
	if len(paths) == 0 {
		t.Skipf("the official ERIS test vectors are not in %s", directory)
	}
	if len(paths) != 25 {
		t.Errorf("%d vectors instead of 25", len(paths))
	}
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var v vector
		if err := json.Unmarshal(data, &v); err != nil {
			t.Fatal(err)
		}
		t.Run(filepath.Base(path), func(t *testing.T) {
			capability, err := ParseURN(v.URN)
			if err != nil {
				t.Fatal(err)
			}
			want := ReadCapability{BlockSize: BlockSize(v.ReadCapability.BlockSize), Level: v.ReadCapability.Level}
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

func testPositiveVector(t *testing.T, v *vector, capability ReadCapability) {
	content, store := mustBase32(t, v.Content), v.store(t)
	secret, err := ParseConvergenceSecret(v.ConvergenceSecret)
	if err != nil {
		t.Fatal(err)
	}

	encoded, blocks := mustEncode(t, content, EncodeOptions{BlockSize: BlockSize(v.BlockSize), Secret: secret})
	if encoded != capability {
		t.Errorf("Encode: %v, want %v", encoded, capability)
	}
	checkSameBlocks(t, blocks, store)

	blocks = newMemory()
	e, err := NewEncoder(t.Context(), blocks, BlockSize(v.BlockSize), secret)
	if err != nil {
		t.Fatal(err)
	}
	for rest := content; len(rest) > 0; {
		n := min(len(rest), 777)
		if _, err := e.Write(rest[:n]); err != nil {
			t.Fatal(err)
		}
		rest = rest[n:]
	}
	if encoded, err := e.Close(); err != nil || encoded != capability {
		t.Errorf("Encoder: %v, %v, want %v", encoded, err, capability)
	}
	checkSameBlocks(t, blocks, store)

	decoded, err := decodeAll(t.Context(), store, capability, int64(len(content)), Window{})
	if err != nil || !bytes.Equal(decoded, content) {
		t.Errorf("decoded %d bytes, want %d; error %v", len(decoded), len(content), err)
	}
	if len(content) > 0 {
		if _, err := Open(t.Context(), store, capability, int64(len(content))-1, Window{}); !errors.Is(err, ErrTooLarge) {
			t.Errorf("one byte less allowed: error %v", err)
		}
	}
}

func testNegativeVector(t *testing.T, v *vector, capability ReadCapability) {
	store := v.store(t)
	_, openErr := decodeAll(t.Context(), store, capability, 1<<30, Window{})
	sequenceErr := readSequence(t.Context(), store, []Want{{capability, 1 << 30}}, 1<<30, Window{}, nil)
	for name, err := range map[string]error{"content": openErr, "sequence": sequenceErr} {
		if kind := errorKind(err); kind != negativeKinds[v.ID] {
			t.Errorf("%s: error %v is of kind %q, want %q", name, err, kind, negativeKinds[v.ID])
		}
	}
}

// errorKind tells the three kinds of errors apart, as a caller would.
func errorKind(err error) string {
	var block *BlockError
	var content *ContentError
	isMissing, isBlock, isContent := errors.Is(err, ErrNotFound), errors.As(err, &block), errors.As(err, &content)
	switch {
	case err == nil:
		return "none"
	case isMissing && !isBlock && !isContent:
		return "missing"
	case isBlock && !isMissing && !isContent:
		return "block"
	case isContent && !isMissing && !isBlock:
		return "content"
	}
	return "other"
}

func checkSameBlocks(t *testing.T, got, want *memory) {
	t.Helper()
	for ref, block := range got.blocks {
		if !bytes.Equal(want.blocks[ref], block) {
			t.Errorf("block %v is not expected", ref)
		}
	}
	for ref := range want.blocks {
		if _, ok := got.blocks[ref]; !ok {
			t.Errorf("block %v is missing", ref)
		}
	}
}
