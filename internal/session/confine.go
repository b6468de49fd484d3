// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"os"
	"path/filepath"
	"slices"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/confine"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
)

// systemFiles are what the libraries of Go read: certificates, names of hosts and servers of names,
// time zones, and what the kernel says of this process and of control groups. It is all of /etc,
// because what is there is replaced by new files while helpers run, and Landlock, whose rules are
// about files and not about their names, could allow only those that are there at the start. Below
// /run are keys of services, and sessions of users.
var systemFiles = []string{
	"/etc", "/run/systemd/resolve", "/run/NetworkManager", "/run/resolvconf", "/usr/share", "/usr/local/share",
	"/var/lib/ca-certificates", "/proc", "/sys", "/dev/null", "/dev/urandom",
}

// Confines reports whether helpers confine themselves.
func (s *Settings) Confines() bool { return s.file.Confine }

// confine confines this process before it reads what servers send. The destination is that of the
// first request, which is the daemon's word; all others of the daemon are in the store.
func (s *Settings) confine(destination string) {
	if !s.Confines() {
		return
	}
	if err := confine.Process(s.usedFiles(destination)); err != nil && (s.verbose || s.file.Verbose) {
		s.log.Warnf("%v", err)
	}
}

func (s *Settings) usedFiles(destination string) confine.Paths {
	paths := confine.Paths{
		Write: []string{s.Store},
		Read:  append(slices.Clone(systemFiles), settings.Directory(), settings.StateDirectory(), filepath.Dir(settings.DatabaseFile()), filepath.Dir(s.KeysFile())),
	}
	if destination != "" {
		paths.Write = append(paths.Write, filepath.Dir(destination))
	}
	if s.kept != "" {
		paths.Write = append(paths.Write, s.kept)
	}
	// Where the names of these are links to is not known beforehand. What is in /etc may be read.
	for _, file := range []string{"/etc/resolv.conf", "/etc/hosts", os.Getenv("SSL_CERT_FILE"), os.Getenv("SSL_CERT_DIR")} {
		if file == "" {
			continue // which would be the current directory
		}
		if file, err := filepath.EvalSymlinks(file); err == nil && !strings.HasPrefix(file, "/etc/") {
			paths.Read = append(paths.Read, file, filepath.Dir(file))
		}
	}
	for _, url := range s.ServerURLs() {
		directories := mirror.LocalDirectories(url)
		if directories != nil && s.publicFiles() == nil {
			// What the administrator has named may have links to anywhere.
			directories = []string{"/"}
		}
		paths.Read = append(paths.Read, directories...)
	}
	for _, text := range settings.StoreURLs(s.stores, s.file) {
		u, err := storeurl.Parse(text)
		switch {
		case err != nil:
		case u.Scheme == "file":
			paths.Write = append(paths.Write, u.Path)
		case u.Scheme == "dump":
			paths.Write = append(paths.Write, filepath.Dir(u.Path))
		}
	}
	return paths
}
