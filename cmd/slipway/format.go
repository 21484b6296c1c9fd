// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"text/template"
)

// formatter prints values as --format asks for: one JSON document a line, a Go template, or a table of a template's columns, as docker
// has them.
type formatter struct {
	out   io.Writer
	print func(value any, others ...any) error
	table *tabwriter.Writer // nil when there is none
}

// formatEscapes are what docker takes for a tab and a line break in a template, which shells leave as they are.
var formatEscapes = strings.NewReplacer(`\t`, "\t", `\n`, "\n")

// formatter makes a formatter; nil means that the command's own form is wanted. columns are the headings of the fields of what is
// printed, for tables; nil is for values that have none.
func (a *app) formatter(format string, columns map[string]string) (*formatter, error) {
	f := &formatter{out: a.out}
	switch format {
	case "", "table":
		return nil, nil
	case "json":
		f.print = func(value any, _ ...any) error { return a.printJSON(value) }
		return f, nil
	}
	text, table := strings.CutPrefix(format, "table ")
	if table && columns == nil {
		return nil, fmt.Errorf("--format %q: there are no columns to choose from here (use json or the template alone)", format)
	}
	tmpl, err := template.New("").Funcs(templateFuncs).Option("missingkey=error").Parse(formatEscapes.Replace(text))
	if err != nil {
		return nil, fmt.Errorf("--format %q: %w (use json or a Go template)", format, err)
	}
	f.print = func(value any, others ...any) error {
		line, err := execute(tmpl, value, others...)
		if err != nil {
			return fmt.Errorf("--format %q: %w", format, err)
		}
		_, err = f.out.Write(line)
		return err
	}
	if table {
		f.table = tabwriter.NewWriter(a.out, 10, 1, 3, ' ', 0)
		f.out = f.table
		if err := f.print(columns); err != nil {
			return nil, err
		}
	}
	return f, nil
}

// execute is a template's line for a value, or for the first of other forms of the value that the template fits.
func execute(tmpl *template.Template, value any, others ...any) ([]byte, error) {
	var out bytes.Buffer
	err := tmpl.Execute(&out, value)
	for _, other := range others {
		if err == nil {
			break
		}
		out.Reset()
		err = tmpl.Execute(&out, other)
	}
	out.WriteByte('\n')
	return out.Bytes(), err
}

// printAll prints a line for each value.
func printAll[T any](f *formatter, values []T) error {
	var errs []error
	for _, v := range values {
		if err := f.print(v); err != nil {
			errs = append(errs, err)
			break
		}
	}
	if f.table != nil {
		errs = append(errs, f.table.Flush())
	}
	return errors.Join(errs...)
}
