// SPDX-License-Identifier: GPL-3.0-or-later

package serving

import (
	"cmp"
	"os"
	"path/filepath"

	"github.com/spf13/pflag"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
)

// A Signer makes signed narinfos of the items in the daemon's database, for other commands than
// "publish".
type Signer struct{ s publishSettings }

// Flags defines the options that name the key pair.
func (s *Signer) Flags(f *pflag.FlagSet) {
	f.StringVar(&s.s.publicKey, "public-key", filepath.Join(settings.Directory(), "signing-key.pub"), "for --sign, the key that others authorise is in `FILE`")
	f.StringVar(&s.s.privateKey, "private-key", filepath.Join(settings.Directory(), "signing-key.sec"), "for --sign, sign with the key in `FILE`")
}

// Open reads the key pair and opens the database. The store directory is as in
// [publish.ServerOptions], and so is root. Unless there is an error, closeItems must be called at
// the end.
func (s *Signer) Open(store, root string) (server *publish.Server, key *acl.PublicKey, closeItems func(), err error) {
	pair, err := s.s.key()
	if err != nil {
		return nil, nil, nil, err
	}
	s.s.store, s.s.database = store, settings.DatabaseFile()
	s.s.instead = "; --sign is for what the guix-daemon of this machine has"
	var opened closers
	items, err := s.s.itemSettings.open(&opened)
	if err != nil {
		return nil, nil, nil, err
	}
	host, _ := os.Hostname()
	server, err = publish.NewServer(publish.ServerOptions{
		StoreDir: store, Root: root, Items: items, Key: pair, Host: cmp.Or(host, "localhost"), Compressions: []string{"none"}, Log: message.Log,
	})
	if err != nil {
		opened.close()
	}
	return server, pair.PublicKey(), opened.close, err
}
