// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/BurntSushi/toml"
)

// configuration is the configuration file. Everything in it can be left out.
type configuration struct {
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
	// AheadItems and AheadBytes (like "512MiB") bound what is substituted before the daemon asks
	// for it; 0 items is nothing.
	AheadItems *int   `toml:"ahead-items"`
	AheadBytes string `toml:"ahead-bytes"`
	// Confine is whether the helper gives up access to what it does not need; it does by default.
	Confine *bool `toml:"confine"`
}

// maxConfiguration bounds the length of the configuration file in bytes.
const maxConfiguration = 1 << 20

// configurationFile is the name of the configuration file.
func configurationFile() string {
	return filepath.Join(configurationDirectory(), "substitute-eris.toml")
}

// readConfiguration reads the configuration file; there need not be one. With an error, what it
// returns is as if there were none.
func readConfiguration() (configuration, error) {
	var c configuration
	name := configurationFile()
	text, err := readLimited(name, maxConfiguration)
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	} else if err != nil {
		return c, fmt.Errorf("configuration ignored: %w", err)
	}
	meta, err := toml.Decode(string(text), &c)
	if err != nil {
		return configuration{}, fmt.Errorf("configuration ignored: %s: %s", name, plain(err))
	}
	if undecoded := meta.Undecoded(); len(undecoded) > 0 {
		return c, fmt.Errorf("%s: %s", name, unknown("setting", undecoded[0].String(), settingNames()))
	}
	return c, nil
}

// Directories and files as Guix finds them (Guix, guix/config.scm).

func storeDirectory() string { return directoryFrom("NIX_STORE_DIR", "/gnu/store") }

func stateDirectory() string { return directoryFrom("GUIX_STATE_DIRECTORY", "/var/guix") }

func configurationDirectory() string {
	return directoryFrom("GUIX_CONFIGURATION_DIRECTORY", "/etc/guix")
}

// cacheDirectory returns the directory of what servers keep, for the system or for a user.
func cacheDirectory(name string) (string, error) {
	base := "/var/cache"
	if os.Geteuid() != 0 {
		var err error
		if base, err = os.UserCacheDir(); err != nil {
			return "", err
		}
	}
	return filepath.Join(base, "guix-substitute-eris", name), nil
}

func directoryFrom(variable, fallback string) string {
	if d := os.Getenv(variable); d != "" {
		return filepath.Clean(d)
	}
	return fallback
}
