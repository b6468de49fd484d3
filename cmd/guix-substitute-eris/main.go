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
	"log"
	"maps"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

func main() { os.Exit(run(os.Args[1:])) }

// run runs the command that the arguments ask for and returns the exit status. What it does not
// know belongs to guix if it runs in place of that.
func run(args []string) int {
	// Package net/http tells, among others, what servers send that nobody has asked for.
	log.SetOutput(io.Discard)
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
		"explain": explainCommand, "doctor": doctorCommand, "narinfo": narinfoCommand, "keygen": keygenCommand,
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
	case guix != "" || isGuix():
		return guixCommand(guix, args)
	}
	return usageError("%s\nhint: \"guix-substitute-eris --help\" shows the commands; those of guix are run by \"guix %s\"",
		unknown("command", args[0], slices.Sorted(maps.Keys(commands))), args[0])
}

const help = `Usage: guix-substitute-eris COMMAND [OPTION]... [ARGUMENT]...
Substitutes for GNU Guix: a replacement for "guix substitute".

What guix-daemon runs; replies go to file descriptor 4:
  substitute --query            report on the availability of store items
  substitute --substitute       fetch store items

The same by hand; replies go to standard output, and the exit status is 0 if
all that was asked for can be had:
  --query [ITEM]...             say whether the given store items can be had, or
                                answer requests read from standard input
  --substitute [ITEM DESTINATION]
                                restore a store item, or answer requests read
                                from standard input

ERIS:
  encode PATH                   turn a file or a tree into blocks and a URN
  decode URN DESTINATION        turn a URN into a file or a tree
  serve                         keep blocks and serve them
  publish                       serve narinfos with the field ERIS, and nars
  export ITEM... --to=DIRECTORY write narinfos and blocks to a directory

To find out what is wrong:
  explain ITEM...               say from where items would come, and why
  doctor                        look whether all is set up, and say what to mend
  narinfo ITEM...               show what the servers say of items

Other commands:
  keygen                        make a key pair to sign narinfos with
  demo                          show the whole way on a private store
  help, --help, -h              show this help
  --version, -V                 show the version

In the environment of guix-daemon (GUIX=...) or under the name guix, any other
command is handed to the real guix. The option --guix=FILE before the command
says where that is.

Run a command with --help to see its options. Exit statuses: 0 for success, 2
for a wrong command line, 3 if something is not available, 4 if it is not
authorised, 5 if who has it cannot be reached, 1 for any other failure.
`

// version is the version of the module that the program was built from.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" || info.Main.Version == "(devel)" {
		return "development version"
	}
	return info.Main.Version
}

// parse parses options, which may stand anywhere before "--". When it returns false the command is
// over, with the status that it returns too.
func parse(flags *flag.FlagSet, args []string, usage string) (status int, ok bool) {
	var messages strings.Builder
	flags.SetOutput(&messages)
	flags.Usage = func() {}
	var arguments []string
	err := flags.Parse(args)
	for err == nil && flags.NArg() > 0 {
		rest := flags.Args()
		if before := args[:len(args)-len(rest)]; len(before) > 0 && before[len(before)-1] == "--" {
			arguments = append(arguments, rest...)
			break
		}
		arguments, args = append(arguments, rest[0]), rest[1:]
		err = flags.Parse(args)
	}
	if err == nil {
		err = flags.Parse(append([]string{"--"}, arguments...))
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
		printUsage(os.Stdout, flags, usage)
		return 0, false
	case err != nil:
		command := strings.TrimSpace(flags.Name() + " --help")
		return usageError("%s\nhint: \"guix-substitute-eris %s\" shows the options", optionError(flags, err), command), false
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
		return fail("%w", err)
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
