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
		steps = append(steps, step)
	}
	step, err := s.listed("substitute-urls", server)
	for _, store := range stores {
		if err == nil {
			step, err = s.listedIn(step, "eris-stores", store)
		}
	}
	if err != nil {
		return nil, err
	}
	steps = append(steps, step)
	return slices.DeleteFunc(steps, func(s Step) bool { return s.Path == "" }), nil
}

// authorise adds a key to the access control list. A list that is not wholly understood stays as it
// is: no key of it may get lost.
func (s *System) authorise(key *acl.PublicKey) (Step, error) {
	text, err := s.read(aclFile)
	var list *acl.ACL
	switch {
	case err == nil:
		list, err = acl.ParseACL(text)
	case errors.Is(err, fs.ErrNotExist):
		// As Guix has it, the key of the machine is authorised where there is no list.
		own, err2 := s.read(publicKeyFile)
		if err = err2; err == nil || errors.Is(err, fs.ErrNotExist) {
			list, err = acl.DefaultACL(own)
		}
	}
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

// listed returns the step that puts a text first in a list of the configuration file, which need
// not exist.
func (s *System) listed(setting, value string) (Step, error) {
	text, err := s.read(configurationFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Step{}, err
	}
	return s.listedIn(Step{Text: text}, setting, value)
}

// listedIn does the same to the file that a step is about to write; without a path it is to write
// nothing, and its text is that of the file.
func (s *System) listedIn(step Step, setting, value string) (Step, error) {
	text, err := addToList(step.Text, setting, value)
	if err != nil {
		return Step{}, fmt.Errorf("%s: %w", configurationFile, err)
	}
	if string(text) == string(step.Text) {
		return step, nil
	}
	return Step{Path: configurationFile, Text: text, Mode: 0o644}, nil
}

// addToList puts a text first in a list of a TOML file, and leaves everything else, comments among
// it, as it is.
func addToList(text []byte, setting, value string) ([]byte, error) {
	before, old, err := decodeList(text, setting)
	if err != nil || slices.Contains(old, value) {
		return text, err
	}
	byHand := fmt.Errorf("add %q to the list %q by hand", value, setting)
	if !regexp.MustCompile(`^[!#-\[\]-~]+$`).MatchString(value) { // neither quotes nor backslashes
		return nil, byHand
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
	after, list, err := decodeList(changed, setting)
	delete(before, setting)
	delete(after, setting)
	if err != nil || !slices.Equal(list, append([]string{value}, old...)) || !reflect.DeepEqual(before, after) {
		return nil, byHand
	}
	return changed, nil
}

// decodeList returns what a TOML file says, and one list of it.
func decodeList(text []byte, setting string) (all map[string]any, list []string, err error) {
	all = map[string]any{}
	if err := toml.Unmarshal(text, &all); err != nil {
		return nil, nil, err
	}
	values, ok := all[setting].([]any)
	if all[setting] != nil && !ok {
		return nil, nil, fmt.Errorf("%q is no list", setting)
	}
	for _, v := range values {
		item, ok := v.(string)
		if !ok {
			return nil, nil, fmt.Errorf("%q is no list of texts", setting)
		}
		list = append(list, item)
	}
	return all, list, nil
}
