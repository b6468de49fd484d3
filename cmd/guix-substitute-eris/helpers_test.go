// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bytes"
	"crypto/sha256"
	"os"
	"path/filepath"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

var must = testhelp.Must

// writeFiles writes files, and makes the directories that they are in.
func writeFiles[T string | []byte](t testing.TB, directory string, files map[string]T) {
	t.Helper()
	for name, contents := range files {
		name = filepath.Join(directory, name)
		must(t, os.MkdirAll(filepath.Dir(name), 0o755))
		must(t, os.WriteFile(name, []byte(contents), 0o644))
	}
}

// makeWritable has what was restored be removed by others.
func makeWritable(root string) {
	filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			os.Chmod(path, 0o755)
		}
		return nil
	})
}

// archiveOf returns the nar of a tree.
func archiveOf(t testing.TB, tree string) []byte {
	t.Helper()
	var b bytes.Buffer
	_, err := nar.Write(&b, nar.NewTree(tree))
	must(t, err)
	return b.Bytes()
}

// checkTree checks the hash of a tree.
func checkTree(t *testing.T, path, want string) {
	t.Helper()
	sum, _, err := nar.HashTree(t.Context(), path)
	if got := hashText(sum); err != nil || got != want {
		t.Errorf("%s has the hash %s instead of %s, error %v", path, got, want, err)
	}
}

// signedNarinfo returns the text of a narinfo, with a signature and URLs of nars.
func signedNarinfo(t testing.TB, key *acl.SigningKey, n *narinfo.Narinfo, urls ...narinfo.URL) string {
	t.Helper()
	part, err := narinfo.SignedPart(n)
	must(t, err)
	signature, err := key.Sign(sha256.Sum256([]byte(part)), "x")
	must(t, err)
	text, err := narinfo.Text(part, signature, urls)
	must(t, err)
	return text
}

// machineEnvironment is that of helpers on a machine whose store, settings and state are in a
// directory, and made there unless they exist, with the options that the daemon has.
func machineEnvironment(t testing.TB, directory, options string) []string {
	t.Helper()
	for _, name := range []string{"store", "etc", "state", "home"} {
		must(t, os.MkdirAll(filepath.Join(directory, name), 0o755))
	}
	return []string{
		"PATH=" + os.Getenv("PATH"), "TESTSCRIPT_COMMAND=" + theProgram, "HOME=" + directory + "/home", "XDG_CACHE_HOME=" + directory + "/state/cache",
		"GUIX_SUBSTITUTE_ERIS_SYSTEM_ROOT=" + directory,
		"NIX_STORE_DIR=" + directory + "/store", "GUIX_CONFIGURATION_DIRECTORY=" + directory + "/etc", "GUIX_STATE_DIRECTORY=" + directory + "/state",
		"_NIX_OPTIONS=discover=false\nprint-extended-build-trace=1\n" + options,
	}
}
