// SPDX-License-Identifier: GPL-3.0-or-later

// Package protocol is the language that guix-daemon and its substituter speak: requests on standard
// input, replies on descriptor 4, and messages for the user on standard error. It knows nothing of
// networks and stores.
//
// [Log.Requests] reads requests; the Reply functions make replies; [ParseOptions] reads what the
// daemon puts in the environment; [NewLog] shows progress. The rules are those of Guix:
// guix/scripts/substitute.scm on the substituter's side, and nix/libstore/local-store.cc and
// build.cc on the daemon's.
package protocol

import (
	"bufio"
	"fmt"
	"io"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// ReplyDescriptor is the file descriptor that replies go to (Guix, nix/libutil/util.cc: Agent).
const ReplyDescriptor = 4

// MaxRequest is the length in bytes of the longest request line that is read. A client asks about
// thousands of paths at once, of up to 300 bytes; this leaves room for a million and more.
const MaxRequest = 128 << 20

// A Request is a line from the daemon.
type Request struct {
	// Command is the first word: "have", "info", "substitute", or whatever was sent; empty for a
	// line without words.
	Command string
	// Arguments are the other words.
	Arguments []string
}

// Requests reads request lines. It is not safe for concurrent use.
type Requests struct {
	r   *bufio.Reader
	log *Log
}

// Requests returns a reader of the requests that r brings. From then on the log shows something
// only while one is under way, between Next and Reply, or after the last one, and keeps until then
// what it is told meanwhile, as far as there is room.
func (l *Log) Requests(r io.Reader) *Requests {
	l.hold()
	return &Requests{r: bufio.NewReaderSize(r, 64<<10), log: l}
}

// Next returns the next request, however long its line is. It returns io.EOF at the end of the
// input, after the last line even if that has no newline at its end, and a [*TooLongError] for a
// line of more than [MaxRequest] bytes, after which it can be called again. Any other error is the
// reader's.
func (r *Requests) Next() (Request, error) {
	line, err := r.line()
	r.log.Release()
	if err != nil {
		return Request{}, err
	}
	words := strings.Fields(string(line))
	if len(words) == 0 {
		return Request{}, nil
	}
	return Request{words[0], words[1:]}, nil
}

// A TooLongError is a request line beyond [MaxRequest]; it has been skipped.
type TooLongError struct{ Length int64 }

func (e *TooLongError) Error() string {
	return fmt.Sprintf("request line of %d bytes is longer than %d", e.Length, MaxRequest)
}

// line returns the next line without its end.
func (r *Requests) line() ([]byte, error) {
	var line []byte
	length := int64(0)
	for {
		part, err := r.r.ReadSlice('\n')
		length += int64(len(part))
		if err == nil && line == nil {
			return part, nil
		}
		if length <= MaxRequest {
			line = append(line, part...)
		}
		switch {
		case err == bufio.ErrBufferFull:
			continue
		case err == io.EOF && length > 0:
			// The last line has no end; the next call returns io.EOF.
		case err != nil:
			return nil, err
		}
		if length > MaxRequest {
			return nil, &TooLongError{length}
		}
		return line, nil
	}
}

// Reply ends a request by writing the reply to a file descriptor, with a single write unless a pipe
// takes less. Errors are those of writing.
func (r *Requests) Reply(fd int, reply string) error {
	r.log.hold()
	for left := []byte(reply); len(left) > 0; {
		n, err := unix.Write(fd, left)
		switch err {
		case nil:
			left = left[n:]
		case unix.EINTR:
		case unix.EAGAIN:
			unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, -1)
		default:
			return err
		}
	}
	return nil
}

// ReplyHave is the reply to a "have" request: the available paths, in any order. Each must be one
// line.
func ReplyHave(paths []string) string {
	return strings.Join(append(slices.Clip(paths), "", ""), "\n")
}

// Info is what the daemon wants to know about an available path.
type Info struct {
	// Path is the store item: one of those asked for, and only once per reply, or else the daemon
	// gives up.
	Path string
	// Deriver is the store file name of the derivation, "" if unknown.
	Deriver string
	// References are store file names directly in the store.
	References []string
	// DownloadSize is the length of what would be downloaded, in bytes; 0 is unknown.
	DownloadSize uint64
	// NarSize is the length of the item's archive in bytes; 0 is unknown.
	NarSize uint64
}

// ReplyInfo is the reply to an "info" request: a record for each available path, in any order.
func ReplyInfo(records []Info) string {
	var b strings.Builder
	for _, r := range records {
		fmt.Fprintf(&b, "%s\n%s\n%d\n", r.Path, r.Deriver, len(r.References))
		for _, ref := range r.References {
			b.WriteString(ref + "\n")
		}
		fmt.Fprintf(&b, "%d\n%d\n", r.DownloadSize, r.NarSize)
	}
	return b.String() + "\n"
}

// The replies to a "substitute" request. The daemon takes the bytes of a single read as the reply,
// so each must be written with a single write.

// ReplyNotFound is the reply that the item cannot be had.
const ReplyNotFound = "not-found\n"

// ReplySuccess is the reply that the item is at its destination. narHash is the NarHash field as
// the narinfo has it, "sha256:" and the hash.
func ReplySuccess(narHash string, narSize uint64) string {
	return fmt.Sprintf("success %s %d\n", narHash, narSize)
}

// ReplyHashMismatch is the reply that what was found is not what the narinfo says. Both are SHA-256
// hashes in nix-base32.
func ReplyHashMismatch(expected, actual string) string {
	return fmt.Sprintf("hash-mismatch sha256 %s %s\n", expected, actual)
}
