// SPDX-License-Identifier: GPL-3.0-or-later

package serving

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"strconv"
	"syscall"

	"github.com/spf13/cobra"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
)

// A runAs is the user that a server runs as, who may be named or numbered; empty is who starts it,
// but not root.
type runAs string

func (r *runAs) flag(c *cobra.Command) {
	c.Flags().StringVarP((*string)(r), "user", "u", "", "run as `USER`, once what needs rights has been opened; only \"root\" runs as root")
}

// check refuses to run as root where that is not said, and as who does not exist.
func (r runAs) check(command string) error {
	if r == "" && os.Geteuid() == 0 {
		return message.Usage("%s parses what strangers send, and does not run as root unasked"+
			"\nhint: say --user=USER, or User= in its systemd unit; the directories where it keeps things must belong to that user. --user=root means root", command)
	}
	_, err := r.lookUp()
	return err
}

// lookUp returns the user, nil for who it is already.
func (r runAs) lookUp() (*user.User, error) {
	if r == "" {
		return nil, nil
	}
	u, err := user.Lookup(string(r))
	if _, notNumber := strconv.Atoi(string(r)); err != nil && notNumber == nil {
		u, err = user.LookupId(string(r))
		if r == runAs(strconv.Itoa(os.Geteuid())) {
			return nil, nil // it need not have a name
		}
	}
	if err != nil {
		return nil, fmt.Errorf("there is no user %q", string(r))
	}
	if u.Uid == strconv.Itoa(os.Geteuid()) {
		return nil, nil
	}
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("only root can start what runs as the user %q", string(r))
	}
	return u, nil
}

// explain adds to the error of a server that has become the user what is to be done.
func (r runAs) explain(err error) error {
	if r == "" || r == "root" || !errors.Is(err, fs.ErrPermission) {
		return err
	}
	return fmt.Errorf("%w\nhint: what it keeps must belong to its user: sudo install -d -o %s DIRECTORY", err, r)
}

// become makes the process, with all its threads, that of the user, with the groups of that user.
// What is kept in the usual directories stays in those of the system.
func (r runAs) become() error {
	u, err := r.lookUp()
	if err != nil || u == nil {
		return err
	}
	var groups []int
	names, err := u.GroupIds()
	for _, name := range names {
		id, err2 := strconv.Atoi(name)
		groups, err = append(groups, id), errors.Join(err, err2)
	}
	uid, err2 := strconv.Atoi(u.Uid)
	gid, err3 := strconv.Atoi(u.Gid)
	if err = errors.Join(err, err2, err3); err == nil {
		err = errors.Join(os.Setenv("HOME", u.HomeDir), os.Setenv("XDG_CACHE_HOME", "/var/cache"),
			syscall.Setgroups(groups), syscall.Setgid(gid), syscall.Setuid(uid))
	}
	if err != nil {
		return fmt.Errorf("becoming the user %q: %w", string(r), err)
	}
	return nil
}
