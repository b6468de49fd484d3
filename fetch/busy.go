// SPDX-License-Identifier: GPL-3.0-or-later

package fetch

import (
	"fmt"
	"time"
)

// A BusyError says that a source is there but does not answer now, as HTTP status 429 or 503 with
// Retry-After, or CoAP 5.03 with Max-Age. It says nothing about the block: whoever asked waits for
// After, or asks elsewhere, and does not count it as a failure of the source.
type BusyError struct {
	After time.Duration // how long the source asks to be left alone; positive and bounded by whoever made the error
	Err   error         // what it answered
}

// Error implements error.
func (e *BusyError) Error() string {
	return fmt.Sprintf("%v; busy, to be asked again in %v", e.Err, e.After.Round(time.Millisecond))
}

// Unwrap returns what the source answered.
func (e *BusyError) Unwrap() error { return e.Err }
