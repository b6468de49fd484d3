// SPDX-License-Identifier: GPL-3.0-or-later

package setup

import (
	"errors"
	"fmt"
	"io/fs"
	"reflect"
	"regexp"
	"slices"

	"github.com/BurntSushi/toml"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
)

const (
	configurationFile = "/etc/guix/substitute-eris.toml"
	aclFile           = "/etc/guix/acl"
	publicKeyFile     = "/etc/guix/signing-key.pub"
)

// Use returns the steps that have substitutes come from a server: its URL and those of its block
// stores come first in the configuration, and its key is authorised unless it is nil. What is so
// already needs no step.
func (s *System) Use(server string, stores []string, key *acl.PublicKey) (steps []Step, err error) {
	if s.GuixSystem() {
		return nil, ErrGuixSystem
	}
	if key != nil {
		step, err := s.authorise(key)
		if err != nil {
			return nil, err
		}
		if step.Path != "" {
			steps = append(steps, step)
		}
	}
	entries := [][2]string{{"substitute-urls", server}}
	for _, store := range stores {
		entries = append(entries, [2]string{"eris-stores", store})
	}
	if steps, err = s.configure(steps, entries...); err != nil {
		return nil, err
	}
	return s.planned(steps)
}

// authorise adds a key to the access control list. A list that is not wholly understood stays as it
// is: no key of it may get lost.
func (s *System) authorise(key *acl.PublicKey) (Step, error) {
	read := func(path string) func() ([]byte, error) { return func() ([]byte, error) { return s.read(path) } }
	list, err := acl.ReadACL(read(aclFile), read(publicKeyFile))
	if err != nil {
		return Step{}, fmt.Errorf("the key cannot be added to %s: %w", aclFile, err)
	}
	if list.Contains(key) {
		return Step{}, nil
	}
	return Step{Path: aclFile, Text: []byte(acl.NewACL(append(list.Keys(), key)...).Text()), Mode: 0o644}, nil
}

// Authorised reports whether the access control list has a key. A list that cannot be read has
// none.
func (s *System) Authorised(key *acl.PublicKey) bool {
	step, err := s.authorise(key)
	return err == nil && step.Path == ""
}

// configure adds a step that puts texts first in lists of the configuration file, which need not
// exist, unless they are there: pairs of a setting and a text.
func (s *System) configure(steps []Step, entries ...[2]string) ([]Step, error) {
	old, err := s.read(configurationFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	text := old
	for _, e := range entries {
		if text, err = addToList(text, e[0], e[1]); err != nil {
			return nil, fmt.Errorf("%s: %w", configurationFile, err)
		}
	}
	if string(text) != string(old) {
		steps = append(steps, Step{Path: configurationFile, Text: text, Mode: 0o644})
	}
	return steps, nil
}

// addToList puts a text first in a list of a TOML file, unless that is to be none, and leaves
// everything else, comments among it, as it is.
func addToList(text []byte, setting, value string) ([]byte, error) {
	want, got := map[string]any{}, map[string]any{}
	if err := toml.Unmarshal(text, &want); err != nil {
		return nil, err
	}
	old, _ := want[setting].([]any)
	if slices.Contains(old, any(value)) || slices.Contains(old, any("none")) {
		return text, nil
	}
	var changed []byte
	if at := regexp.MustCompile(`(?m)^[ \t]*` + setting + `[ \t]*=[ \t]*\[`).FindIndex(text); at != nil {
		changed = slices.Concat(text[:at[1]], []byte(`"`+value+`", `), text[at[1]:])
	} else {
		changed = slices.Clone(text)
		if len(text) > 0 && text[len(text)-1] != '\n' {
			changed = append(changed, '\n')
		}
		changed = append(changed, setting+` = ["`+value+"\"]\n"...)
	}
	want[setting] = append([]any{value}, old...)
	if toml.Unmarshal(changed, &got) != nil || !reflect.DeepEqual(want, got) {
		return nil, fmt.Errorf("add %q to the list %q by hand", value, setting)
	}
	return changed, nil
}
