// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"fmt"
	"net"
	"os"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/lan"
)

// lyingStore is a program for scripts: it serves blocks on the local network, all of them wrong,
// until it is killed.
func lyingStore() {
	zeros := liar{fetch.NewWorkers(4, func(_ context.Context, _ eris.Reference, size eris.BlockSize, _ []byte) ([]byte, error) {
		return make([]byte, size), nil
	})}
	err := func() error {
		l, err := net.Listen("tcp", "[::]:5683")
		if err != nil {
			return err
		}
		s, err := coapserver.New(coapserver.Config{Resources: []coapserver.Resource{{Source: zeros}}})
		if err != nil {
			return err
		}
		go lan.Advertise(context.Background(), lan.Blocks, 5683)
		return s.Serve(l, coapserver.Access{Get: true})
	}()
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// liar is a source all of whose blocks are zeros.
type liar struct{ *fetch.Workers }

// String implements [fetch.Source].
func (liar) String() string { return "liar:" }
