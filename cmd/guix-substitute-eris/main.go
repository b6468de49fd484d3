// SPDX-License-Identifier: GPL-3.0-or-later

// Command guix-substitute-eris takes the place of "guix substitute" under guix-daemon. See the
// README of the project.
package main

import (
	"io"
	"log"
	"os"
	"os/signal"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/inspect"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/program"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/serving"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/session"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/setup"
)

func main() { os.Exit(run(os.Args[1:])) }

// A row is a command in the table of commands.
type row struct {
	name, group string
	new         func() *cobra.Command // Use is what it takes beside options
}

// commands are the commands that people run, by the group that they have in the help.
var commands = []row{
	{"encode", "ERIS", encodeCommand},
	{"decode", "ERIS", decodeCommand},
	{"serve", "ERIS", serving.Serve},
	{"publish", "ERIS", serving.Publish},
	{"status", "ERIS", serving.Status},
	{"export", "ERIS", exportCommand},
	{"import", "ERIS", importCommand},
	{"check", "ERIS", checkCommand},
	{"explain", "To find out what is wrong", inspect.Explain},
	{"doctor", "To find out what is wrong", inspect.Doctor},
	{"narinfo", "To find out what is wrong", inspect.Narinfo},
	{"setup", "To put it in place", setup.Setup},
	{"use", "To put it in place", setup.UseServer},
	{"keygen", "Other commands", keygenCommand},
	{"demo", "Other commands", demoCommand},
	{"completion", "Other commands", completionCommand},
	{"help", "Other commands", helpCommand},
	{"man", "Other commands", manCommand},
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
	if len(args) == 5 && args[0] == "substitute" && args[1] == session.CleanOption {
		session.CleanAfter(args[2], args[3], args[4])
		return 0
	}
	if isHelper(args) {
		return message.Report(helper(&session.Settings{}, args[1] == "--query"))
	}
	if len(args) > 0 && !isOurs(args[0]) {
		if guix != "" || program.IsGuix() {
			return message.Report(program.Guix(guix, args))
		}
		return message.Report(message.UnknownCommand(args[0], commandNames()))
	}
	signal.Ignore(unix.SIGPIPE) // who reads what is shown and goes away must not leave half of a tree behind
	root := rootCommand(len(args) > 0 && strings.HasPrefix(args[0], cobra.ShellCompRequestCmd))
	root.SetArgs(commandFirst(args))
	ctx, stop := program.UntilSignal()
	defer stop()
	return message.Report(root.ExecuteContext(ctx))
}

// commandFirst puts a command before the options that stand before it, for cobra, which cannot tell
// there which of them have a value. By hand, there is none.
func commandFirst(args []string) []string {
	i := slices.IndexFunc(args, func(a string) bool { return slices.Contains(commandNames(), a) })
	if i < 0 || slices.Contains(args[:i], "--query") || slices.Contains(args[:i], "--substitute") {
		return args
	}
	return slices.Concat(args[i:i+1], args[:i], args[i+1:])
}

// isOurs reports whether the first argument is not for guix.
func isOurs(name string) bool {
	return strings.HasPrefix(name, "-") || slices.Contains(commandNames(), name)
}

// commandNames returns the names of all commands, with those that shells run to complete one.
func commandNames() []string {
	names := []string{cobra.ShellCompRequestCmd, cobra.ShellCompNoDescRequestCmd}
	for _, r := range commands {
		names = append(names, r.name)
	}
	return names
}

func rootCommand(completing bool) *cobra.Command {
	root := byHandCommand()
	root.Use = "guix-substitute-eris COMMAND [OPTION]... [ARGUMENT]..."
	root.Short, root.Long = "substitutes for GNU Guix from ERIS blocks", help
	root.CompletionOptions.DisableDefaultCmd = true
	root.SilenceErrors, root.SilenceUsage, root.DisableFlagsInUseLine = true, true, true
	root.SetHelpFunc(showHelp)
	root.SetFlagErrorFunc(message.Option)
	root.Args = cobra.ArbitraryArgs
	words := map[string][]string{ // as values of options
		"policy": session.Policies(), "layout": {"sharded", "flat"}, "way": {"extension", "program"},
		"log-format": {"text", "json"}, "compression": {"none", "gzip", "lzip", "zstd"},
	}
	completeOptions(root, words, completing)
	for _, r := range commands {
		if !root.ContainsGroup(r.group) {
			root.AddGroup(&cobra.Group{ID: r.group, Title: r.group + ":"})
		}
		c := r.new()
		c.Use, c.GroupID = strings.TrimSpace(r.name+" [OPTION]... "+c.Use), r.group
		c.DisableFlagsInUseLine = true
		if c.Args != nil {
			c.ValidArgsFunction = cobra.NoFileCompletions
		}
		completeOptions(c, words, completing)
		root.AddCommand(c)
		if r.name == "help" {
			root.SetHelpCommand(c)
		}
	}
	return root
}

const help = `Substitutes for GNU Guix: a replacement for "guix substitute".

By hand, --query and --substitute do what guix-daemon has "guix substitute" do;
replies go to standard output, and the exit status is 0 if all that was asked
for can be had:

  --query [ITEM]...
      say whether store items can be had, or answer requests read from
      standard input
  --substitute [ITEM DESTINATION]
      restore a store item, or answer requests read from standard input

In the environment of guix-daemon (GUIX=...) or under the name guix, any other
command is handed to the real guix. The option --guix=FILE before the command
says where that is.

Exit statuses: 0 for success, 2 for a wrong command line, 3 if something is not
available, 4 if it is not authorised, 5 if who has it cannot be reached, 1 for
any other failure.`
