// SPDX-License-Identifier: Apache-2.0

// Command service serves one Markdown page as HTML: what the demo builds, pushes, runs and fetches.
package main

import (
	"bytes"
	"log"
	"net/http"
	"os"

	"github.com/yuin/goldmark"
)

func main() {
	source, err := os.ReadFile("/page.md")
	if err != nil {
		log.Fatal(err)
	}
	var page bytes.Buffer
	page.WriteString("<!doctype html><title>Slipway demo</title>\n")
	if err := goldmark.Convert(source, &page); err != nil {
		log.Fatal(err)
	}
	http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.Write(page.Bytes())
	})
	log.Fatal(http.ListenAndServe(":"+os.Getenv("PORT"), nil))
}
