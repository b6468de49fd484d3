// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

// WhyNot returns the exit status of a command that could not have an item, as it has said.
func (s *Session) WhyNot(ctx context.Context, item string) message.Status {
	defer func(log *protocol.Log) { s.Log = log }(s.Log)
	s.Log = silent()
	e, err := s.Explain(ctx, item)
	if err != nil {
		return message.Unavailable
	}
	return max(message.Unavailable, ExitStatus(e.Availability))
}

// ExitStatus returns the exit status of a command about an item.
func ExitStatus(a substitute.Availability) message.Status {
	return map[substitute.Availability]message.Status{
		substitute.NotAvailable: message.Unavailable, substitute.NotAuthorised: message.Unauthorised, substitute.NotReachable: message.Unreachable,
	}[a]
}

// Names returns the names of items that arguments have, each of which may be several lines: what
// "guix build" prints, in quotation marks.
func Names(arguments []string) (names []string) {
	for _, text := range arguments {
		names = append(names, strings.Split(strings.TrimRight(text, "\n"), "\n")...)
	}
	return names
}

const maxLinks = 40

// FindItem returns the store item that a person means: by its path or that of a file in it, by its
// name or its hash part, or by a link into the store, of a profile for example. For a hash part,
// the store and then, unless sub is nil, the servers are looked through for the name.
func (s *Settings) FindItem(ctx context.Context, sub *Session, text string) (string, error) {
	name := strings.TrimRight(text, "/")
	if !strings.Contains(name, "/") && len(name) >= 32 && narinfo.CheckStoreName(name[:32]+"-x") == nil {
		if _, err := os.Lstat(name); err != nil {
			return s.itemByHash(ctx, sub, name)
		}
	}
	path, _ := filepath.Abs(text) // which needs a working directory for some
	for range maxLinks {
		if inside, ok := strings.CutPrefix(path, s.Store+"/"); ok {
			item, _, _ := strings.Cut(inside, "/")
			item = s.Store + "/" + item
			return item, message.OfUsage(narinfo.CheckStorePath(s.Store, item))
		}
		target, err := os.Readlink(path)
		if err != nil {
			target = filepath.Base(path) // perhaps one of the directories is a link
		}
		directory, _ := filepath.EvalSymlinks(filepath.Dir(path))
		if next := filepath.Join(directory, target); filepath.IsAbs(target) {
			path = filepath.Clean(target)
		} else if next != path && directory != "" {
			path = next
		} else {
			break
		}
	}
	return "", message.Usage("%q is neither an item of the store directory %q, nor a link to one, nor a hash part (32 letters and digits)"+
		"\nhint: for a package, \"guix build -n PACKAGE\" shows the items that would be fetched", text, s.Store)
}

func (s *Settings) itemByHash(ctx context.Context, sub *Session, text string) (string, error) {
	if narinfo.CheckStoreName(text) == nil {
		return s.Store + "/" + text, nil
	}
	if len(text) != 32 {
		return "", message.Usage("%q is no name of a store item", text)
	}
	present, _ := filepath.Glob(s.Store + "/" + text + "-*")
	for _, path := range present {
		info, err := os.Lstat(path)
		isLock := err == nil && filepath.Ext(path) == ".lock" && info.Mode().IsRegular() && info.Size() == 0 // of the daemon
		if !isLock {
			return path, nil
		}
	}
	if sub == nil {
		return "", message.Unavailable.Errorf("hash part %s: the store has no item of that name", text)
	}
	ctx, stop := context.WithCancel(ctx)
	var wait sync.WaitGroup
	defer func() { stop(); wait.Wait() }()
	urls := s.ServerURLs()
	found, failed := make([]chan string, len(urls)), make([]error, len(urls))
	for i, server := range urls {
		found[i] = make(chan string, 1)
		wait.Go(func() {
			texts, err := NarinfosFrom(ctx, sub.Mirrors, server, []string{text})
			failed[i] = err
			path := ""
			if n, err := narinfo.Parse(texts[text]); err == nil && strings.HasPrefix(n.StorePath, s.Store+"/"+text+"-") {
				path = n.StorePath
			}
			found[i] <- path
		})
	}
	for _, of := range found { // the first server that has it, as elsewhere
		if path := <-of; path != "" {
			return path, nil
		}
	}
	err := errors.Join(failed...)
	if err == nil {
		err = message.Unavailable.Errorf("no server has it, and the store has no item of that name")
	}
	return "", fmt.Errorf("hash part %s: %w", text, err)
}

// NarinfosFrom gets the narinfos that a server has. It is an error, too, if the server answers by
// something else than these, and that it does not have them.
func NarinfosFrom(ctx context.Context, client *mirror.Client, server string, hashParts []string) (map[string][]byte, error) {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var mu sync.Mutex
	texts := map[string][]byte{}
	total := 0
	var refused error
	err := client.Narinfos(ctx, server, hashParts, mirror.Wanted, func(a mirror.Answer) {
		mu.Lock()
		defer mu.Unlock()
		switch {
		case a.Status == http.StatusNotFound, a.Status == http.StatusGone:
		case a.Status != http.StatusOK:
			refused = message.Unavailable.Errorf("%s: narinfos are answered by %s", mirror.WithoutUser(server), a.StatusText())
		case a.Body != nil:
			if total += len(a.Body); total > publish.MaxNarinfos {
				stop(fmt.Errorf("%s sends more than narinfos can be", mirror.WithoutUser(server)))
				return
			}
			texts[a.Hash] = a.Body
		}
	})
	if errors.As(err, new(*mirror.ServerError)) {
		err = fmt.Errorf("some narinfos could not be had: %w", err)
	}
	return texts, cmp.Or(err, refused)
}
