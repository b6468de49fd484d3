// SPDX-License-Identifier: GPL-3.0-or-later

// Command badger is the empty program with badger linked in.
package main

import (
	"fmt"
	"net/http"
	"os"

	"github.com/dgraph-io/badger/v4"
)

func main() {
	if len(os.Args) > 1 {
		fmt.Println(badger.Open(badger.DefaultOptions(os.Args[1])))
		fmt.Println(http.ListenAndServe(os.Args[1], nil))
	}
}
