// SPDX-License-Identifier: GPL-3.0-or-later

package manual

import (
	"cmp"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
)

// columns is the width of a help.
const columns = 80

// Show shows what a command does, and its options with what they are by default.
func Show(c *cobra.Command, _ []string) {
	c.InitDefaultHelpFlag()
	fmt.Printf("Usage: %s\n\n%s\n", c.UseLine(), cmp.Or(c.Long, c.Short))
	for _, g := range c.Groups() {
		fmt.Printf("\n%s\n", g.Title)
		for _, sub := range commandsOf(c, g) {
			fmt.Printf("  %-12s %s\n", sub.Name(), sub.Short)
		}
	}
	options := c.LocalFlags().FlagUsagesWrapped(columns)
	optionalValue := regexp.MustCompile(`(--\w+) (\w+)\[="true"\]`) // as package pflag shows it
	fmt.Printf("\nOptions:\n%s", optionalValue.ReplaceAllString(options, "$1[=$2]       "))
}

func commandsOf(c *cobra.Command, g *cobra.Group) []*cobra.Command {
	return slices.DeleteFunc(slices.Clone(c.Commands()), func(sub *cobra.Command) bool { return sub.GroupID != g.ID || sub.Hidden })
}

// Help is the command that shows the help of a command.
func Help() *cobra.Command {
	return &cobra.Command{
		Use: "[COMMAND]",
		ValidArgsFunction: func(c *cobra.Command, args []string, _ string) (names []string, _ cobra.ShellCompDirective) {
			for _, sub := range c.Root().Commands() {
				if len(args) == 0 && !sub.Hidden {
					names = append(names, sub.Name())
				}
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		Short: "show this help, or that of a command",
		Long:  `Show what a command does and its options, or, without one, all commands.`,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) > 1 {
				return message.Usage("help takes one command: guix-substitute-eris help encode")
			}
			shown, rest, err := c.Root().Find(args)
			if err != nil || len(rest) > 0 {
				var names []string
				for _, sub := range c.Root().Commands() {
					names = append(names, sub.Name())
				}
				return message.UnknownCommand(args[0], names)
			}
			return shown.Help()
		},
	}
}

// shells has what writes the completion of each.
var shells = map[string]func(root *cobra.Command) error{
	"bash": func(root *cobra.Command) error { return root.GenBashCompletionV2(os.Stdout, true) },
	"zsh":  func(root *cobra.Command) error { return root.GenZshCompletion(os.Stdout) },
	"fish": func(root *cobra.Command) error { return root.GenFishCompletion(os.Stdout, true) },
}

// Completion is the command that has shells complete commands, options and their values.
func Completion() *cobra.Command {
	return &cobra.Command{
		Use:   "bash|zsh|fish",
		Short: "complete command lines in a shell",
		Long: `Print what has a shell complete command lines of this program. "make install"
puts it where shells look for it. To try it in bash:

  source <(guix-substitute-eris completion bash)`,
		ValidArgs: slices.Sorted(maps.Keys(shells)),
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) != 1 || shells[args[0]] == nil {
				return message.Usage("completion takes the name of a shell: bash, zsh or fish")
			}
			return shells[args[0]](c.Root())
		},
	}
}

// Complete has the values of options completed: by the word that stands for the value in the help,
// names of files or directories, or words that are given. Other values are not names of files.
func Complete(c *cobra.Command, words map[string][]string) {
	c.Flags().VisitAll(func(f *pflag.Flag) {
		complete := cobra.NoFileCompletions
		switch value, _ := pflag.UnquoteUsage(f); {
		case words[f.Name] != nil:
			complete = cobra.FixedCompletions(words[f.Name], cobra.ShellCompDirectiveNoFileComp)
		case value == "DIRECTORY":
			complete = cobra.FixedCompletions(nil, cobra.ShellCompDirectiveFilterDirs)
		case value == "FILE" || value == "PATH" || value == "":
			return
		}
		if err := c.RegisterFlagCompletionFunc(f.Name, complete); err != nil {
			panic(err) // the option is one of the command
		}
	})
}
