// SPDX-License-Identifier: Apache-2.0

// Package dockerapi serves the Docker Engine API over HTTP, so that docker's clients work with our images and
// containers as they are. Our own commands are such clients.
//
// It has the endpoints for images, for registries and for containers that run in the foreground. Everything
// else, and every option that is not done, is refused by name; nothing is accepted and ignored. Containers live in
// memory: when the engine ends they are killed and removed.
package dockerapi

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/system"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor"
)

// The API versions that are spoken: clients older than MinVersion or newer than MaxVersion are told so.
const (
	MaxVersion = "1.56"
	MinVersion = "1.24"
)

// Options are the parts that the API is a face of.
type Options struct {
	Images   Images
	Roots    Roots
	Registry Registry
	// Archives may be nil: then images cannot be saved or loaded.
	Archives Archives
	Executor executor.Executor
	// Builder may be nil: then docker's clients cannot build.
	Builder Builder
	// Dir is where containers and volumes are kept, in directories of those names.
	Dir string
	// Version is ours, as /version tells it.
	Version string
	// Rootless is told to clients; NoLimits says that containers cannot be given limits.
	Rootless, NoLimits bool
	// NoEmulation says why programs of an architecture cannot run here, "" when they can; may be nil.
	NoEmulation func(arch string) string
	// Info adds facts for /info, as label and value; may be nil.
	Info func() [][2]string
	// Log may be nil.
	Log *slog.Logger
}

// Server is the API. It is an http.Handler; its methods may be called concurrently.
type Server struct {
	Options
	volumes *volumes

	// ctx ends when the server closes; every container's process runs under it.
	ctx    context.Context
	cancel context.CancelCauseFunc
	alive  sync.WaitGroup // processes

	mu         sync.Mutex // guards what follows
	closed     bool
	containers map[string]*ctr // by ID
	names      map[string]*ctr // by name, without the leading slash
	oomKilled  []*ctr          // those that removed themselves: see noteOOM
}

// New returns a server. What containers an earlier engine left behind in opts.Dir is deleted.
func New(opts Options) (*Server, error) {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{Options: opts, containers: map[string]*ctr{}, names: map[string]*ctr{}}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	if err := os.MkdirAll(opts.Dir, 0o711); err != nil {
		return nil, fmt.Errorf("open the containers: %w", err)
	}
	var err error
	if s.volumes, err = openVolumes(filepath.Join(opts.Dir, "volumes")); err != nil {
		return nil, err
	}
	return s, nil
}

// Running is the number of containers whose process is alive.
func (s *Server) Running() int {
	n := 0
	for _, c := range s.list() {
		if c.summaryState() == container.StateRunning {
			n++
		}
	}
	return n
}

// Close kills all containers, removes them with their anonymous volumes and returns when nothing is left of them.
// Requests that come later are refused.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	for _, c := range s.list() {
		c.streams.finish() // a client that does not read must not hold up the end
	}
	s.cancel(fmt.Errorf("the engine is shutting down"))
	s.alive.Wait()
	var first error
	for _, c := range s.list() {
		if err := s.remove(c, true, true); err != nil && first == nil && status(err) != http.StatusNotFound {
			first = err
		}
	}
	return first
}

// Handles says whether a request of this path belongs to the Docker Engine API.
func Handles(path string) bool {
	return path == "/_ping" || versionPrefix().MatchString(path)
}

var versionPrefix = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^/v([0-9]+)\.([0-9]+)(/|$)`)
})

// request is one call with its path already taken apart.
type request struct {
	*http.Request
	w http.ResponseWriter
	// id is the container, image or volume that the path names.
	id string
}

// bool reads a query parameter as docker does: absent, "", "0", "no", "false" and "none" are false.
func (r *request) bool(name string) bool {
	switch strings.ToLower(strings.TrimSpace(r.URL.Query().Get(name))) {
	case "", "0", "no", "false", "none":
		return false
	}
	return true
}

func (r *request) query(name string) string { return r.URL.Query().Get(name) }

// refuse fails when one of the query parameters is set.
func (r *request) refuse(names ...string) error {
	for _, name := range names {
		if r.bool(name) {
			return unsupported("query parameter " + name)
		}
	}
	return nil
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, hr *http.Request) {
	start := time.Now()
	h := w.Header()
	h.Set("Api-Version", MaxVersion)
	h.Set("Ostype", runtime.GOOS)
	h.Set("Docker-Experimental", "false")
	h.Set("Server", "Slipway/"+s.Version+" ("+runtime.GOOS+")")
	path := hr.URL.Path
	if m := versionPrefix().FindStringSubmatch(path); m != nil {
		if err := checkVersion(m[1], m[2]); err != nil {
			writeError(w, err)
			return
		}
		path = "/" + strings.TrimPrefix(path[len(m[0]):], "/")
	}
	r := &request{Request: hr, w: w}
	err := s.route(r, path)
	if err != nil {
		writeError(w, err)
	}
	s.Log.Debug("docker api", "method", hr.Method, "path", path, "duration", time.Since(start), "error", err)
}

func checkVersion(major, minor string) error {
	text := major + "." + minor
	asked, max, min := versionNumber(text), versionNumber(MaxVersion), versionNumber(MinVersion)
	switch {
	case asked > max:
		return invalid("client version %s is too new. Maximum supported API version is %s", text, MaxVersion)
	case asked < min:
		return invalid("client version %s is too old. Minimum supported API version is %s, please upgrade your client to a newer version", text, MinVersion)
	}
	return nil
}

// versionNumber orders versions: "1.24" is 1024. Numbers too large to read count as very new.
func versionNumber(v string) int {
	major, minor, _ := strings.Cut(v, ".")
	a, err1 := strconv.Atoi(major)
	b, err2 := strconv.Atoi(minor)
	if err1 != nil || err2 != nil || a > 1000 || b > 999 {
		return 1 << 30
	}
	return a*1000 + b
}

// route finds the endpoint. A method returns an error before it has written anything, or writes its own answer.
func (s *Server) route(r *request, path string) error {
	s.mu.Lock()
	closed := s.closed
	s.mu.Unlock()
	if closed {
		return &Error{http.StatusServiceUnavailable, "the engine is shutting down"}
	}
	method := r.Method
	head, rest, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	// Image names have slashes, so what follows them is found from the end.
	id, verb := "", rest
	if i := strings.LastIndexByte(rest, '/'); i >= 0 {
		id, verb = rest[:i], rest[i+1:]
	}
	r.id = id
	switch head {
	case "_ping":
		if method == http.MethodGet || method == http.MethodHead {
			return s.ping(r)
		}
	case "version":
		if method == http.MethodGet {
			return s.version(r)
		}
	case "info":
		if method == http.MethodGet {
			return s.info(r)
		}
	case "grpc":
		if method == http.MethodPost && rest == "" && s.Builder != nil {
			return s.grpc(r)
		}
	case "session":
		if method == http.MethodPost && rest == "" && s.Builder != nil {
			return s.session(r)
		}
	case "auth":
		if method == http.MethodPost {
			return s.auth(r)
		}
	case "images":
		switch {
		case method == http.MethodGet && rest == "json":
			return s.imageList(r)
		case method == http.MethodPost && rest == "create":
			return s.imageCreate(r)
		case method == http.MethodGet && rest == "get" && s.Archives != nil:
			return s.imageSave(r, r.URL.Query()["names"])
		case method == http.MethodGet && verb == "get" && id != "" && s.Archives != nil:
			return s.imageSave(r, []string{id})
		case method == http.MethodPost && rest == "load" && s.Archives != nil:
			return s.imageLoad(r)
		case method == http.MethodGet && verb == "json" && id != "":
			return s.imageInspect(r)
		case method == http.MethodGet && verb == "history" && id != "":
			return s.imageHistory(r)
		case method == http.MethodPost && verb == "tag" && id != "":
			return s.imageTag(r)
		case method == http.MethodPost && verb == "push" && id != "":
			return s.imagePush(r)
		case method == http.MethodDelete && rest != "":
			r.id = rest
			return s.imageRemove(r)
		}
	case "containers":
		switch {
		case method == http.MethodGet && rest == "json":
			return s.containerList(r)
		case method == http.MethodPost && rest == "create":
			return s.containerCreate(r)
		case method == http.MethodDelete && rest != "":
			r.id = rest // clients ask for a container by what may be an image's name, with slashes: it is not found
			return s.containerRemove(r)
		case id == "":
		case method == http.MethodGet && verb == "json":
			return s.containerInspect(r)
		case method == http.MethodPost:
			switch verb {
			case "start":
				return s.containerStart(r)
			case "attach":
				return s.containerAttach(r)
			case "wait":
				return s.containerWait(r)
			case "kill":
				return s.containerKill(r)
			case "stop":
				return s.containerStop(r)
			case "resize":
				return s.containerResize(r)
			}
		}
	}
	return unsupported(method + " " + path)
}

func (s *Server) ping(r *request) error {
	h := r.w.Header()
	h.Set("Builder-Version", "2") // only BuildKit's API builds
	h.Set("Cache-Control", "no-cache, no-store, must-revalidate")
	h.Set("Pragma", "no-cache")
	h.Set("Content-Type", "text/plain; charset=utf-8")
	if r.Method == http.MethodHead {
		h.Set("Content-Length", "0")
		return nil
	}
	_, _ = r.w.Write([]byte("OK"))
	return nil
}

func (s *Server) version(r *request) error {
	kernel := kernelVersion()
	writeJSON(r.w, http.StatusOK, system.VersionResponse{
		Platform:      system.PlatformInfo{Name: "Slipway"},
		Version:       s.Version,
		APIVersion:    MaxVersion,
		MinAPIVersion: MinVersion,
		Os:            runtime.GOOS,
		Arch:          runtime.GOARCH,
		Components: []system.ComponentVersion{{Name: "Engine", Version: s.Version, Details: map[string]string{
			"ApiVersion": MaxVersion, "MinAPIVersion": MinVersion, "Os": runtime.GOOS, "Arch": runtime.GOARCH,
			"GoVersion": runtime.Version(), "KernelVersion": kernel,
		}}},
		GoVersion:     runtime.Version(),
		KernelVersion: kernel,
	})
	return nil
}

func (s *Server) info(r *request) error {
	images, err := s.Images.List(r.Context())
	if err != nil {
		return err
	}
	info := system.Info{
		ID:              "slipway",
		Images:          len(images),
		Driver:          "slipway",
		MemoryLimit:     !s.NoLimits,
		SwapLimit:       !s.NoLimits,
		CPUCfsPeriod:    !s.NoLimits,
		CPUCfsQuota:     !s.NoLimits,
		CPUShares:       !s.NoLimits,
		CPUSet:          !s.NoLimits,
		PidsLimit:       !s.NoLimits,
		IPv4Forwarding:  true,
		NGoroutines:     runtime.NumGoroutine(),
		SystemTime:      time.Now().Format(time.RFC3339Nano),
		LoggingDriver:   "none",
		CgroupDriver:    "cgroupfs",
		CgroupVersion:   "1",
		KernelVersion:   kernelVersion(),
		OperatingSystem: operatingSystem(),
		OSType:          runtime.GOOS,
		Architecture:    machine(),
		NCPU:            runtime.NumCPU(),
		DockerRootDir:   s.Dir,
		Labels:          []string{},
		ServerVersion:   s.Version,
		DefaultRuntime:  "slipway",
		Runtimes:        map[string]system.RuntimeWithStatus{"slipway": {}},
		SecurityOptions: []string{"name=seccomp,profile=builtin"},
		DriverStatus:    [][2]string{},
	}
	info.Swarm.LocalNodeState = "inactive"
	if s.Rootless {
		info.SecurityOptions = append(info.SecurityOptions, "name=rootless")
	}
	if s.NoLimits {
		info.CgroupDriver = "none"
	}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		info.CgroupVersion = "2"
	}
	if name, err := os.Hostname(); err == nil {
		info.Name = name
	}
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err == nil {
		info.MemTotal = int64(si.Totalram) * int64(si.Unit)
	}
	if s.Info != nil {
		info.DriverStatus = s.Info()
	}
	for _, c := range s.list() {
		info.Containers++
		if c.summaryState() == container.StateRunning {
			info.ContainersRunning++
		} else {
			info.ContainersStopped++
		}
	}
	writeJSON(r.w, http.StatusOK, info)
	return nil
}

func uname() unix.Utsname {
	var u unix.Utsname
	_ = unix.Uname(&u) // fails only for a bad address
	return u
}

func kernelVersion() string {
	u := uname()
	return unix.ByteSliceToString(u.Release[:])
}

func machine() string {
	u := uname()
	return unix.ByteSliceToString(u.Machine[:])
}

// operatingSystem is the name that the host gives itself.
func operatingSystem() string {
	data, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "Linux"
	}
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, "PRETTY_NAME="); ok {
			return strings.Trim(strings.TrimSpace(value), `"'`)
		}
	}
	return "Linux"
}
