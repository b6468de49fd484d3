// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"bytes"
	"strings"
	"testing"
)

// A valid URN, taken apart, to make bad ones from.
const goodURN = "urn:eris:BIAD77QDJMFAKZYH2DXBUZYAP3MXZ3DJZVFYQ5DFWC6T65WSFCU5S2IT4YZGJ7AC4SYQMP2DM2ANS2ZTCP3DJJIRV733CRAAHOSWIYZM3M"

func TestParseURN(t *testing.T) {
	body := strings.TrimPrefix(goodURN, "urn:eris:")
	for _, urn := range []string{goodURN, "URN:ERIS:" + body, "Urn:eRis:" + body} {
		c, err := ParseURN(urn)
		if err != nil {
			t.Errorf("%s: %v", urn, err)
		}
		if c.URN() != goodURN || c.String() != goodURN {
			t.Errorf("%s: came back as %s", urn, c.URN())
		}
	}
	for name, urn := range map[string]string{
		"empty":                "",
		"prefix only":          "urn:eris:",
		"no prefix":            body,
		"draft 1":              "urn:erisx:" + body,
		"draft 2":              "urn:erisx2:" + body,
		"draft 3":              "urn:erisx3:" + body,
		"block":                "urn:blake2b:" + body,
		"lower-case Base32":    "urn:eris:" + strings.ToLower(body),
		"one lower-case":       "urn:eris:b" + body[1:],
		"one too short":        goodURN[:len(goodURN)-1],
		"one too long":         goodURN + "A",
		"padded":               goodURN + "======",
		"padding inside":       goodURN[:len(goodURN)-1] + "=",
		"not Base32: 1":        goodURN[:20] + "1" + goodURN[21:],
		"not Base32: 8":        goodURN[:20] + "8" + goodURN[21:],
		"spare bits 01":        goodURN[:len(goodURN)-1] + "N",
		"spare bits 10":        goodURN[:len(goodURN)-1] + "O",
		"spare bits 11":        goodURN[:len(goodURN)-1] + "P",
		"line break for two":   goodURN[:40] + "\n" + goodURN[41:],
		"line break more":      goodURN + "\n",
		"carriage return":      goodURN[:40] + "\r" + goodURN[41:],
		"space before":         " " + goodURN,
		"q-component":          goodURN + "?=a",
		"r-component":          goodURN + "?+a",
		"f-component":          goodURN + "#a",
		"unknown block size":   "urn:eris:BM" + body[2:],
		"level 255":            "urn:eris:BL7" + body[3:],
		"ſ is no s":            "urn:eri\u017f:" + body,
		"65 bytes":             "urn:eris:" + base32Encoding.EncodeToString(make([]byte, 65)),
		"67 bytes":             "urn:eris:" + base32Encoding.EncodeToString(make([]byte, 67)),
		"control characters":   "urn:eris:\x1b[31m" + body[5:],
		"another name's start": "urn:er",
	} {
		c, err := ParseURN(urn)
		if err == nil {
			t.Errorf("%s: %q parsed as %v", name, urn, c)
			continue
		}
		if c != (ReadCapability{}) {
			t.Errorf("%s: returned a capability with the error", name)
		}
		if strings.ContainsAny(err.Error(), "\x1b\r\n") || len(err.Error()) > 300 {
			t.Errorf("%s: error %q is not fit to be shown", name, err)
		}
		if strings.Contains(err.Error(), body[40:60]) {
			t.Errorf("%s: error %q quotes a secret", name, err)
		}
	}
}

func TestReadCapabilityBinary(t *testing.T) {
	for _, size := range bothSizes {
		for level := range 256 {
			c := ReadCapability{BlockSize: size, Level: level}
			copy(c.Root[:], randomContent(byte(level), 32))
			copy(c.Key[:], randomContent(byte(level+1), 32))
			code := map[BlockSize]byte{BlockSize1KiB: 0x0a, BlockSize32KiB: 0x0f}[size]
			want := append(append([]byte{code, byte(level)}, c.Root[:]...), c.Key[:]...)

			var back ReadCapability
			backErr := back.UnmarshalBinary(want)
			if level > size.maxLevel() {
				if c.Validate() == nil || backErr == nil || back != (ReadCapability{}) {
					t.Errorf("%v, level %d: no error", size, level)
				}
				continue
			}
			if binary := c.AppendBinary(nil); !bytes.Equal(binary, want) {
				t.Errorf("%v, level %d: %x; want %x", size, level, binary, want)
			}
			if backErr != nil || back != c {
				t.Errorf("%v, level %d: came back as %v, %v", size, level, back, backErr)
			}
			if prefix := map[BlockSize]string{BlockSize1KiB: "urn:eris:BI", BlockSize32KiB: "urn:eris:B4"}[size]; !strings.HasPrefix(c.URN(), prefix) {
				t.Errorf("%v, level %d: %s does not start with %s", size, level, c.URN(), prefix)
			}
		}
	}
	for _, data := range [][]byte{nil, {}, make([]byte, 65), make([]byte, 66), append([]byte{0x0a}, make([]byte, 66)...), append([]byte{0x0b}, make([]byte, 65)...)} {
		var c ReadCapability
		if err := c.UnmarshalBinary(data); err == nil {
			t.Errorf("%x: no error", data)
		}
	}
	for _, c := range []ReadCapability{{}, {BlockSize: 512}, {BlockSize: 1024, Level: -1}, {BlockSize: 1024, Level: 15}, {BlockSize: 32768, Level: 7}} {
		if c.Validate() == nil {
			t.Errorf("%v: no error", c)
		}
	}
}

func TestReferenceText(t *testing.T) {
	ref := Sum([]byte("a block"))
	text, urn := ref.String(), ref.URN()
	if len(text) != 52 || urn != "urn:blake2b:"+text {
		t.Errorf("text %s, URN %s", text, urn)
	}
	if back, err := ParseReference(text); err != nil || back != ref {
		t.Errorf("came back as %v, %v", back, err)
	}
	for _, urn := range []string{urn, "URN:Blake2B:" + text} {
		if back, err := ParseReferenceURN(urn); err != nil || back != ref {
			t.Errorf("%s came back as %v, %v", urn, back, err)
		}
	}
	zero := strings.Repeat("A", 52)
	for _, text := range []string{
		"", zero[:51], zero + "A", zero[:51] + "B", zero[:51] + "P", strings.ToLower(text), zero[:51] + "=", zero[:51] + "\n",
		zero[:51] + "1", "urn:blake2b:" + zero, "\x1b" + zero, strings.Repeat("x", 1000),
	} {
		_, err := ParseReference(text)
		if err == nil {
			t.Errorf("%q parsed", text)
			continue
		}
		if _, err := ParseReferenceURN("urn:blake2b:" + text); err == nil {
			t.Errorf("URN with %q parsed", text)
		}
		if _, err := ParseConvergenceSecret(text); err == nil {
			t.Errorf("%q parsed as a secret", text)
		}
		if strings.ContainsAny(err.Error(), "\x1b\n") || len(err.Error()) > 300 {
			t.Errorf("error %q is not fit to be shown", err)
		}
	}
	if _, err := ParseReferenceURN("urn:eris:" + text); err == nil {
		t.Error("another namespace parsed")
	}
	if secret, err := ParseConvergenceSecret(text); err != nil || Reference(secret) != ref {
		t.Errorf("secret %v, %v", secret, err)
	}
}

func TestBlockSize(t *testing.T) {
	if BlockSize1KiB.Arity() != 16 || BlockSize32KiB.Arity() != 512 || BlockSize1KiB.maxLevel() != 14 || BlockSize32KiB.maxLevel() != 6 {
		t.Error("arity or greatest level")
	}
	for length, want := range map[int64]BlockSize{0: BlockSize1KiB, 16383: BlockSize1KiB, 16384: BlockSize32KiB, 1 << 40: BlockSize32KiB} {
		if got := BlockSizeFor(length); got != want {
			t.Errorf("block size for %d bytes: %v", length, got)
		}
	}
	if BlockSize1KiB.String() != "1KiB" || BlockSize32KiB.String() != "32KiB" || BlockSize(7).String() != "7 bytes" || BlockSize(0).Valid() {
		t.Error("text or validity of block sizes")
	}
}

// There is but one text for any bytes, whatever their number.
func TestBase32(t *testing.T) {
	for n := range 80 {
		b, back := randomContent(byte(n), n), make([]byte, n)
		text := base32Encoding.EncodeToString(b)
		if err := decodeBase32(back, text); err != nil || !bytes.Equal(back, b) {
			t.Fatalf("%s came back as %x, %v", text, back, err)
		}
		for i := range text {
			for c := range 256 {
				other := []byte(text)
				other[i] = byte(c)
				if err := decodeBase32(back, other); err == nil && base32Encoding.EncodeToString(back) != string(other) {
					t.Fatalf("%q is accepted as %x", other, back)
				}
			}
		}
	}
}

func FuzzParseURN(f *testing.F) {
	f.Add(goodURN)
	f.Add(strings.ToLower(goodURN))
	f.Add("urn:erisx2:" + goodURN[9:])
	f.Fuzz(func(t *testing.T, text string) {
		c, err := ParseURN(text)
		if err != nil {
			return
		}
		if c.Validate() != nil || len(text) != 115 || c.URN() != "urn:eris:"+text[9:] {
			t.Errorf("%q parsed as %v", text, c)
		}
		if back, err := ParseURN(c.URN()); err != nil || back != c {
			t.Errorf("%q came back as %v, %v", text, back, err)
		}
	})
}
