// SPDX-License-Identifier: GPL-3.0-or-later

package serving

import (
	"context"
	"log/slog"
	"net/http"

	"github.com/spf13/cobra"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/lan"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/serverlog"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/systemd"
)

// logSettings are the options of a log, and the log once it is open.
type logSettings struct {
	*serverlog.Log
	format       string
	withRequests bool
}

func (l *logSettings) flags(c *cobra.Command) {
	c.Flags().StringVar(&l.format, "log-format", "text", "write the log as `FORMAT`, text or json")
	c.Flags().BoolVar(&l.withRequests, "access-log", false, "log requests, and thus what each client gets")
}

func (l *logSettings) open() (err error) {
	l.Log, err = serverlog.New(l.format)
	return err
}

// notify tells the service manager how the server fares, if there is one.
func (l *logSettings) notify(state string) {
	if err := systemd.Notify(state); err != nil {
		l.WarnError(err)
	}
}

// advertise has others find a service on a port, until ctx is done.
func (l *logSettings) advertise(ctx context.Context, service string, port uint16) {
	if err := lan.Advertise(ctx, service, port); err != nil {
		l.WarnError(err)
	}
}

// access returns where requests are logged, nil if they are not.
func (l *logSettings) access() *slog.Logger {
	if !l.withRequests {
		return nil
	}
	return l.Logger
}

// requests has the requests of a handler logged, if they are.
func (l *logSettings) requests(h http.Handler) http.Handler {
	return &serverlog.Requests{Handler: h, Log: l.access()}
}

// blocks returns what logs requests for blocks by CoAP, nil if they are not.
func (l *logSettings) blocks() func(client, method string, ref eris.Reference, code string) {
	if !l.withRequests {
		return nil
	}
	return func(client, method string, ref eris.Reference, code string) {
		l.Info("request", "client", client, "method", method, "block", ref.String(), "status", code)
	}
}
