// SPDX-License-Identifier: GPL-3.0-or-later

// Command pebble is the empty program with pebble linked in.
package main

import (
	"fmt"
	"net/http"
	"os"

	"github.com/cockroachdb/pebble/v2"
)

func main() {
	if len(os.Args) > 1 {
		fmt.Println(pebble.Open(os.Args[1], nil))
		fmt.Println(http.ListenAndServe(os.Args[1], nil))
	}
}
