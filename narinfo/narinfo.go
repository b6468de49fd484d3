// SPDX-License-Identifier: GPL-3.0-or-later

// Package narinfo reads and writes narinfos, the small texts in which a substitute server describes
// a store item: what its contents hash to, which items it refers to, and where it can be had. It
// decides which part of such a text a signature covers, and takes from there whatever must be
// trusted.
//
// Start with [Parse], then ask [Narinfo.Authorise]; a narinfo that is not authorised is worth
// something only if it is [Equivalent] to one that is. [SignedPart] and [Text] make a narinfo for
// publication.
//
// The package does no I/O and trusts nothing that it reads. (Guix, guix/narinfo.scm; Guix,
// guix/scripts/publish.scm: narinfo-string.)
package narinfo

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Narinfo describes a store item. [Parse] makes one, and fills in every field; to publish one, fill
// in the fields that [SignedPart] names. A parsed Narinfo that nobody changes can be used by
// several goroutines at once.
type Narinfo struct {
	// StorePath is the absolute file name of the store item. In a parsed narinfo its last component
	// is a valid name of a store item (see [CheckStoreName]); use [Narinfo.CheckItem] for the rest.
	StorePath string
	// NarHash is the hash of the item's nar as it was written: "sha256:" and 52 nix-base32 digits,
	// if [Narinfo.CheckHash] returns nil.
	NarHash string
	// NarDigest is the SHA-256 digest that NarHash denotes.
	NarDigest [sha256.Size]byte
	// NarSize is the length of the nar in bytes, if NarSizeKnown; else it is 0. It need not be
	// true: what counts is NarDigest.
	NarSize      uint64
	NarSizeKnown bool
	// References has the names, without directory, of the store items that this one refers to, as
	// they were written. All are valid.
	References []string
	// Deriver is the name, without directory, of the derivation that built the item; empty if no
	// valid one was given.
	Deriver string
	// URLs has the places of the nar as they were written, unsupported ones included;
	// [Narinfo.PreferredURLs] has those to try. URLs are usually not signed.
	URLs []URL
	// ERIS has the first 16 ERIS read capabilities that the narinfo offers, whatever their text:
	// whoever uses one must find out whether it is one.
	ERIS []ERIS
	// Deltas has the first 16 deltas that make the item of another one and make sense.
	Deltas []Delta
	// Signature is the value of the field Signature, empty if there is none.
	Signature string

	// text is the whole narinfo. The first signed bytes of it are signed, none if the narinfo
	// counts as unsigned.
	text   string
	signed int

	hashError error
}

// CheckHash returns nil if the narinfo has a NarHash that can be compared with what is restored.
// Without one it may say that an item is available, but nothing can be made of it.
func (n *Narinfo) CheckHash() error {
	if n.hashError != nil {
		return fmt.Errorf("narinfo: NarHash: %w", n.hashError)
	}
	return nil
}

// ERIS is a value of the field ERIS, which is meant to be an ERIS read capability as a URN, and may
// say more about what that denotes, separated by single spaces: the form, and its length in bytes.
// (Guix, issue 52555; form and length are ours.)
type ERIS struct {
	URN string
	// Form is "nar." and the name of a compression for a compressed nar of Size bytes. It is empty
	// if nothing is said, as of ERIS-FS and of nars.
	Form string
	Size uint64
	// Signed reports whether the signature covers the field. If not, anyone between the signer and
	// us may have put it there.
	Signed bool
}

// value is the text of the field.
func (e ERIS) value() string {
	if e.Form == "" {
		return e.URN
	}
	return e.URN + " " + e.Form + " " + strconv.FormatUint(e.Size, 10)
}

// Text returns the line for a narinfo, without its end.
func (e ERIS) Text() string { return "ERIS: " + e.value() }

// parseERIS is the reverse of value. Of what is no value of three parts, all is the URN.
func parseERIS(value string) ERIS {
	parts := strings.Split(value, " ")
	if len(parts) == 3 && parts[1] != "" {
		if size, err := strconv.ParseUint(parts[2], 10, 64); err == nil {
			return ERIS{URN: parts[0], Form: parts[1], Size: size}
		}
	}
	return ERIS{URN: value}
}

// Delta is a value of the field Delta, which is ours: where to find what makes the item of another
// one, the base.
type Delta struct {
	// Base is the name of the base, without directory; it is a valid one.
	Base string
	// Size is the length of the delta in bytes, above 0.
	Size uint64
	// URL is where it is: a URN of ERIS, or a URL, which may be relative as that of a nar.
	URL string
	// Signed is that of [ERIS].
	Signed bool
}

// Text returns the line for a narinfo, without its end.
func (d Delta) Text() string {
	return "Delta: " + d.Base + " " + strconv.FormatUint(d.Size, 10) + " " + d.URL
}

// parseDelta reads a value of the field Delta: base, size and URL, separated by single spaces.
func parseDelta(value string) (d Delta, ok bool) {
	parts := strings.Split(value, " ")
	if len(parts) != 3 || CheckStoreName(parts[0]) != nil {
		return Delta{}, false
	}
	size, err := strconv.ParseUint(parts[1], 10, 63)
	if err != nil || size == 0 || parts[2] == "" || len(parts[2]) > maxDeltaURL || badURLByte(parts[2]) >= 0 {
		return Delta{}, false
	}
	return Delta{Base: parts[0], Size: size, URL: parts[2]}, true
}

// ErrUnsigned is the error of [Narinfo.Authorise] for a narinfo that has no signature, or one that
// does not cover StorePath, NarHash and References.
var ErrUnsigned = errors.New("unsigned narinfo")

// Verifier knows whose signatures count; an access-control list is one.
type Verifier interface {
	// Verify returns nil if signature, the value of the field Signature of a narinfo, is a good
	// signature of digest by a key that is authorised.
	Verify(digest [sha256.Size]byte, signature string) error
}

// Text returns the text that was parsed.
func (n *Narinfo) Text() string { return n.text }

// SignedText returns the part of the text that its signature covers, good or not: everything before
// the first occurrence of "Signature:". It reports false if the narinfo counts as unsigned: without
// a signature, if that does not cover StorePath, NarHash and References, or if the first occurrence
// of "Signature:" is not at the start of that very field. (Guix, guix/narinfo.scm: narinfo-sha256.
// The last condition is ours; what fails it might be read in two ways.)
func (n *Narinfo) SignedText() (string, bool) {
	return n.text[:n.signed], n.signed > 0
}

// Authorise returns nil if the text that was parsed bears a signature that keys accepts. Then
// StorePath, NarHash, NarDigest and References, and the capabilities and deltas that are marked as
// signed, are what the signer wrote. Otherwise it returns [ErrUnsigned] or the error of keys.
func (n *Narinfo) Authorise(keys Verifier) error {
	signed, ok := n.SignedText()
	if !ok {
		return ErrUnsigned
	}
	return keys.Verify(sha256.Sum256([]byte(signed)), n.Signature)
}

// Equivalent reports whether two parsed narinfos describe the same store item with the same
// contents: whether StorePath, NarHash, NarSize and References are the same. Where the nar is, its
// compression, the deriver and the signature do not matter. So if one of them is authorised, what
// is found through the other may be used. (Guix, guix/narinfo.scm: equivalent-narinfo?; Guix
// Reference Manual, "Substitute Authentication".)
func Equivalent(n, m *Narinfo) bool { return len(Differences(n, m)) == 0 }

// Differences returns the names of the fields in which two parsed narinfos differ, of those that
// [Equivalent] compares.
func Differences(n, m *Narinfo) (fields []string) {
	for _, f := range []struct {
		name string
		same bool
	}{
		{"StorePath", n.StorePath == m.StorePath},
		{"NarHash", n.NarHash == m.NarHash},
		{"NarSize", n.NarSize == m.NarSize},
		{"References", slices.Equal(n.References, m.References)},
	} {
		if !f.same {
			fields = append(fields, f.name)
		}
	}
	return fields
}
