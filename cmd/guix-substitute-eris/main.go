// SPDX-License-Identifier: GPL-3.0-or-later

// Command guix-substitute-eris takes the place of "guix substitute" under guix-daemon. See the
// README of the project.
package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/demo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/inspect"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/program"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/serving"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/session"
)

func main() { os.Exit(run(os.Args[1:])) }

// A row is a command in the table of commands.
type row struct {
	name, group string
	new         func() *cobra.Command // Use is what it takes beside options
}

// commands are the commands that people run, in the order of the help.
var commands = []row{
	{"encode", "ERIS", encodeCommand},
	{"decode", "ERIS", decodeCommand},
	{"serve", "ERIS", serving.Serve},
	{"publish", "ERIS", serving.Publish},
	{"export", "ERIS", exportCommand},
	{"explain", "To find out what is wrong", inspect.Explain},
	{"doctor", "To find out what is wrong", inspect.Doctor},
	{"narinfo", "To find out what is wrong", inspect.Narinfo},
	{"keygen", "Other commands", keygenCommand},
	{"demo", "Other commands", demo.Command},
	{"substitute", "What guix-daemon runs", substituteCommand},
}

// run runs the command that the arguments ask for and returns the exit status. What it does not
// know belongs to guix if it runs in place of that. For the daemon, no commands of people are made.
func run(args []string) int {
	// Package net/http tells, among others, what servers send that nobody has asked for.
	log.SetOutput(io.Discard)
	guix := ""
	if len(args) > 0 {
		if file, ok := strings.CutPrefix(args[0], "--guix="); ok {
			guix, args = file, args[1:]
		}
	}
	if isHelper(args) {
		return message.Report(helper(&session.Settings{}, args[1] == "--query"))
	}
	if len(args) > 0 && !isOurs(args[0]) {
		if guix != "" || program.IsGuix() {
			return message.Report(program.Guix(guix, args))
		}
		return message.Report(unknownCommand(args[0]))
	}
	root := rootCommand()
	root.SetArgs(args)
	return message.Report(root.Execute())
}

// isOurs reports whether the first argument is not for guix.
func isOurs(name string) bool {
	return strings.HasPrefix(name, "-") || slices.Contains(commandNames(), name)
}

// commandNames returns the names of all commands, with those of package cobra.
func commandNames() []string {
	names := []string{"help", "completion", cobra.ShellCompRequestCmd, cobra.ShellCompNoDescRequestCmd}
	for _, r := range commands {
		names = append(names, r.name)
	}
	return names
}

func unknownCommand(name string) error {
	return message.Usage("%s\nhint: \"guix-substitute-eris --help\" shows the commands; those of guix are run by \"guix %s\"",
		message.Unknown("command", name, commandNames()), name)
}

// rootCommand returns the program as a command, with all others.
func rootCommand() *cobra.Command {
	root := byHandCommand()
	root.Use, root.Version = "guix-substitute-eris COMMAND [OPTION]... [ARGUMENT]...", program.Version()
	root.Long = help
	root.SilenceErrors, root.SilenceUsage, root.DisableFlagsInUseLine = true, true, true
	root.SetVersionTemplate("guix-substitute-eris {{.Version}}\n")
	root.SetHelpFunc(showHelp)
	root.SetFlagErrorFunc(optionError)
	root.Args = cobra.ArbitraryArgs
	for _, r := range commands {
		if !root.ContainsGroup(r.group) {
			root.AddGroup(&cobra.Group{ID: r.group, Title: r.group + ":"})
		}
		c := r.new()
		c.Use, c.GroupID = strings.TrimSpace(r.name+" [OPTION]... "+c.Use), r.group
		c.DisableFlagsInUseLine = true
		root.AddCommand(c)
	}
	return root
}

const help = `Substitutes for GNU Guix: a replacement for "guix substitute".

By hand, --query and --substitute do what guix-daemon has "guix substitute" do;
replies go to standard output, and the exit status is 0 if all that was asked
for can be had:

  --query [ITEM]...             say whether the given store items can be had, or
                                answer requests read from standard input
  --substitute [ITEM DESTINATION]
                                restore a store item, or answer requests read
                                from standard input

In the environment of guix-daemon (GUIX=...) or under the name guix, any other
command is handed to the real guix. The option --guix=FILE before the command
says where that is.

Exit statuses: 0 for success, 2 for a wrong command line, 3 if something is not
available, 4 if it is not authorised, 5 if who has it cannot be reached, 1 for
any other failure.`

// showHelp shows what a command does, and its options with what they are by default.
func showHelp(c *cobra.Command, _ []string) {
	w := os.Stdout
	fmt.Fprintf(w, "Usage: %s\n\n%s\n", c.UseLine(), cmp.Or(c.Long, c.Short))
	for _, g := range c.Groups() {
		fmt.Fprintf(w, "\n%s\n", g.Title)
		for _, sub := range c.Commands() {
			if sub.GroupID == g.ID {
				fmt.Fprintf(w, "  %-12s %s\n", sub.Name(), sub.Short)
			}
		}
	}
	fmt.Fprintf(w, "\nOptions:\n%s", c.LocalFlags().FlagUsagesWrapped(helpColumns))
}

// helpColumns is the width of a help.
const helpColumns = 80

// optionError says in our words what is wrong with an option.
func optionError(c *cobra.Command, err error) error {
	text := err.Error()
	var unknown *pflag.NotExistError
	var missing *pflag.ValueRequiredError
	var invalid *pflag.InvalidValueError
	switch {
	case errors.As(err, &unknown):
		var names []string
		c.Flags().VisitAll(func(f *pflag.Flag) { names = append(names, "--"+f.Name) })
		name := "--" + unknown.GetSpecifiedName()
		if unknown.GetSpecifiedShortnames() != "" {
			name = "-" + unknown.GetSpecifiedName()
		}
		text = message.Unknown("option", name, names)
	case errors.As(err, &missing):
		value, _ := pflag.UnquoteUsage(missing.GetFlag())
		text = fmt.Sprintf("the option --%[1]s needs a value: --%[1]s=%[2]s", missing.GetFlag().Name, value)
	case errors.As(err, &invalid):
		why := fmt.Sprint(errors.Unwrap(invalid))
		switch invalid.GetFlag().Value.Type() {
		case "duration":
			why = "it must be a time with a unit, like 90s, 15m or 36h"
		case "bool":
			why = "it must be true or false, or be left out"
		case "int", "int64":
			why = "it must be a number"
		}
		text = fmt.Sprintf("the option --%s has the value %q: %s", invalid.GetFlag().Name, invalid.GetValue(), why)
	}
	return message.Usage("%s\nhint: \"%s --help\" shows the options", text, c.CommandPath())
}
