// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"
)

// TestPublishConnections has more clients than the publisher may have connections: idle ones make
// room, busy ones do not, and that is logged.
func TestPublishConnections(t *testing.T) {
	directory := t.TempDir()
	const item = "00000000000000000000000000000001-item"
	writeFiles(t, directory, map[string][]byte{
		"items/" + item: noise(1, 32<<20), // more than sockets hold
		"manifest":      []byte("StorePath: /gnu/store/" + item + "\nReferences: \n"),
	})
	publisher, err := startPublish(directory, directory+"/log", os.Environ(),
		"--root=items", "--manifest=manifest", "--private-key=none", "--max-connections=3")
	must(t, err)
	dial := func() net.Conn {
		conn, err := net.Dial("tcp", strings.TrimPrefix(publisher.urls["HTTP"], "http://"))
		must(t, err)
		t.Cleanup(func() { conn.Close() })
		conn.SetDeadline(time.Now().Add(time.Minute))
		return conn
	}
	// get returns the status of the answer, 0 if there is none.
	get := func(conn net.Conn, path string) int {
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path)
		answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			return 0
		}
		return answer.StatusCode
	}
	var idle []net.Conn
	for range 5 {
		idle = append(idle, dial())
	}
	for _, conn := range idle[:2] {
		if n, err := conn.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("an idle connection has not made room: %d bytes, error %v", n, err)
		}
	}
	var busy []net.Conn
	for i := range 3 {
		conn := dial()
		if status := get(conn, "/nar/"+item); status != 200 {
			t.Errorf("connection %d: status %d", i, status)
		}
		busy = append(busy, conn)
	}
	if status := get(dial(), "/nix-cache-info"); status != 0 {
		t.Errorf("a connection beyond the limit: status %d", status)
	}
	busy[0].Close()
	eventually(t, "there is no room although a connection has ended", func() bool { return get(dial(), "/nix-cache-info") == 200 })
	for _, conn := range busy[1:] {
		conn.Close()
	}
	must(t, publisher.stop())
	log, err := os.ReadFile(directory + "/log")
	if err != nil || !strings.Contains(string(log), "connections turned away: all of 3, or half of them for one host, are busy; see --max-connections") {
		t.Errorf("log:\n%s", log)
	}
}
