// SPDX-License-Identifier: GPL-3.0-or-later

// Command guix-substitute-eris takes the place of "guix substitute" under guix-daemon. See the
// README of the project.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"

	"golang.org/x/sys/unix"
)

func main() { os.Exit(run(os.Args[1:])) }

// run runs the command that the arguments ask for and returns the exit status. What the command
// line does not know belongs to guix.
func run(args []string) int {
	guix := ""
	if len(args) > 0 {
		if file, ok := strings.CutPrefix(args[0], "--guix="); ok {
			guix, args = file, args[1:]
		}
	}
	if len(args) == 0 {
		fmt.Print(help)
		return 0
	}
	commands := map[string]func([]string) int{
		"substitute": substituteCommand, "encode": encodeCommand, "decode": decodeCommand, "serve": serveCommand,
		"publish": publishCommand, "export": exportCommand, "demo": demoCommand,
	}
	switch name := args[0]; {
	case commands[name] != nil:
		return commands[name](args[1:])
	case name == "help" || name == "--help" || name == "-h" || name == "-help":
		fmt.Print(help)
		return 0
	case name == "--version" || name == "-V" || name == "-version":
		fmt.Println("guix-substitute-eris", version())
		return 0
	case strings.HasPrefix(name, "-"):
		return byHandCommand(args)
	}
	return guixCommand(guix, args)
}

const help = `Usage: guix-substitute-eris COMMAND [OPTION]... [ARGUMENT]...
Substitutes for GNU Guix: a replacement for "guix substitute".

What guix-daemon runs; replies go to file descriptor 4:
  substitute --query            report on the availability of store items
  substitute --substitute       fetch store items

The same by hand; replies go to standard output, and the exit status is 0 if
all that was asked for could be had, else 1:
  --query [ITEM]...             report on the given store items, or answer
                                requests read from standard input
  --substitute [ITEM DESTINATION]
                                restore a store item, or answer requests read
                                from standard input

ERIS:
  encode PATH                   turn a file or a tree into blocks and a URN
  decode URN DESTINATION        turn a URN into a file or a tree
  serve                         keep blocks and serve them
  publish                       serve narinfos with the field ERIS, and nars
  export ITEM... --to=DIRECTORY write narinfos and blocks to a directory

Other commands:
  demo                          show the whole way on a private store
  help, --help, -h              show this help
  --version, -V                 show the version

Any other command is handed to the real guix, so that this program can stand in
for guix in the environment of guix-daemon (GUIX=...). The option --guix=FILE
before the command says where that is.

Run a command with --help to see its options.
`

// version is the version of the module that the program was built from.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" || info.Main.Version == "(devel)" {
		return "development version"
	}
	return info.Main.Version
}

// parse parses options. When it returns false the command is over, with the status that it returns
// too.
func parse(flags *flag.FlagSet, args []string, usage string) (status int, ok bool) {
	var messages strings.Builder
	flags.SetOutput(&messages)
	flags.Usage = func() {}
	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		printUsage(os.Stdout, flags, usage)
		return 0, false
	case err != nil:
		fmt.Fprintf(os.Stderr, "guix-substitute-eris: error: %v\nTry \"guix-substitute-eris %s --help\".\n", err, flags.Name())
		return 1, false
	}
	return 0, true
}

func printUsage(w io.Writer, flags *flag.FlagSet, usage string) {
	fmt.Fprint(w, usage, "\nOptions:\n")
	flags.VisitAll(func(f *flag.Flag) {
		value, text := flag.UnquoteUsage(f)
		if value != "" {
			value = "=" + strings.ToUpper(value)
		}
		fmt.Fprintf(w, "  --%s%s\n        %s\n", f.Name, value, text)
	})
}

// untilSignal returns a context that ends when the user, the service manager or the end of the
// terminal ends the program. One that "nohup" has started outlives the terminal.
func untilSignal() (context.Context, context.CancelFunc) {
	signals := []os.Signal{unix.SIGINT, unix.SIGTERM}
	if !signal.Ignored(unix.SIGHUP) {
		signals = append(signals, unix.SIGHUP)
	}
	return signal.NotifyContext(context.Background(), signals...)
}

// status shows the error of a command that a person runs, if there is one, and returns its exit
// status.
func status(err error) int {
	if err != nil {
		return fail("%v", err)
	}
	return 0
}

// printJSON prints a result on standard output.
func printJSON(v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err == nil {
		_, err = fmt.Println(string(text))
	}
	return err
}

// fail shows an error of a command that a person runs.
func fail(format string, a ...any) int {
	fmt.Fprintf(os.Stderr, "guix-substitute-eris: error: "+format+"\n", a...)
	return 1
}
