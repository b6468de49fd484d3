// SPDX-License-Identifier: GPL-3.0-or-later

// Command bbolt is the empty program with bbolt linked in.
package main

import (
	"fmt"
	"net/http"
	"os"

	"go.etcd.io/bbolt"
)

func main() {
	if len(os.Args) > 1 {
		fmt.Println(bbolt.Open(os.Args[1], 0o600, nil))
		fmt.Println(http.ListenAndServe(os.Args[1], nil))
	}
}
