// SPDX-License-Identifier: GPL-3.0-or-later

// Package settings reads the configuration file, finds the directories of Guix and of this program,
// and opens block stores by their URLs.
package settings

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"github.com/BurntSushi/toml"
)

// File is the configuration file. Everything in it can be left out.
type File struct {
	// Guix is the absolute file name of the real guix.
	Guix string `toml:"guix"`
	// NarinfoConnections is how many connections to one server may ask for narinfos at the same
	// time.
	NarinfoConnections int `toml:"narinfo-connections"`
	// Stores are the URLs of the block stores, in the order in which they are asked.
	Stores []string `toml:"eris-stores"`
	// Policy is fastest, eris-first, http-first, eris-only or http-only.
	Policy string `toml:"policy"`
	// CacheSize is how many bytes of blocks are kept for later, like "2GiB"; "0" is none.
	// CacheDirectory is where; it holds narinfos, too.
	CacheSize      string `toml:"cache-size"`
	CacheDirectory string `toml:"cache-directory"`
	// LimitRate bounds the bytes per second of blocks and nars, like "2MiB".
	LimitRate string `toml:"limit-rate"`
	// Verbose shows what is expected of stores and servers, and what came of it.
	Verbose bool `toml:"verbose"`
	// UnsignedCapabilities is whether read capabilities that no signature covers are used; they are
	// by default.
	UnsignedCapabilities *bool `toml:"unsigned-capabilities"`
	// Reuse is whether items are made of older ones in the store where that may do; they are by
	// default.
	Reuse *bool `toml:"reuse"`
	// SeedNars is whether compressed nars that were fetched are put into the store on this machine.
	SeedNars bool `toml:"seed-nars"`
	// AheadItems and AheadBytes (like "512MiB") bound what is substituted before the daemon asks
	// for it; 0 items is nothing.
	AheadItems *int   `toml:"ahead-items"`
	AheadBytes string `toml:"ahead-bytes"`
	// DiscoverStores is whether block stores are looked for on the local network; they are by
	// default, unless the daemon has --discover=no.
	DiscoverStores *bool `toml:"discover-stores"`
	// Confine is whether the helper gives up access to what it does not need; it does by default.
	Confine *bool `toml:"confine"`
}

// maxConfiguration bounds the length of the configuration file in bytes.
const maxConfiguration = 1 << 20

// FileName is the name of the configuration file.
func FileName() string {
	return filepath.Join(Directory(), "substitute-eris.toml")
}

// Read reads the configuration file; there need not be one. With an error, what it
// returns is as if there were none.
func Read() (File, error) {
	var c File
	name := FileName()
	text, err := files.ReadLimited(name, maxConfiguration)
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	} else if err != nil {
		return c, fmt.Errorf("configuration ignored: %w", err)
	}
	meta, err := toml.Decode(string(text), &c)
	if err != nil {
		return File{}, fmt.Errorf("configuration ignored: %s: %s", name, message.Plain(err))
	}
	if undecoded := meta.Undecoded(); len(undecoded) > 0 {
		return c, fmt.Errorf("%s: %s", name, message.Unknown("setting", undecoded[0].String(), settingNames()))
	}
	return c, nil
}

// StoreDirectory is the store, as Guix finds it (Guix, guix/config.scm).
func StoreDirectory() string { return directoryFrom("NIX_STORE_DIR", "/gnu/store") }

// StateDirectory has the state of Guix, found in the same way.
func StateDirectory() string { return directoryFrom("GUIX_STATE_DIRECTORY", "/var/guix") }

// Directory has the configuration of Guix, found in the same way.
func Directory() string {
	return directoryFrom("GUIX_CONFIGURATION_DIRECTORY", "/etc/guix")
}

// CacheDirectory returns the directory of what servers keep, for the system or for a user.
func CacheDirectory(name string) (string, error) {
	base := "/var/cache"
	if os.Geteuid() != 0 {
		var err error
		if base, err = os.UserCacheDir(); err != nil {
			return "", err
		}
	}
	return filepath.Join(base, "guix-substitute-eris", name), nil
}

// DatabaseFile is the daemon's database.
func DatabaseFile() string {
	return filepath.Join(directoryFrom("GUIX_DATABASE_DIRECTORY", filepath.Join(StateDirectory(), "db")), "db.sqlite")
}

func directoryFrom(variable, fallback string) string {
	if d := os.Getenv(variable); d != "" {
		return filepath.Clean(d)
	}
	return fallback
}

// settingNames are the settings of the configuration file.
func settingNames() (names []string) {
	for _, f := range reflect.VisibleFields(reflect.TypeFor[File]()) {
		names = append(names, f.Tag.Get("toml"))
	}
	return names
}
