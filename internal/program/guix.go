// SPDX-License-Identifier: GPL-3.0-or-later

// Package program is what this program knows of itself, and of the guix in place of which it may
// run.
package program

import (
	"context"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
	"golang.org/x/sys/unix"
)

// guixVariable is the environment variable that names the real guix.
const guixVariable = "GUIX_SUBSTITUTE_ERIS_GUIX"

// handedVariable is the environment variable that lists the programs that a command has been handed
// to as the real guix, so that one that calls this program again is handed nothing twice.
const handedVariable = "GUIX_SUBSTITUTE_ERIS_HANDED"

var usualGuix = []string{
	"/run/current-system/profile/bin/guix",
	"/var/guix/profiles/per-user/root/current-guix/bin/guix",
	"/usr/local/bin/guix",
	"/usr/bin/guix",
}

// IsGuix reports whether the program runs in place of guix: it is called by that name, or in the
// environment of guix-daemon, which tells its helpers its options or, in way B, has the variable
// GUIX.
func IsGuix() bool {
	_, helper := os.LookupEnv("_NIX_OPTIONS")
	return helper || filepath.Base(os.Args[0]) == "guix" || os.Getenv("GUIX") != "" || os.Getenv(guixVariable) != ""
}

// Guix hands a command of guix to the real guix, which flag names unless it is empty: the daemon
// runs several through the program that it takes for guix. Arguments, argv[0] among them,
// environment (but for one variable), working directory and descriptors stay as they are.
func Guix(flag string, args []string) error {
	program, err := RealGuix(flag)
	if err == nil {
		err = handTo(program, args)
	}
	return fmt.Errorf("%q is no command of this program, and handing it to guix failed: %v", args[0], err)
}

// handTo replaces this process by the real guix. It returns only after an error.
func handTo(program string, args []string) error {
	handed := filepath.SplitList(os.Getenv(handedVariable))
	if slices.Contains(handed, program) {
		return fmt.Errorf("%s is not the real guix: it has called this program again (as %s says)", program, handedVariable)
	}
	if err := os.Setenv(handedVariable, strings.Join(append(handed, program), ":")); err != nil {
		return err
	}
	argv := append([]string{os.Args[0]}, args...)
	return &fs.PathError{Op: "cannot run", Path: program, Err: unix.Exec(program, argv, os.Environ())}
}

// RealGuix returns the absolute file name of the real guix, which is never this program. flag names
// it unless it is empty.
func RealGuix(flag string) (string, error) {
	self, err := os.Stat("/proc/self/exe")
	if err != nil {
		return "", fmt.Errorf("cannot tell this program from the real guix: %w", err)
	}
	named, by := flag, "the option --guix"
	if named == "" {
		named, by = os.Getenv(guixVariable), "the environment variable "+guixVariable
	}
	if named == "" {
		file, err := settings.Read()
		if err != nil {
			fmt.Fprintf(os.Stderr, "guix-substitute-eris: warning: %v\n", err)
		}
		named, by = file.Guix, "the configuration file "+settings.FileName()
	}
	if named != "" {
		if !filepath.IsAbs(named) {
			return "", fmt.Errorf("%s names %q, which is no absolute file name", by, named)
		}
		if err := checkGuix(named, self); err != nil {
			return "", fmt.Errorf("%s names %s: %w", by, named, err)
		}
		return named, nil
	}
	for _, path := range usualGuix {
		if checkGuix(path, self) == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("no real guix in the usual places; name it by --guix, by %s or in %s", guixVariable, settings.FileName())
}

// checkGuix returns an error that says why path cannot be the real guix.
func checkGuix(path string, self fs.FileInfo) error {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return err
	case os.SameFile(info, self):
		return errors.New("that is this program itself")
	case !info.Mode().IsRegular() || info.Mode()&0o111 == 0:
		return errors.New("that is not a program")
	case IsOurs(path):
		// Two copies that take each other for guix would run one another for ever.
		return errors.New("that is a copy of this program")
	}
	return nil
}

// IsOurs reports whether path is this program, of whatever version.
func IsOurs(path string) bool {
	other, err := buildinfo.ReadFile(path)
	if err != nil {
		return false // it is not even in Go
	}
	own, ok := debug.ReadBuildInfo()
	return ok && own.Path != "" && other.Path == own.Path
}

// UntilSignal returns a context that ends when the user, the service manager or the end of the
// terminal wants the program to end; the next signal ends it at once.
func UntilSignal() (context.Context, context.CancelFunc) {
	signals := []os.Signal{unix.SIGINT, unix.SIGTERM}
	if !signal.Ignored(unix.SIGHUP) { // one that "nohup" has started outlives the terminal
		signals = append(signals, unix.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), signals...)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}
