// SPDX-License-Identifier: GPL-3.0-or-later

//go:build unix

package benchdata

import (
	"syscall"
	"time"
)

// Function returns how much processor time f takes in this process, system calls included.
func Function(f func()) time.Duration { return cpu(syscall.RUSAGE_SELF, f) }

// Program returns how much processor time the processes take that f starts and waits for.
func Program(f func()) time.Duration { return cpu(syscall.RUSAGE_CHILDREN, f) }

func cpu(who int, f func()) time.Duration {
	var before, after syscall.Rusage
	if err := syscall.Getrusage(who, &before); err != nil {
		panic(err)
	}
	f()
	if err := syscall.Getrusage(who, &after); err != nil {
		panic(err)
	}
	return time.Duration(after.Utime.Nano() - before.Utime.Nano() + after.Stime.Nano() - before.Stime.Nano())
}
