// SPDX-License-Identifier: GPL-3.0-or-later

package coap

// SetConnection has a store use a connection.
func SetConnection(s *Store, c connection) { s.main.present = c }
