// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import "time"

// WithBackoff returns the options with another time for which no connection is tried after one that
// failed.
func WithBackoff(o Options, first time.Duration) Options {
	o.minBackoff = first
	return o
}

// SetConnection has a store use a connection.
func SetConnection(s *Store, c connection) { s.main.present = c }
