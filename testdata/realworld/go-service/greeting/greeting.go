// SPDX-License-Identifier: Apache-2.0

// Package greeting reads and serves a greeting.
package greeting

import (
	"net/http"
	"os"
	"strings"

	"github.com/google/uuid"
)

// Read returns the greeting in a file.
func Read(path string) (string, error) {
	text, err := os.ReadFile(path)
	return strings.TrimSpace(string(text)), err
}

// Handler serves the greeting in a file, with an ID for each request.
func Handler(path string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		message, err := Read(path)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("X-Request-ID", uuid.NewString())
		w.Write([]byte(message + "\n"))
	})
}
