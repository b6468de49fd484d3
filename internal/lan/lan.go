// SPDX-License-Identifier: GPL-3.0-or-later

// Package lan makes servers be found on the local network, and finds those of others, by DNS-Based
// Service Discovery over Multicast DNS (RFC 6763, RFC 6762). Nothing that is found is trusted:
// whatever comes from there must have the hash that an authorised narinfo has.
package lan

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/brutella/dnssd"
	"github.com/brutella/dnssd/log"
)

// The types of services.
const (
	// Publish is a server of substitutes over HTTP (Guix, guix/scripts/publish.scm: run-publish).
	Publish = "_guix_publish._tcp"
	// Blocks is a server of ERIS blocks over CoAP and TCP, at .well-known/eris.
	Blocks = "_eris._tcp"
)

// Advertise makes a service be found that listens on a TCP port of all addresses of this machine.
// It does so until ctx ends, or returns an error that says why it cannot. The name of the service
// has that of the machine in it, as that of "guix publish" has.
func Advertise(ctx context.Context, service string, port uint16) error {
	host, err := os.Hostname()
	if err == nil {
		host, _, _ = strings.Cut(host, ".")
		kind := strings.ReplaceAll(strings.Trim(strings.TrimSuffix(service, "._tcp"), "_"), "_", "-")
		err = respond(ctx, dnssd.Config{Name: kind + "-" + host, Type: service, Host: host, Port: int(port)})
	}
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("advertising %s on the local network: %w", service, err)
	}
	return nil
}

func respond(ctx context.Context, c dnssd.Config) error {
	service, err := dnssd.NewService(c)
	if err != nil {
		return err
	}
	log.Info.Disable() // it would write to standard error
	responder, err := dnssd.NewResponder()
	if err != nil {
		return err
	}
	if err := onLink(); err != nil {
		return err
	}
	if _, err := responder.Add(service); err != nil {
		return err
	}
	return responder.Respond(ctx)
}

// interfaces returns those on which there may be others.
func interfaces() (usable []net.Interface) {
	all, _ := net.Interfaces()
	for _, i := range all {
		if i.Flags&net.FlagUp != 0 && i.Flags&net.FlagMulticast != 0 && i.Flags&net.FlagLoopback == 0 {
			usable = append(usable, i)
		}
	}
	return usable
}
