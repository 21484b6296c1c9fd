// SPDX-License-Identifier: Apache-2.0

package dockerapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/common"

	"github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/registry"
)

// Error is an answer other than success: an HTTP status and the line that the user reads.
type Error struct {
	Status  int
	Message string
}

func (e *Error) Error() string { return e.Message }

func notFound(format string, args ...any) error {
	return &Error{http.StatusNotFound, fmt.Sprintf(format, args...)}
}

func conflict(format string, args ...any) error {
	return &Error{http.StatusConflict, fmt.Sprintf(format, args...)}
}

func invalid(format string, args ...any) error {
	return &Error{http.StatusBadRequest, fmt.Sprintf(format, args...)}
}

// unsupported refuses something that docker has and we do not: what names it.
func unsupported(what string) error {
	return &Error{http.StatusNotImplemented, "not supported yet: " + what}
}

// status is the HTTP status of err.
func status(err error) int {
	var e *Error
	switch {
	case errors.As(err, &e):
		return e.Status
	case errors.Is(err, image.ErrNotFound), errors.Is(err, registry.ErrNotFound), errdefs.IsNotFound(err):
		return http.StatusNotFound
	case errors.Is(err, image.ErrAmbiguous), errors.Is(err, image.ErrInvalidName), errdefs.IsInvalidArgument(err):
		return http.StatusBadRequest
	case errors.Is(err, image.ErrConflict), errdefs.IsConflict(err), errdefs.IsAlreadyExists(err):
		return http.StatusConflict
	case errors.Is(err, registry.ErrUnauthorized), errdefs.IsUnauthorized(err):
		return http.StatusUnauthorized
	case errors.Is(err, registry.ErrDenied), errdefs.IsPermissionDenied(err):
		return http.StatusForbidden
	case errdefs.IsNotImplemented(err):
		return http.StatusNotImplemented
	case errors.Is(err, registry.ErrUnavailable), errdefs.IsUnavailable(err):
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}

// errNotModified answers a request for what is so already.
var errNotModified = &Error{Status: http.StatusNotModified}

func writeError(w http.ResponseWriter, err error) {
	if err == error(errNotModified) {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	writeJSON(w, status(err), common.ErrorResponse{Message: err.Error()})
}

// writeJSON writes one JSON document. A client that has gone away is no error.
func writeJSON(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(v)
}
