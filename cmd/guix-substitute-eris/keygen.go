// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
)

func keygenCommand() *cobra.Command {
	c := &cobra.Command{
		Short: "make a key pair to sign narinfos with",
		Long: `Make a key pair to sign narinfos with, as "guix archive --generate-key" does. No
file is overwritten.`,
		Args: message.NoArguments,
	}
	public := c.Flags().String("public-key", filepath.Join(settings.Directory(), "signing-key.pub"), "write the public key to `FILE`")
	secret := c.Flags().String("private-key", filepath.Join(settings.Directory(), "signing-key.sec"), "write the private key to `FILE`, which only its owner can read")
	c.RunE = func(*cobra.Command, []string) error {
		if err := keygen(*public, *secret); err != nil {
			return fmt.Errorf("the key pair is not made: %w", err)
		}
		_, err := fmt.Printf("public key:  %s\nprivate key: %s\nWhoever is to trust it: sudo guix archive --authorize < %s\n",
			*public, *secret, filepath.Base(*public))
		return err
	}
	return c
}

func keygen(public, secret string) error {
	for _, name := range []string{public, secret} {
		if _, err := os.Lstat(name); err == nil {
			return fmt.Errorf("%s exists, and others may trust it\nhint: move it away, or name another file by --public-key and --private-key", name)
		}
		directory := filepath.Dir(name)
		_, err := os.Stat(directory)
		if err != nil && directory == filepath.Clean(settings.Directory()) {
			err = os.MkdirAll(directory, 0o755)
		}
		if err != nil {
			return err
		}
	}
	key := acl.GenerateSigningKey()
	options := files.Options{Sync: true, New: true}
	// The private one first: a public key without it is of no use.
	if err := files.Write(secret, 0o400, options, []byte(key.SecretText())); err != nil {
		return err
	}
	if err := files.Write(public, 0o444, options, []byte(key.PublicKey().Text())); err != nil {
		os.Remove(secret) // it would be in the way of the next attempt
		return err
	}
	return os.Chmod(public, 0o444) // whatever the umask: those who publish are other users
}
