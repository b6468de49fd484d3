// SPDX-License-Identifier: GPL-3.0-or-later

package narinfo

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
)

const (
	// hashPartLen is the number of digits that the name of a store item starts with; they encode
	// hashPartBytes bytes.
	hashPartLen   = 32
	hashPartBytes = 20
	// maxNameLen is the longest name of a store item, in bytes.
	maxNameLen = 255
)

// nameChars has the characters that may follow the hash part of a store item.
var nameChars = func() (set [256]bool) {
	for _, c := range []byte("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-._?=") {
		set[c] = true
	}
	return set
}()

// CheckStoreName returns nil if name, given without directory, can be the name of a store item, and
// else an error that contains it: 32 nix-base32 digits, a hyphen, and then one or more of the
// letters and digits of ASCII and of "+-._?=", the first not being a period; no more than 255 bytes
// in all. (Guix, nix/libstore/store-api.cc: checkStoreName; Guix, guix/store.scm:
// store-path-hash-part.)
func CheckStoreName(name string) error {
	if err := checkStoreName(name); err != nil {
		return fmt.Errorf("%.300q is not the name of a store item: %w", name, err)
	}
	return nil
}

func checkStoreName(name string) error {
	if len(name) < hashPartLen+2 {
		return errors.New("it is too short")
	}
	if len(name) > maxNameLen {
		return fmt.Errorf("it is longer than %d bytes", maxNameLen)
	}
	var hash [hashPartBytes]byte
	if err := nixbase32.Decode(hash[:], name[:hashPartLen]); err != nil {
		return err
	}
	if name[hashPartLen] != '-' {
		return errors.New("no hyphen follows the hash")
	}
	return checkNameChars(name[hashPartLen+1:])
}

// checkNameChars checks what may follow the hash in the name of a store item, and is not empty.
func checkNameChars(name string) error {
	if name[0] == '.' {
		return errors.New("it begins with a period")
	}
	for i := range len(name) {
		if !nameChars[name[i]] {
			return fmt.Errorf("the byte %#02x must not be in it", name[i])
		}
	}
	return nil
}

// checkReference returns nil if name can be that of a reference: that of any file directly in the
// store. There need not be a hash in it; the daemon does not look for one, and narinfos without
// occur in the tests of Guix.
func checkReference(name string) error {
	err := checkNameChars(name)
	if err == nil && len(name) > maxNameLen {
		err = fmt.Errorf("it is longer than %d bytes", maxNameLen)
	}
	if err != nil {
		return fmt.Errorf("%.300q is not the name of a store item: %w", name, err)
	}
	return nil
}

// CheckStorePath returns nil if path is the file name of a store item: storeDir, which is an
// absolute file name without a slash at its end, a slash, and a name that passes [CheckStoreName].
// Otherwise it returns an error that contains path.
func CheckStorePath(storeDir, path string) error {
	dir, base := cutBase(path)
	if dir != storeDir {
		return fmt.Errorf("%.300q is not in the store directory %.300q", path, storeDir)
	}
	return CheckStoreName(base)
}

// HashPart returns the part of the file name of a store item by which servers know its narinfo: the
// first 32 characters of its last component. It fails as [CheckStorePath] does.
func HashPart(storeDir, path string) (string, error) {
	if err := CheckStorePath(storeDir, path); err != nil {
		return "", err
	}
	_, base := cutBase(path)
	return base[:hashPartLen], nil
}

// cutBase splits path at its last slash; without one, dir is empty.
func cutBase(path string) (dir, base string) {
	i := strings.LastIndexByte(path, '/')
	return path[:max(i, 0)], path[i+1:]
}

// CheckItem returns nil if the narinfo is about item, and item is in the store directory storeDir
// (see [CheckStorePath]). A narinfo must pass this before anything else is made of it: a server may
// well answer with one that somebody authorised signed for another item.
func (n *Narinfo) CheckItem(storeDir, item string) error {
	if err := CheckStorePath(storeDir, item); err != nil {
		return err
	}
	if n.StorePath != item {
		return fmt.Errorf("the narinfo is about %.300q instead of %.300q", n.StorePath, item)
	}
	return nil
}

// FixedOutputName returns the name in the store of a file that is known by its SHA-256 digest, as
// downloaded sources are (Guix, guix/store.scm: fixed-output-path; nix/libstore/store-api.cc:
// makeFixedOutputPath).
func FixedOutputName(storeDir, name string, digest [sha256.Size]byte) string {
	inner := sha256.Sum256(fmt.Appendf(nil, "fixed:out:sha256:%x:", digest))
	outer := sha256.Sum256(fmt.Appendf(nil, "output:out:sha256:%s:%s:%s", hex.EncodeToString(inner[:]), storeDir, name))
	var short [20]byte
	for i, b := range outer {
		short[i%len(short)] ^= b
	}
	return nixbase32.EncodeToString(short[:]) + "-" + name
}

// UnversionedName is the name of an item, as [CheckStoreName] accepts it, without hash and version,
// as far as that begins with a digit: what it has in common with its other versions. The name of an
// output stays.
func UnversionedName(name string) string {
	var kept []string
	for _, part := range strings.Split(name[hashPartLen+1:], "-") {
		if part == "" || part[0] < '0' || part[0] > '9' {
			kept = append(kept, part)
		}
	}
	return strings.Join(kept, "-")
}
