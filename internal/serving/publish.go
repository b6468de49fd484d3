// SPDX-License-Identifier: GPL-3.0-or-later

package serving

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/httpserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/admission"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/bytesize"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/lan"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
)

// publishSettings are the options of publish.
type publishSettings struct {
	itemSettings
	listen, annotate      string
	publicKey, privateKey string
	eris                  string // "true", "false", or the URL of the store for blocks
	blocks, cache         string // blocks is this URL, too
	forms                 string
	compressions          []string
	deltas, waitFor       int64 // how many bytes
	ttl, negativeTTL      time.Duration
	logs, narPath         string
	port                  string // empty is usualPort
	workers               int
	advertise             bool
	maxConnections        int
	announce              string
	user                  runAs
	log                   logSettings
}

const usualPort = "8080"

// Publish is the command that serves narinfos and nars.
func Publish() *cobra.Command {
	var s publishSettings
	c := &cobra.Command{
		Short: "serve narinfos with the field ERIS, and nars",
		Long: `Serve the narinfos and nars of the items of a store over HTTP, with ERIS read
capabilities. Or, with --annotate, pass on the narinfos of another server and
add read capabilities to those of items that are in the local store.

Options of "guix publish" have the same meaning here; there is no --repl.`,
		Args: message.NoArguments,
	}
	f := c.Flags()
	f.StringVar(&s.listen, "listen", "", "listen on `HOST`, a name or an address, or on HOST:PORT (default: 127.0.0.1, and all addresses with --advertise)")
	f.FuncP("port", "p", "listen on `PORT`", func(text string) error {
		if _, err := strconv.ParseUint(text, 10, 16); err != nil {
			return errors.New("it must be a number of at most 65535")
		}
		s.port = text
		return nil
	})
	f.Lookup("port").DefValue = usualPort
	s.user.flag(c)
	s.log.flags(c)
	f.BoolVarP(&s.advertise, "advertise", "a", false, "be found on the local network")
	s.itemSettings.flags(f)
	f.StringVar(&s.annotate, "annotate", "", "pass on the narinfos of the server at `URL`")
	f.StringVar(&s.publicKey, "public-key", publicKeyFile(), "the key that others authorise is in `FILE`")
	f.StringVar(&s.privateKey, "private-key", filepath.Join(settings.Directory(), "signing-key.sec"), "sign with the key in `FILE`; \"none\" signs nothing")
	f.StringVar(&s.privateKey, "secret-key", s.privateKey, "the same as --private-key: a `FILE`, or \"none\"")
	f.StringVar(&s.eris, "eris", "false", "publish read capabilities and serve the blocks, made from the files of the items, at this address; or, as --eris=`URL`, the same as --store")
	f.Lookup("eris").NoOptDefVal = "true"
	f.StringVar(&s.blocks, "store", "", "put the blocks into the store at `URL`; with \"none\", and --eris, blocks are neither put nor served")
	f.StringVarP(&s.cache, "cache", "c", "", "keep compressed nars, and what is known of read capabilities, in `DIRECTORY` (default: no nars; capabilities below /var/cache/guix-substitute-eris, or below the cache of a user)")
	f.StringSliceVarP(&s.compressions, "compression", "C", []string{"zstd", "gzip"}, "offer nars as `TYPE`: none, gzip, lzip, zstd, or with a level, like zstd:19; may be given several times")
	f.Func("ttl", "narinfos may be kept for this `TIME`: 36h, 5d or 2w for instance", func(text string) error { return setTime(&s.ttl, text) })
	f.Func("negative-ttl", "that an item is not there may be kept for this `TIME`, 600s for instance", func(text string) error { return setTime(&s.negativeTTL, text) })
	f.StringVar(&s.narPath, "nar-path", "nar", "nars are below this `PREFIX` of the paths of URLs")
	s.workers = runtime.NumCPU()
	numberFlag(f, &s.workers, "workers", "encode and, with --cache, compress this `NUMBER` of items at a time")
	f.Lookup("workers").DefValue = "0" // it depends on the machine, and manuals do not
	f.StringVar(&s.logs, "log-directory", "/var/log/guix/drvs", "the daemon's build logs are in `DIRECTORY`; \"none\" serves none")
	s.waitFor = 64 << 20
	f.Func("cache-bypass-threshold", "encode items of up to this `SIZE` before answering; larger ones are encoded in the background", bytesize.Set(&s.waitFor, bytesize.Parse))
	f.Lookup("cache-bypass-threshold").DefValue = "64MiB"
	s.maxConnections = mostConnections
	numberFlag(f, &s.maxConnections, "max-connections", "have at most `NUMBER` connections at a time, of which one host may have half")
	f.StringVar(&s.forms, "forms", "eris-fs", "what read capabilities denote is one of these `FORMS`, separated by commas: eris-fs and, in addition, nar, the compressed nar; with --annotate that of the other server, which is fetched for that once")
	f.Func("deltas", "make deltas from older versions of items, in the background, and keep `BYTES` of them (1GiB, for instance)", bytesize.Set(&s.deltas, bytesize.Parse))
	f.StringVar(&s.announce, "announce", "", "tell \"guix-substitute-eris use\" that the blocks are in the stores at `URLS`, separated by spaces, which may leave the host out: coap+tcp://:5683")
	c.RunE = func(*cobra.Command, []string) error {
		if s.eris != "true" && s.eris != "false" {
			s.blocks = s.eris
		}
		if err := errors.Join(s.user.check(c.Name()), s.log.open()); err != nil {
			return err
		}
		l, err := s.open()
		if err != nil {
			return err
		}
		return s.user.explain(s.serve(c.Context(), l))
	}
	return c
}

// serve serves on l until ctx is done.
func (s *publishSettings) serve(ctx context.Context, l net.Listener) error {
	defer s.close()
	handler, err := s.handler(ctx)
	if err != nil {
		l.Close()
		return err
	}
	gate := admission.New(s.maxConnections, l, new(admission.Counts), func(err error) { s.log.Warn(err.Error() + "; see --max-connections") })
	handler, page := s.withStatus(handler, gate)
	var background sync.WaitGroup
	defer background.Wait()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	background.Go(func() { page.Run(ctx.Done()) })
	if s.advertise {
		port, err := s.advertisedAs(l)
		if err != nil {
			l.Close()
			return err
		}
		background.Go(func() { s.log.advertise(ctx, lan.Publish, port) })
	}
	s.log.Info("publishing on", "url", "http://"+strings.ReplaceAll(l.Addr().String(), "%", "%25"))
	s.log.notify("READY=1")
	defer context.AfterFunc(ctx, func() { s.log.notify("STOPPING=1") })()
	return gate.Serve(ctx, gate.Server(handler))
}

// handler makes what serves, until close.
func (s *publishSettings) handler(ctx context.Context) (h http.Handler, err error) {
	var key *acl.SigningKey
	if s.annotate == "" && s.privateKey != "none" {
		if key, err = s.key(); err != nil {
			return nil, err
		}
	}
	// What follows needs no rights.
	if err := s.user.become(); err != nil {
		return nil, err
	}
	for _, url := range strings.Fields(s.announce) {
		if _, err := storeurl.ParseListen(url); err != nil {
			return nil, fmt.Errorf("--announce: %w", err)
		}
	}
	store, err := s.openBlocks()
	if err != nil {
		return nil, err
	}
	capabilities, err := s.capabilities(store)
	if err != nil {
		return nil, err
	}
	var items publish.Items
	if s.annotate == "" || s.deltas > 0 {
		if items, err = s.openItems(); err != nil {
			return nil, err
		}
	}
	deltas, err := s.deltasOf(store, items)
	if err != nil {
		return nil, err
	}
	if s.annotate != "" {
		if capabilities == nil && deltas == nil {
			return nil, message.Usage("--annotate needs --eris or --store, or --deltas")
		}
		h, err = publish.NewAnnotator(publish.AnnotatorOptions{
			Upstream: s.annotate, StoreDir: s.store, Root: s.root, Capabilities: capabilities, Deltas: deltas,
			Nars: s.forms != "eris-fs", WaitFor: uint64(s.waitFor), Log: s.log.Warnf,
		})
		return h, message.OfUsage(err)
	}
	if s.logs == "none" {
		s.logs = ""
	}
	blocks, err := s.ownBlocks(ctx)
	if err != nil {
		return nil, err
	}
	var nars *publish.Nars
	if s.cache != "" {
		if err := files.MakeDirectory(s.cache); err != nil {
			return nil, err
		}
		nars = publish.NewNars(filepath.Join(s.cache, "nars"), s.workers, s.ttl, s.log.Warnf)
		s.closers = append(s.closers, nars.Close)
	}
	h, err = publish.NewServer(publish.ServerOptions{
		StoreDir: s.store, Root: s.root, Items: items, Key: key, Capabilities: capabilities, Nars: nars, Deltas: deltas, Blocks: blocks,
		WaitFor: uint64(s.waitFor), Compressions: guixCompressions(s.compressions), NarPath: s.narPath,
		TTL: s.ttl, NegativeTTL: s.negativeTTL,
		LogDirectory: s.logs, Log: s.log.Warnf, BlockStores: strings.Fields(s.announce),
	})
	return h, message.OfUsage(err)
}

// ownBlocks returns what serves the blocks of the items from their files, which is done where read
// capabilities are published and no store has the blocks; else it is nil.
func (s *publishSettings) ownBlocks(ctx context.Context) (http.Handler, error) {
	if s.eris == "false" || s.blocks != "" {
		return nil, nil
	}
	directory, err := s.cached("items", "items")
	if err != nil {
		return nil, err
	}
	table, closeTable, err := s.share(ctx, directory, s.log.Log)
	if errors.Is(err, files.ErrLocked) {
		s.log.Warnf("another publisher serves the blocks: %v", err)
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	web := httpserver.New(httpserver.Config{Source: table, Log: s.log.WarnError})
	s.closers = append(s.closers, closeTable, web.Close)
	return web.Handler(httpserver.Access{Get: true}), nil
}

// openBlocks opens the store for blocks; without one it is nil.
func (s *publishSettings) openBlocks() (fetch.Store, error) {
	if s.blocks == "" || s.blocks == "none" {
		return nil, nil
	}
	store, err := settings.OpenStore(s.blocks)
	if err == nil {
		s.closers = append(s.closers, func() { store.Close() })
	}
	return store, err
}

func (s *publishSettings) capabilities(store fetch.Store) (*publish.Capabilities, error) {
	nar, err := s.narForm()
	if err != nil || store == nil && s.eris == "false" {
		return nil, err
	}
	directory, err := s.cached("capabilities", "")
	if err != nil {
		return nil, err
	}
	c := publish.NewCapabilities(directory, store, s.workers, s.log.Warnf)
	c.Nar = nar
	s.closers = append(s.closers, c.Close)
	return c, nil
}

// narForm returns the compression of the nars that have read capabilities of their own, or nothing.
func (s *publishSettings) narForm() (string, error) {
	switch s.forms {
	case "eris-fs":
		return "", nil
	case "eris-fs,nar":
	default:
		return "", message.Usage("the forms are \"eris-fs\" or \"eris-fs,nar\", and not %q", s.forms)
	}
	if s.annotate != "" {
		return "", nil // the nars are those of the other server
	}
	for _, c := range guixCompressions(s.compressions) {
		if c != "none" {
			return c, nil
		}
	}
	return "", message.Usage("the form nar needs a compression")
}

// deltasOf returns what makes deltas of items, or nothing if none are kept.
func (s *publishSettings) deltasOf(store fetch.Store, items publish.Items) (*publish.Deltas, error) {
	if s.deltas == 0 {
		return nil, nil
	}
	directory, err := s.cached("deltas", "deltas")
	if err != nil {
		return nil, err
	}
	d := publish.NewDeltas(publish.DeltaOptions{
		Directory: directory, MaxBytes: s.deltas, StoreDir: s.store, Root: s.root, Items: items, Store: store, Log: s.log.Warnf,
	})
	s.closers = append(s.closers, d.Close)
	return d, nil
}

// cached returns a directory of the cache: the given one below that of --cache, or the usual one.
func (s *publishSettings) cached(usual, below string) (string, error) {
	if s.cache != "" {
		return filepath.Join(s.cache, below), nil
	}
	directory, err := settings.CacheDirectory(usual)
	if err != nil {
		return "", fmt.Errorf("%w; name a directory by --cache", err)
	}
	return directory, nil
}

func (s *publishSettings) key() (*acl.SigningKey, error) {
	secret, err := files.ReadLimited(s.privateKey, acl.MaxSexpSize)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w; \"guix archive --generate-key\" makes a key pair", err)
	}
	if err != nil {
		return nil, err
	}
	public, err := files.ReadLimited(s.publicKey, acl.MaxSexpSize)
	if err != nil && (s.publicKey != publicKeyFile() || !errors.Is(err, fs.ErrNotExist)) {
		return nil, err
	}
	if err == nil && len(public) == 0 {
		return nil, fmt.Errorf("%s: public key: the file is empty", s.publicKey)
	}
	name := s.privateKey
	key, err := acl.ParseSigningKey(secret, nil)
	if err == nil && len(public) > 0 {
		name = s.publicKey
		key, err = acl.ParseSigningKey(secret, public)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return key, nil
}

// publicKeyFile is where the public key is, unless it is said; there need not be one.
func publicKeyFile() string { return filepath.Join(settings.Directory(), "signing-key.pub") }

// A Signer makes signed narinfos of the items in the daemon's database, for other commands than
// "publish".
type Signer struct{ s publishSettings }

// Flags defines the options that name the key pair.
func (s *Signer) Flags(f *pflag.FlagSet) {
	f.StringVar(&s.s.publicKey, "public-key", publicKeyFile(), "for --sign, the key that others authorise is in `FILE`")
	f.StringVar(&s.s.privateKey, "private-key", filepath.Join(settings.Directory(), "signing-key.sec"), "for --sign, sign with the key in `FILE`")
}

// Open reads the key pair and opens the database. The store directory is as in
// [publish.ServerOptions], and so is root. Unless there is an error, closeItems must be called at
// the end.
func (s *Signer) Open(store, root string, log func(format string, a ...any)) (server *publish.Server, key *acl.PublicKey, closeItems func(), err error) {
	pair, err := s.s.key()
	if err != nil {
		return nil, nil, nil, err
	}
	s.s.store, s.s.database = store, settings.DatabaseFile()
	s.s.instead = "; --sign is for what the guix-daemon of this machine has"
	items, err := s.s.openItems()
	if err != nil {
		return nil, nil, nil, err
	}
	server, err = publish.NewServer(publish.ServerOptions{
		StoreDir: store, Root: root, Items: items, Key: pair, Compressions: []string{"none"}, Log: log,
	})
	if err != nil {
		s.s.close()
	}
	return server, pair.PublicKey(), s.s.close, err
}
