// SPDX-License-Identifier: GPL-3.0-or-later

package serving

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/systemd"
)

// setTime sets a time as options of Guix have it (guix/ui.scm: string->duration), but without
// months, which others would take for minutes.
func setTime(t *time.Duration, text string) error {
	number, unit := text, ""
	if text != "" {
		number, unit = text[:len(text)-1], text[len(text)-1:]
	}
	n, err := strconv.ParseUint(number, 10, 32)
	seconds, ok := map[string]uint64{"s": 1, "h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}[unit]
	switch {
	case err == nil && unit == "m":
		return fmt.Errorf("months for Guix are minutes for others; write %ds or %dd", n*60, n*30)
	case err != nil || !ok || n*seconds > 100*365*24*3600:
		return errors.New("it must be a number and a unit: s, h, d or w, like 36h or 5d; at most 100 years")
	}
	*t = time.Duration(n*seconds) * time.Second
	return nil
}

// guixCompressions returns the compressions as [publish.ServerOptions] has them: a level alone is
// one of gzip, and level 0 is none.
func guixCompressions(texts []string) (forms []string) {
	for _, text := range texts {
		if n, err := strconv.ParseUint(text, 10, 8); err == nil {
			text = fmt.Sprintf("gzip:%d", n)
		}
		if strings.HasSuffix(text, ":0") {
			text = "none"
		}
		forms = append(forms, text)
	}
	return forms
}

// open listens where the service manager does, or else where --listen and --port say: a host, or a
// host and a port.
func (s *publishSettings) open() (net.Listener, error) {
	passed, err := systemd.Sockets()
	if err == nil && len(passed) == 1 && passed[0].Listener != nil {
		return passed[0].Listener, nil
	} else if err != nil || len(passed) > 0 {
		return nil, cmp.Or(err, fmt.Errorf("the service manager passes %d sockets, and must pass one, of a stream", len(passed)))
	}
	host, port, err := net.SplitHostPort(s.listen)
	bare := strings.TrimSuffix(strings.TrimPrefix(s.listen, "["), "]")
	_, notAddress := netip.ParseAddr(bare)
	_, notNumber := strconv.Atoi(s.listen)
	switch {
	case err == nil && port != "" && s.port != "":
		return nil, message.Usage("--listen=%s and --port=%s both say the port", s.listen, s.port)
	case err == nil && port == "":
	case s.listen == "" && s.advertise:
		host = ""
	case s.listen == "":
		host = "127.0.0.1"
	case notAddress == nil || notNumber != nil && !strings.Contains(s.listen, ":"):
		host = bare
	default:
		return listenTCP(s.listen) // or it says what is wrong
	}
	return listenTCP(net.JoinHostPort(host, cmp.Or(s.port, usualPort)))
}

// advertisedAs returns the port that others on the local network are told.
func (s *publishSettings) advertisedAs(l net.Listener) (uint16, error) {
	address, err := netip.ParseAddrPort(l.Addr().String())
	if err == nil && address.Addr().IsLoopback() {
		err = message.Usage("--advertise: others cannot connect to %s; leave --listen out, or name another address", address.Addr())
	}
	return address.Port(), err
}
