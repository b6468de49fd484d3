// SPDX-License-Identifier: GPL-3.0-or-later

// Command blockstore is the empty program with package blockstore linked in.
package main

import (
	"fmt"
	"net/http"
	"os"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore"
)

func main() {
	if len(os.Args) > 1 {
		fmt.Println(blockstore.Open(os.Args[1], blockstore.Options{}))
		fmt.Println(http.ListenAndServe(os.Args[1], nil))
	}
}
