// SPDX-License-Identifier: GPL-3.0-or-later

package turns_test

import (
	"errors"
	"testing"
	"testing/synctest"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/turns"
)

// TestLost has a server answer each request, as a redirection does, and break the connection then:
// the request is not made again for ever.
func TestLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		of, requests := turns.New(t.Context()), 0
		lost := &turns.LostError{Err: errors.New("cut")}
		err := of.Retry(t.Context(), func() error {
			of.Succeed()
			if requests++; requests > 1000 {
				return nil
			}
			return lost
		})
		if !errors.Is(err, lost) || requests < 10 {
			t.Errorf("%d requests, %v", requests, err)
		}
	})
}
