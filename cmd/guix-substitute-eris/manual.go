// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
)

const helpColumns = 80

// showHelp shows what a command does, and its options with what they are by default.
func showHelp(c *cobra.Command, _ []string) {
	c.InitDefaultHelpFlag()
	text := fmt.Sprintf("Usage: %s\n\n%s\n", c.UseLine(), cmp.Or(c.Long, c.Short))
	for _, g := range c.Groups() {
		text += fmt.Sprintf("\n%s\n", g.Title)
		for _, sub := range commandsOf(c, g) {
			text += fmt.Sprintf("  %-12s %s\n", sub.Name(), sub.Short)
		}
	}
	options := c.LocalFlags().FlagUsagesWrapped(helpColumns)
	optionalValue := regexp.MustCompile(`(--\w+) (\w+)\[="true"\]`) // as package pflag shows it
	text += "\nOptions:\n" + optionalValue.ReplaceAllString(options, "$1[=$2]       ")
	if _, err := io.WriteString(os.Stdout, text); err != nil {
		os.Exit(message.Report(err)) // cobra takes no error from here
	}
}

func commandsOf(c *cobra.Command, g *cobra.Group) []*cobra.Command {
	return slices.DeleteFunc(slices.Clone(c.Commands()), func(sub *cobra.Command) bool { return sub.GroupID != g.ID || sub.Hidden })
}

func helpCommand() *cobra.Command {
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

var shells = map[string]func(root *cobra.Command) error{
	"bash": func(root *cobra.Command) error { return root.GenBashCompletionV2(os.Stdout, true) },
	"zsh":  func(root *cobra.Command) error { return root.GenZshCompletion(os.Stdout) },
	"fish": func(root *cobra.Command) error { return root.GenFishCompletion(os.Stdout, true) },
}

// completionCommand is the command that has shells complete commands, options and their values.
func completionCommand() *cobra.Command {
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

// completeOptions has the values of options completed: by the word that stands for the value in the
// help, names of files or directories, or words that are given. Other values are not names of
// files. Shells that are completing show what an option says of itself without the marks.
func completeOptions(c *cobra.Command, words map[string][]string, completing bool) {
	c.Flags().VisitAll(func(f *pflag.Flag) {
		complete := cobra.NoFileCompletions
		value, plain := pflag.UnquoteUsage(f)
		if completing {
			f.Usage = plain
		}
		switch {
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

func manCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "DIRECTORY",
		Short:  "write the manual pages",
		Long:   `Write the manual pages to DIRECTORY/man1 and DIRECTORY/man5, for "make install".`,
		Hidden: true,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) != 1 {
				return message.Usage("man takes a directory")
			}
			return writeManual(c.Root(), args[0])
		},
	}
}

func writeManual(root *cobra.Command, directory string) error {
	write := func(section, name, text string) error {
		name = filepath.Join(directory, "man"+section, name+"."+section)
		return errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(text), 0o644))
	}
	err := write("5", "substitute-eris.toml", configurationPage())
	for _, c := range append(root.Commands(), root) {
		if !c.Hidden && err == nil {
			err = write("1", pageName(c), commandPage(c))
		}
	}
	return err
}

func pageName(c *cobra.Command) string { return strings.ReplaceAll(c.CommandPath(), " ", "-") }

// A manPage is a page in the language of man(7).
type manPage struct{ strings.Builder }

// newManPage begins a page, which needs a line that says what it is about.
func newManPage(title, name string, section int, short string) *manPage {
	p := &manPage{}
	fmt.Fprintf(p, ".TH %s %d\n.nh\n.ad l\n", strings.ToUpper(roff(title)), section)
	p.section("NAME", name+" - "+short)
	return p
}

// section adds a section with a text, of which paragraphs that begin with a space stay as they are,
// but for two columns: a page is indented by itself.
func (p *manPage) section(title, text string) {
	fmt.Fprintf(p, ".SH %s\n", title)
	for i, paragraph := range strings.Split(text, "\n\n") {
		if i > 0 {
			p.WriteString(".PP\n")
		}
		if strings.HasPrefix(paragraph, " ") {
			fmt.Fprintf(p, ".nf\n%s\n.fi\n", roff(strings.ReplaceAll("\n"+paragraph, "\n  ", "\n")[1:]))
		} else if paragraph != "" {
			p.WriteString(roff(paragraph) + "\n")
		}
	}
}

func (p *manPage) term(word, text string) {
	fmt.Fprintf(p, ".TP\n\\fB%s\\fR\n%s\n", roff(word), roff(text))
}

// roff returns a text as it is written in man(7).
func roff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, "-", `\-`, "\n.", "\n\\&.", "\n'", "\n\\&'").Replace("\n" + text)
	return text[1:]
}

func commandPage(c *cobra.Command) string {
	p := newManPage(c.Root().Name(), pageName(c), 1, c.Short)
	p.section("SYNOPSIS", c.UseLine())
	p.section("DESCRIPTION", cmp.Or(c.Long, c.Short))
	for _, g := range c.Groups() {
		p.section(strings.ToUpper(strings.TrimSuffix(g.Title, ":")), "")
		for _, sub := range commandsOf(c, g) {
			p.term(sub.Name(), sub.Short+"; see "+pageName(sub)+"(1)")
		}
	}
	p.section("OPTIONS", "")
	c.InitDefaultHelpFlag()
	c.LocalFlags().VisitAll(func(f *pflag.Flag) {
		value, text := pflag.UnquoteUsage(f)
		name := "--" + f.Name
		if f.Shorthand != "" {
			name = "-" + f.Shorthand + ", " + name
		}
		switch {
		case value == "":
		case f.NoOptDefVal != "":
			name += "[=" + value + "]"
		default:
			name += "=" + value
		}
		if !slices.Contains([]string{"", "false", "[]", "0s"}, f.DefValue) {
			text += " (default " + f.DefValue + ")"
		}
		p.term(name, text)
	})
	p.section("SEE ALSO", c.Root().Name()+"(1), substitute-eris.toml(5)")
	return p.String()
}

// configurationPage is about the settings, in the order of the defaults: a comment that says what a
// setting means, and the setting.
func configurationPage() string {
	p := newManPage("substitute-eris.toml", "substitute-eris.toml", 5, "settings of guix-substitute-eris")
	p.section("DESCRIPTION", "The file "+settings.FileName()+" may have these settings, in the language TOML (https://toml.io).\n"+
		"Each is shown as it is by default, and can be left out. Options of the command line and the environment count more.")
	for entry := range strings.SplitSeq(strings.TrimSpace(settings.Defaults), "\n\n") {
		comment, setting := "", ""
		for line := range strings.Lines(entry) {
			if text, ok := strings.CutPrefix(line, "# "); ok {
				comment += text
			} else {
				setting = strings.TrimLeft(strings.TrimSpace(line), "#") // of those without a default
			}
		}
		p.term(setting, strings.TrimSpace(comment))
	}
	p.section("SEE ALSO", "guix-substitute-eris(1)")
	return p.String()
}
