// SPDX-License-Identifier: GPL-3.0-or-later

package message

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
)

func TestText(t *testing.T) {
	const ref = "block DXOLDXOLDXOLDXOLDXOLDXOLDXOLDXOLDXOLDXOLDXOLDXOLDXOL"
	for text, want := range map[string]string{
		"encoding ./nonexist: lstat ./nonexist: no such file or directory":           "encoding ./nonexist: no such file or directory",
		"coap+tcp://h:1: connecting: dial tcp 127.0.0.1:1: connect: it failed":       "coap+tcp://h:1: connecting: 127.0.0.1:1: it failed",
		"getting " + ref + ": file:blocks: " + ref + ": block not found":             "getting " + ref + ": file:blocks: block not found",
		"file:blocks: " + ref + ": the directory is gone":                            "file:blocks: the directory is gone",
		"read capability: not upper-case Base32":                                     "read capability: not upper-case Base32",
		"write /dev/stdout: no space left on device":                                 "/dev/stdout: no space left on device",
		"dial tcp: lookup x.example on 192.0.2.1:53: no such host":                   "x.example: no such host",
		"the directory /a does not exist; make it: file does not exist":              "the directory /a does not exist; make it",
		"listen tcp 127.0.0.1:80: bind: address already in use":                      "127.0.0.1:80: another program listens there",
		"cannot write /a/b: open /a/.new-b: read-only file system":                   "cannot write /a/b: /a/.new-b: read-only file system",
		"x: interrupt signal received":                                               "x: interrupted",
		"x: context canceled\ny: context deadline exceeded":                          "x: interrupted\n  y: no answer in time",
		"getting " + ref + ": file:b: b: no such file or directory":                  "file:b: no such file or directory",
		"store is read-only: open /etc/.new-BMJNQQVSVB6PBDGDPHEYJJQEAT: it failed":   "store is read-only: /etc/: it failed",
		"write /a/.new-BMJNQQVSVB6PBDGDPHEYJJQEAT/…/b: it failed":                    "/a/…/b: it failed",
		"listen tcp: lookup x.example on 192.0.2.1:53: no such host":                 "x.example: no such host",
		"block store \"/proc/x\": mkdir /proc/x: it failed":                          "block store \"/proc/x\": it failed",
		"Get: net/http: HTTP/1.x transport connection broken: malformed HTTP status": "Get: it speaks something else than HTTP",
		"Get: net/http: HTTP/1.x transport connection broken: unexpected EOF":        "Get: unexpected EOF",
		"x: readLoopPeekFailLocked: %!w(<nil>)":                                      "x: it speaks something else than HTTP",
		"connecting: failed to WebSocket dial: failed to send handshake request: Get \"https://x/y\": http: server gave HTTP response to HTTPS client": "connecting: it speaks HTTP, and not HTTPS",
		"x: http2: failed reading the frame payload: http2: frame too large, note that the frame header looked like an HTTP/1.1 header":                "x: it speaks HTTP/1.1 only, and no h2c",
		"": "",
	} {
		if got := Text(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
	if n := testing.AllocsPerRun(10, func() { Text("x: it failed") }); n > 500 {
		t.Errorf("%v allocations, as if expressions were compiled each time", n)
	}
}

func TestHint(t *testing.T) {
	for _, v := range []struct {
		err  error
		want string
	}{
		{&fs.PathError{Op: "open", Path: "/x", Err: syscall.EACCES}, "as a user who may"},
		{&fs.PathError{Op: "open", Path: "/x", Err: syscall.EROFS}, "can be written to"},
		{&fs.PathError{Op: "symlink", Path: "x", Err: syscall.EPERM}, "may hold no links"},
		{&fs.PathError{Op: "create", Path: "x/…/README", Err: syscall.EEXIST}, "not all names"},
		{&fs.PathError{Op: "create", Path: "x/…/a:b", Err: syscall.EINVAL}, "not all names"},
		{&fs.PathError{Op: "write", Path: "x/…/y", Err: syscall.ENOSPC}, "make room"},
		{fmt.Errorf("x: %w", syscall.ENOSPC), "make room"},
		{fmt.Errorf("x: %w", syscall.EDQUOT), "make room"},
		{fmt.Errorf("x: %w", syscall.EFBIG), "4 GiB on FAT32"},
		{fmt.Errorf("x: %w", syscall.EADDRNOTAVAIL), "no such address"},
		{fmt.Errorf("x: %w", syscall.ENETUNREACH), "has this machine a network"},
		{errors.New("x.example: no such host"), "is the name right"},
		{fmt.Errorf("x: %w", syscall.ENOTDIR), "a file is where a directory must be"},
		{&net.AddrError{Err: "invalid port", Addr: "99999"}, "1 to 65535"},
		{fmt.Errorf("x: %w", os.ErrDeadlineExceeded), "can the machine be reached"},
		{errors.New("readLoopPeekFailLocked: %!w(<nil>)"), "are the scheme and the port"},
		{errors.New("net/http: HTTP/1.x transport connection broken: malformed HTTP response"), "are the scheme and the port"},
		{errors.New("x: http: server gave HTTP response to HTTPS client"), "something else is served there"},
		{errors.New("lock: other users may write to it"), "umask=022"},
		{&fs.PathError{Op: "lock", Path: "x", Err: syscall.ENOLCK}, "has no locks"},
		{errors.New("something else"), ""},
	} {
		if got := hint(v.err); !strings.Contains(got, v.want) || (got == "") != (v.want == "") {
			t.Errorf("%v: %q", v.err, got)
		}
	}
}

func TestUnknown(t *testing.T) {
	known := []string{"encode", "decode", "--store", "--substitute-urls", "policy", "doctor"}
	for name, want := range map[string]string{
		"encdoe": "encode", "dcode": "decode", "--stor": "--store", "--substitute-url": "--substitute-urls",
		"polcy": "policy", "doct": "doctor", "build": "", "gc": "", "": "", strings.Repeat("x", 1000): "",
	} {
		text := Unknown("thing", name, known)
		if _, meant, _ := strings.Cut(text, "did you mean "); strings.Trim(meant, `"?`) != want {
			t.Errorf("%.20s: %.100s, want %s", name, text, want)
		}
	}
}
