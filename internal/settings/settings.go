// SPDX-License-Identifier: GPL-3.0-or-later

// Package settings reads the configuration file, finds the directories of Guix and of this program,
// and opens block stores by their URLs.
package settings

import (
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/bytesize"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"github.com/BurntSushi/toml"
)

// File is the configuration file. [Defaults] says what the settings mean.
type File struct {
	Guix                 string   `toml:"guix"`
	NarinfoConnections   int      `toml:"narinfo-connections"`
	Stores               []string `toml:"eris-stores"`
	SubstituteURLs       []string `toml:"substitute-urls"`
	Policy               string   `toml:"policy"`
	CacheSize            string   `toml:"cache-size"`
	CacheDirectory       string   `toml:"cache-directory"`
	LimitRate            string   `toml:"limit-rate"`
	Verbose              bool     `toml:"verbose"`
	UnsignedCapabilities bool     `toml:"unsigned-capabilities"`
	Reuse                bool     `toml:"reuse"`
	SeedNars             bool     `toml:"seed-nars"`
	AheadItems           int      `toml:"ahead-items"`
	AheadBytes           string   `toml:"ahead-bytes"`
	DiscoverStores       *bool    `toml:"discover-stores"` // nil is as the daemon has it
	Confine              bool     `toml:"confine"`
}

// Defaults is a configuration file with all settings as they are by default, each with a comment
// that says what it means. The manual is made of it.
//
//go:embed substitute-eris.toml
var Defaults string

// Default returns what [Defaults] says.
func Default() (c File) {
	if _, err := toml.Decode(Defaults, &c); err != nil {
		panic(err) // it is part of the program
	}
	return c
}

// maxConfiguration bounds the length of the configuration file in bytes.
const maxConfiguration = 1 << 20

// FileName is the name of the configuration file.
func FileName() string {
	return filepath.Join(Directory(), "substitute-eris.toml")
}

// Read reads the configuration file; there need not be one. With an error, what is wrong is as if
// it were not there, or, where that cannot be told, all of it.
func Read() (File, error) {
	c := Default()
	name := FileName()
	text, err := files.ReadRegular(name, maxConfiguration)
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	} else if err != nil {
		return c, fmt.Errorf("configuration ignored: %s", message.Plain(err))
	}
	meta, err := toml.Decode(string(text), &c)
	if err != nil {
		return Default(), fmt.Errorf("configuration ignored: %s: %s", name, message.Plain(err))
	}
	wrong := c.correct()
	if undecoded := meta.Undecoded(); len(undecoded) > 0 {
		wrong = append(wrong, message.Unknown("setting", undecoded[0].String(), settingNames()))
	}
	if len(wrong) > 0 {
		return c, fmt.Errorf("%s: %s", name, strings.Join(wrong, "; "))
	}
	return c, nil
}

// correct has what makes no sense be as it is by default, and says it.
func (c *File) correct() (wrong []string) {
	usual := Default()
	look := func(name string, text *string, usual string, parse func(text string) (int64, error)) {
		if *text == usual {
			return
		}
		if _, err := parse(*text); err != nil {
			wrong = append(wrong, fmt.Sprintf("%s: %v", name, err))
			*text = usual
		}
	}
	look("cache-size", &c.CacheSize, usual.CacheSize, bytesize.Parse)
	look("ahead-bytes", &c.AheadBytes, usual.AheadBytes, bytesize.Parse)
	look("limit-rate", &c.LimitRate, usual.LimitRate, bytesize.ParseRate)
	if c.CacheDirectory != "" && !filepath.IsAbs(c.CacheDirectory) {
		wrong = append(wrong, fmt.Sprintf("cache-directory: %q does not begin with /", c.CacheDirectory))
		c.CacheDirectory = ""
	}
	return wrong
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

func settingNames() (names []string) {
	for _, f := range reflect.VisibleFields(reflect.TypeFor[File]()) {
		names = append(names, f.Tag.Get("toml"))
	}
	return names
}
