// SPDX-License-Identifier: GPL-3.0-or-later

package httpserver

import "net/http"

// ServeHTTP answers a request without a connection.
func (s *Server) ServeHTTP(w http.ResponseWriter, access Access, r *http.Request) {
	s.Handler(access).ServeHTTP(w, r)
}
