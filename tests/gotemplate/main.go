// What Ollama makes of a template and a chat, done with Go's own text/template.
//
//	printf '{"template": "...", "messages": [{"role": "user", "content": "..."}]}' | gotemplate
//	gotemplate printable    # the ranges of code points that strconv.IsPrint accepts
//
// Written from the behaviour of ollama template/template.go: messages of one role in a row are
// joined by a blank line; a template that names .Messages runs once; any other runs once a turn,
// gets {{ .Response }} appended if it has none, and is cut after .Response in the last turn.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/template"
	"text/template/parse"
	"unicode"
)

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type request struct {
	Template string    `json:"template"`
	Messages []message `json:"messages"`
	Prompt   string    `json:"prompt"`
	Suffix   string    `json:"suffix"`
}

type turn struct{ system, prompt, response string }

func (t turn) values() map[string]interface{} {
	return map[string]interface{}{"System": t.system, "Prompt": t.prompt, "Response": t.response}
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == "printable" {
		printable()
		return
	}
	var r request
	check(json.NewDecoder(os.Stdin).Decode(&r))
	check(r.render(os.Stdout))
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func (r request) render(out io.Writer) error {
	if !names(parsed(r.Template).Root, "Messages") && !names(parsed(r.Template).Root, "Response") {
		r.Template += "{{ .Response }}"
	}
	if r.Prompt != "" && r.Suffix != "" {
		return run(out, parsed(r.Template), map[string]interface{}{
			"Prompt": r.Prompt, "Suffix": r.Suffix, "Response": "",
		})
	}
	messages := joined(r.Messages)
	if names(parsed(r.Template).Root, "Messages") {
		return run(out, parsed(r.Template), map[string]interface{}{
			"System": systemOf(r.Messages), "Messages": messages, "Response": "",
		})
	}
	turns := turnsOf(messages)
	last := len(turns) - 1
	for _, t := range turns[:last] {
		if err := run(out, parsed(r.Template), t.values()); err != nil {
			return err
		}
	}
	tree := parsed(r.Template)
	cutAfterResponse(tree.Root)
	return run(out, tree, turns[last].values())
}

func parsed(text string) *parse.Tree {
	t, err := template.New("").Parse(text)
	check(err)
	return t.Tree
}

func run(out io.Writer, tree *parse.Tree, values map[string]interface{}) error {
	t, err := template.New("").AddParseTree("", tree)
	if err != nil {
		return err
	}
	return t.Execute(out, values)
}

// joined merges neighbours of one role.
func joined(messages []message) []message {
	var out []message
	for _, m := range messages {
		if n := len(out); n > 0 && out[n-1].Role == m.Role {
			out[n-1].Content += "\n\n" + m.Content
		} else {
			out = append(out, m)
		}
	}
	return out
}

func systemOf(messages []message) string {
	var texts []string
	for _, m := range messages {
		if m.Role == "system" {
			texts = append(texts, m.Content)
		}
	}
	return strings.Join(texts, "\n\n")
}

// turnsOf deals messages out to turns; the last turn is the open one.
func turnsOf(messages []message) []turn {
	turns := []turn{{}}
	for _, m := range messages {
		t := &turns[len(turns)-1]
		closes := m.Role == "system" && (t.prompt != "" || t.response != "") ||
			m.Role == "user" && t.response != ""
		if closes {
			turns = append(turns, turn{})
			t = &turns[len(turns)-1]
		}
		switch m.Role {
		case "system":
			t.system = m.Content
		case "user":
			t.prompt = m.Content
		case "assistant":
			t.response = m.Content
		}
	}
	return turns
}

// names tells whether a part of a template mentions a field.
func names(node parse.Node, field string) bool {
	switch n := node.(type) {
	case *parse.ListNode:
		if n == nil {
			return false
		}
		for _, child := range n.Nodes {
			if names(child, field) {
				return true
			}
		}
	case *parse.ActionNode:
		return names(n.Pipe, field)
	case *parse.IfNode:
		return branchNames(&n.BranchNode, field)
	case *parse.WithNode:
		return branchNames(&n.BranchNode, field)
	case *parse.RangeNode:
		return branchNames(&n.BranchNode, field)
	case *parse.PipeNode:
		for _, command := range n.Cmds {
			for _, arg := range command.Args {
				if names(arg, field) {
					return true
				}
			}
		}
	case *parse.FieldNode:
		for _, ident := range n.Ident {
			if strings.EqualFold(ident, field) {
				return true
			}
		}
	}
	return false
}

func branchNames(n *parse.BranchNode, field string) bool {
	return names(n.Pipe, field) || names(n.List, field) || names(n.ElseList, field)
}

// cutAfterResponse drops everything behind {{ .Response }} and tells whether it was found.
func cutAfterResponse(list *parse.ListNode) bool {
	for i, node := range list.Nodes {
		found := false
		switch n := node.(type) {
		case *parse.ActionNode:
			found = names(n, "Response")
		case *parse.IfNode:
			found = cutAfterResponse(n.List)
		}
		if found {
			list.Nodes = list.Nodes[:i+1]
			return true
		}
	}
	return false
}

func printable() {
	start := rune(-1)
	for r := rune(0); r <= unicode.MaxRune+1; r++ {
		ok := r <= unicode.MaxRune && strconv.IsPrint(r)
		if ok && start < 0 {
			start = r
		} else if !ok && start >= 0 {
			fmt.Println(start, r)
			start = -1
		}
	}
}
