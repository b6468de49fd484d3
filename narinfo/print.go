// SPDX-License-Identifier: GPL-3.0-or-later

package narinfo

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
)

// SignedPart returns the part of a narinfo that is to be signed, in the layout of `guix publish`:
// the fields StorePath, NarHash, NarSize, one ERIS per element of n.ERIS, References, and Deriver
// if it is not empty, a line each. Its SHA-256 digest is what a signature must be made of; give
// both to [Text].
//
// Of n it uses StorePath, NarDigest, NarSize, ERIS, References and Deriver. It fails if one of them
// is invalid or too long, and if n.NarHash is neither empty nor the hash that n.NarDigest denotes.
// (Guix, guix/scripts/publish.scm: narinfo-string; for ERIS, which stock Guix ignores: Guix, issue
// 52555.)
func SignedPart(n *Narinfo) (string, error) {
	dir, base := cutBase(n.StorePath)
	if !strings.HasPrefix(dir, "/") || badURLByte(dir) >= 0 {
		return "", fmt.Errorf("narinfo: %.300q is not an absolute file name", n.StorePath)
	}
	hash := hashPrefix + nixbase32.EncodeToString(n.NarDigest[:])
	if n.NarHash != "" && n.NarHash != hash {
		return "", fmt.Errorf("narinfo: the hash is both %.300q and %s", n.NarHash, hash)
	}
	if len(n.References) > MaxReferences || len(n.ERIS) > maxERIS {
		return "", fmt.Errorf("narinfo: %d references or %d ERIS capabilities are too many", len(n.References), len(n.ERIS))
	}
	names := append([]string{base}, n.References...)
	if n.Deriver != "" {
		names = append(names, n.Deriver)
	}
	for _, name := range names {
		if err := CheckStoreName(name); err != nil {
			return "", fmt.Errorf("narinfo: %w", err)
		}
	}
	var b strings.Builder
	line := func(name, value string) {
		b.WriteString(name + ": " + value + "\n")
	}
	line("StorePath", n.StorePath)
	line("NarHash", hash)
	line("NarSize", strconv.FormatUint(n.NarSize, 10))
	for _, e := range n.ERIS {
		if e.URN == "" || badURLByte(e.URN+e.Form) >= 0 || strings.Contains(e.value(), signatureField) {
			return "", fmt.Errorf("narinfo: %.300q is not a URN", e.value())
		}
		line("ERIS", e.value())
	}
	line("References", strings.Join(n.References, " "))
	if n.Deriver != "" {
		line("Deriver", n.Deriver)
	}
	if strings.Contains(b.String(), signatureField) {
		return "", fmt.Errorf("narinfo: %.300q must not contain %q", n.StorePath, signatureField)
	}
	return b.String(), nil
}

// Text returns a whole narinfo: what [SignedPart] returned, the field Signature, which covers that,
// unless the signature is empty, and the urls, which it does not cover. It fails if the result is
// not a narinfo that [Parse] reads back as what it was made of: in particular if urls is empty or
// contains one that cannot be used.
func Text(signedPart, signature string, urls []URL) (string, error) {
	if !strings.HasSuffix(signedPart, "\n") {
		return "", errors.New("narinfo: the part to be signed does not end with a line feed")
	}
	var b strings.Builder
	b.WriteString(signedPart)
	if signature != "" {
		b.WriteString("Signature: " + signature + "\n")
	}
	for _, u := range urls {
		if !u.usable() {
			return "", fmt.Errorf("narinfo: the URL %.300q with compression %.300q cannot be used", u.URL, u.Compression)
		}
		b.WriteString(u.Text())
	}
	n, err := Parse([]byte(b.String()))
	if err != nil {
		return "", err
	}
	signed, ok := n.SignedText()
	if n.Signature != signature || ok != (signature != "") || ok && signed != signedPart {
		return "", errors.New("narinfo: the signature would not cover the part that was signed")
	}
	return b.String(), nil
}
