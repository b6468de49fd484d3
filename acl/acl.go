// SPDX-License-Identifier: GPL-3.0-or-later

// Package acl decides whose word is taken for what a store item contains. It reads the
// access-control list of Guix (usually /etc/guix/acl), verifies the signatures of narinfos against
// it, and makes such signatures. Start with [ParseACL] and [ACL.Verify], or with [ParseSigningKey]
// and [SigningKey.Sign]. Keys, signatures and the list itself are s-expressions.
//
// What it is given is bounded in size before anything is allocated for it. Signatures are ECDSA
// over the curve edwards25519 (not EdDSA) or RSA, both with SHA-256: what `guix archive
// --generate-key` has made since it exists (Guix, guix/pki.scm).
package acl

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
)

// ACL is an access-control list: the public keys whose signatures count, none if it is the zero one
// or nil. It never changes and can be used by several goroutines at once.
type ACL struct{ keys []*PublicKey }

// NewACL returns the list of the given keys; a key that is given twice is listed once.
func NewACL(keys ...*PublicKey) *ACL {
	a := &ACL{}
	for _, k := range keys {
		if !a.Contains(k) {
			a.keys = append(a.keys, k)
		}
	}
	return a
}

// ParseACL parses the text of an ACL file, (acl (entry KEY (tag (guix import))) …) with each KEY of
// the form (public-key …), which need not be usable. It fails if a single entry has another form: a
// list that is partly understood must not be acted upon (Guix, guix/pki.scm: acl->public-keys).
func ParseACL(text []byte) (*ACL, error) {
	s, err := parseFile(text)
	if err != nil {
		return nil, fmt.Errorf("acl: %w", err)
	}
	entries, ok := s.named("acl")
	if !ok {
		return nil, errors.New("acl: the list does not start with \"acl\"")
	}
	var keys []*PublicKey
	for i, entry := range entries {
		key, err := parseEntry(entry)
		if err != nil {
			return nil, fmt.Errorf("acl: entry %d: %w", i+1, err)
		}
		keys = append(keys, key)
	}
	return NewACL(keys...), nil
}

// importTag is the only permission that Guix knows.
var importTag = list("tag", field("guix", "import"))

func parseEntry(entry sexp) (*PublicKey, error) {
	if _, ok := entry.named("entry"); !ok {
		return nil, errors.New("the list does not start with \"entry\"")
	}
	key := entry.at(1)
	if _, ok := key.named("public-key"); !ok {
		return nil, errors.New("no list \"public-key\" follows \"entry\"")
	}
	if !entry.at(2).equal(importTag) {
		return nil, errors.New("(tag (guix import)) does not follow the key")
	}
	if len(entry.list) > 3 {
		return nil, errors.New("something follows the tag")
	}
	return newPublicKey(key), nil
}

// ReadACL returns the list that applies on a machine, by functions that read its files acl and
// signing-key.pub: without a list, the machine's own key is authorised, and without that none. What
// the functions return wraps [fs.ErrNotExist] if there is no such file; other errors, and those of
// [ParseACL] and [ParsePublicKey], are returned. (Guix, guix/pki.scm: ensure-acl, which would also
// write the file.)
func ReadACL(list, ownKey func() ([]byte, error)) (*ACL, error) {
	text, err := list()
	if err == nil {
		return ParseACL(text)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if text, err = ownKey(); errors.Is(err, fs.ErrNotExist) {
		return NewACL(), nil
	} else if err != nil {
		return nil, err
	}
	k, err := ParsePublicKey(text)
	if err != nil {
		return nil, err
	}
	return NewACL(k), nil
}

// Keys returns the keys of the list, in its order. They must not be changed.
func (a *ACL) Keys() []*PublicKey {
	if a == nil {
		return nil
	}
	return slices.Clip(a.keys)
}

// Contains reports whether the list contains the key k.
func (a *ACL) Contains(k *PublicKey) bool {
	return a.lookup(k.sexp) != nil
}

// lookup returns the key of the list that is the expression s, or nil.
func (a *ACL) lookup(s sexp) *PublicKey {
	for _, k := range a.Keys() {
		if k.sexp.equal(s) {
			return k
		}
	}
	return nil
}

// Text returns the list as Guix writes it to the ACL file.
func (a *ACL) Text() string {
	var entries []sexp
	for _, k := range a.Keys() {
		entries = append(entries, list("entry", k.sexp, importTag))
	}
	return list("acl", entries...).String()
}
