// SPDX-License-Identifier: Apache-2.0

package dockerapi

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/platforms"
	"github.com/docker/go-units"
	"github.com/moby/moby/api/types"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/sys/signal"
)

// maxBody bounds the JSON of a request.
const maxBody = 16 << 20

func (s *Server) containerCreate(r *request) error {
	ctx := r.Context()
	var req container.CreateRequest
	if err := json.NewDecoder(http.MaxBytesReader(r.w, r.Body, maxBody)).Decode(&req); err != nil {
		return invalid("invalid JSON: %v", err)
	}
	if req.Config == nil || req.Image == "" {
		return invalid("Config.Image is missing: it names the image to run")
	}
	if req.HostConfig == nil {
		req.HostConfig = &container.HostConfig{}
	}
	name := strings.TrimPrefix(r.query("name"), "/")
	if name != "" {
		if err := checkName(name); err != nil {
			return err
		}
	}
	if err := refuseConfig(*req.Config); err != nil {
		return err
	}
	if err := refuseNetworking(req.NetworkingConfig); err != nil {
		return err
	}
	img, err := s.image(r, req.Image)
	if err != nil {
		return err
	}
	cfg, err := img.config()
	if err != nil {
		return err
	}
	if !img.Runnable {
		return notFound("No such image: %s", req.Image) // its manifest is here without its layers: a pull completes it
	}
	var warnings []string
	if text := r.query("platform"); text != "" {
		want, err := platforms.Parse(text)
		if err != nil {
			return invalid("invalid platform %q: %v", text, err)
		}
		if have := platforms.Normalize(cfg.Platform); !platforms.Only(want).Match(have) {
			return notFound("image with reference %s was found but its platform (%s) does not match the specified platform (%s)", req.Image, platforms.Format(have), platforms.Format(want))
		}
	} else if cfg.Platform.Architecture != "" && !platforms.Default().Match(cfg.Platform) {
		warnings = append(warnings, fmt.Sprintf("The requested image's platform (%s) does not match the detected host platform (%s) and no specific platform was requested",
			platforms.Format(cfg.Platform), platforms.DefaultString()))
	}
	if s.NoEmulation != nil && cfg.Platform.Architecture != "" {
		if why := s.NoEmulation(cfg.Platform.Architecture); why != "" {
			warnings = append(warnings, fmt.Sprintf("The image is for %s: %s", platforms.Format(cfg.Platform), why))
		}
	}
	if err := mergeConfig(req.Config, cfg.Config); err != nil {
		return err
	}
	p, err := planContainer(req.Config, req.HostConfig)
	if err != nil {
		return err
	}
	c := &ctr{
		id: newID(), name: name, image: img, imageName: req.Image,
		config: req.Config, host: req.HostConfig, plan: p, created: time.Now(),
		streams: newStreams(req.Tty, req.OpenStdin, req.StdinOnce),
		state:   container.StateCreated,
		next:    &exitEvent{done: make(chan struct{})},
		gone:    make(chan struct{}),
	}
	// The name is taken first: a second request for it must not get as far as making volumes.
	c.op.Lock()
	if err := s.register(c); err != nil {
		c.op.Unlock()
		return err
	}
	err = s.prepare(ctx, c)
	c.op.Unlock()
	if err != nil {
		if cleanup := s.remove(c, true, true); cleanup != nil {
			s.Log.Error("remove container", "container", c.id, "error", cleanup)
		}
		return err
	}
	c.config.Image = req.Image
	writeJSON(r.w, http.StatusCreated, container.CreateResponse{ID: c.id, Warnings: append(append([]string{}, warnings...), p.warnings...)})
	return nil
}

func (s *Server) containerStart(r *request) error {
	if err := r.refuse("checkpoint", "detachKeys"); err != nil {
		return err
	}
	c, err := s.find(r.id)
	if err != nil {
		return err
	}
	if err := s.start(r.Context(), c); err != nil {
		return err
	}
	r.w.WriteHeader(http.StatusNoContent)
	return nil
}

// containerAttach turns the connection into the container's streams.
func (s *Server) containerAttach(r *request) error {
	c, err := s.find(r.id)
	if err != nil {
		return err
	}
	if err := r.refuse("logs", "detachKeys"); err != nil {
		return err
	}
	if !r.bool("stream") {
		return unsupported("attach without stream=1")
	}
	if c.summaryState() == container.StateRemoving {
		return conflict("container %s is marked for removal and cannot be attached to", c.id)
	}
	mediaType := types.MediaTypeMultiplexedStream
	if c.config.Tty || r.Header.Get("Upgrade") == "" {
		mediaType = types.MediaTypeRawStream
	}
	conn, buffered, err := http.NewResponseController(r.w).Hijack()
	if err != nil {
		return fmt.Errorf("attach: take over the connection: %w", err)
	}
	_ = conn.SetDeadline(time.Time{})
	begin := func() error {
		head := "HTTP/1.1 200 OK\r\nContent-Type: " + mediaType + "\r\n\r\n"
		if r.Header.Get("Upgrade") != "" {
			head = "HTTP/1.1 101 UPGRADED\r\nContent-Type: " + mediaType + "\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
		}
		_, err := conn.Write([]byte(head))
		return err
	}
	stdin := r.bool("stdin")
	if err := c.streams.attach(conn, unread(conn, buffered.Reader), stdin, r.bool("stdout"), r.bool("stderr"), begin); err != nil {
		s.Log.Debug("attach", "container", c.id, "error", err)
	}
	return nil
}

// unread is conn with what a reader has taken from it already put back in front.
func unread(conn net.Conn, buffered interface {
	Buffered() int
	Peek(int) ([]byte, error)
},
) io.Reader {
	n := buffered.Buffered()
	if n == 0 {
		return conn
	}
	head, err := buffered.Peek(n)
	if err != nil {
		return conn
	}
	return io.MultiReader(strings.NewReader(string(head)), conn)
}

func (s *Server) containerWait(r *request) error {
	c, err := s.find(r.id)
	if err != nil {
		return err
	}
	c.mu.Lock()
	next, state, exit := c.next, c.state, c.exit
	c.mu.Unlock()
	status := func() exitStatus { return next.status }
	var wait []<-chan struct{}
	switch condition := r.query("condition"); condition {
	case "", string(container.WaitConditionNotRunning):
		if state == container.StateRunning {
			wait = append(wait, next.done)
		} else {
			status = func() exitStatus { return exit }
		}
	case string(container.WaitConditionNextExit):
		wait = append(wait, next.done)
	case string(container.WaitConditionRemoved):
		wait = append(wait, c.gone)
		status = func() exitStatus {
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.exit
		}
	default:
		return invalid("invalid condition: %q", condition)
	}
	// The headers tell the client that its wait has begun, so that it can start the container without missing the end.
	r.w.Header().Set("Content-Type", "application/json")
	r.w.WriteHeader(http.StatusOK)
	_ = http.NewResponseController(r.w).Flush()
	for _, done := range wait {
		select {
		case <-done:
		case <-c.gone:
			// A container that was removed before it ran has no exit to wait for.
			select {
			case <-done:
			default:
				status = func() exitStatus { return exitStatus{err: "the container was removed", lost: true} }
			}
		case <-r.Context().Done():
			return nil
		}
	}
	st := status()
	resp := container.WaitResponse{StatusCode: int64(st.code)}
	if st.lost { // a failed start has told its client already
		resp.Error = &container.WaitExitError{Message: st.err}
	}
	_ = json.NewEncoder(r.w).Encode(resp)
	return nil
}

func (s *Server) containerKill(r *request) error {
	c, err := s.find(r.id)
	if err != nil {
		return err
	}
	sig := syscall.SIGKILL
	if text := r.query("signal"); text != "" {
		if sig, err = signal.ParseSignal(text); err != nil {
			return invalid("%v", err)
		}
	}
	if err := c.signal(sig); err != nil {
		return err
	}
	r.w.WriteHeader(http.StatusNoContent)
	return nil
}

// defaultStopTimeout is docker's.
const defaultStopTimeout = 10 * time.Second

func (s *Server) containerStop(r *request) error {
	c, err := s.find(r.id)
	if err != nil {
		return err
	}
	timeout := defaultStopTimeout
	if t := c.config.StopTimeout; t != nil {
		timeout = time.Duration(*t) * time.Second
	}
	if text := r.query("t"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil {
			return invalid("invalid timeout %q", text)
		}
		timeout = time.Duration(n) * time.Second
	}
	sig := c.plan.stopSignal()
	if text := r.query("signal"); text != "" {
		if sig, err = signal.ParseSignal(text); err != nil {
			return invalid("%v", err)
		}
	}
	if err := s.stop(r.Context(), c, sig, timeout); err != nil {
		return err
	}
	r.w.WriteHeader(http.StatusNoContent)
	return nil
}

func (s *Server) containerResize(r *request) error {
	c, err := s.find(r.id)
	if err != nil {
		return err
	}
	rows, err1 := strconv.ParseUint(r.query("h"), 10, 16)
	cols, err2 := strconv.ParseUint(r.query("w"), 10, 16)
	if err1 != nil || err2 != nil {
		return invalid("invalid terminal size h=%q w=%q", r.query("h"), r.query("w"))
	}
	c.mu.Lock()
	process := c.process
	c.mu.Unlock()
	if process == nil {
		return conflict("cannot resize a stopped container: %s", c.id)
	}
	if err := process.Resize(uint16(rows), uint16(cols)); err != nil {
		return fmt.Errorf("resize container %s: %w", c.name, err)
	}
	return nil
}

func (s *Server) containerRemove(r *request) error {
	if err := r.refuse("link"); err != nil {
		return err
	}
	c, err := s.find(r.id)
	if err != nil {
		return err
	}
	if err := s.remove(c, r.bool("force"), r.bool("v")); err != nil {
		return err
	}
	r.w.WriteHeader(http.StatusNoContent)
	return nil
}

// ports are the published ports, with the host's ports filled in while the container runs, and the exposed ones.
func (c *ctr) ports() network.PortMap {
	out := network.PortMap{}
	for port := range c.config.ExposedPorts {
		out[port] = nil
	}
	c.mu.Lock()
	process := c.process
	c.mu.Unlock()
	if process == nil {
		return out
	}
	for _, p := range process.Ports() {
		port, ok := network.PortFrom(p.ContainerPort, network.IPProtocol(p.Protocol))
		if !ok {
			continue
		}
		ip := netip.IPv4Unspecified()
		if addr, err := netip.ParseAddr(p.HostIP); err == nil {
			ip = addr
		}
		out[port] = append(out[port], network.PortBinding{HostIP: ip, HostPort: strconv.Itoa(int(p.HostPort))})
	}
	return out
}

// endpoints are the networks that the container is in.
func (c *ctr) endpoints() map[string]*network.EndpointSettings {
	name := string(c.plan.spec.Network)
	e := &network.EndpointSettings{}
	c.mu.Lock()
	process := c.process
	c.mu.Unlock()
	if process != nil {
		if addr, err := netip.ParseAddr(process.IP()); err == nil {
			e.IPAddress = addr
		}
	}
	return map[string]*network.EndpointSettings{name: e}
}

// timestamp is docker's form, which has a fixed text for never.
func timestamp(t time.Time) string {
	if t.IsZero() {
		return "0001-01-01T00:00:00Z"
	}
	return t.UTC().Format(time.RFC3339Nano)
}

func (s *Server) containerInspect(r *request) error {
	if err := r.refuse("size"); err != nil {
		return err
	}
	c, err := s.findOrOOM(r.id)
	if err != nil {
		return err
	}
	ports, endpoints := c.ports(), c.endpoints()
	c.mu.Lock()
	defer c.mu.Unlock()
	args := c.plan.spec.Args
	res := container.InspectResponse{
		ID:       c.id,
		Created:  timestamp(c.created),
		Path:     args[0],
		Args:     append([]string{}, args[1:]...),
		Image:    c.image.ID.String(),
		Name:     "/" + c.name,
		Driver:   "slipway",
		Platform: "linux",
		State: &container.State{
			Status: c.state, Running: c.state == container.StateRunning, OOMKilled: c.exit.oom,
			ExitCode: c.exit.code, Error: c.exit.err, StartedAt: timestamp(c.started), FinishedAt: timestamp(c.finished),
		},
		HostConfig: c.host,
		Mounts:     append([]container.MountPoint{}, c.mounts...),
		Config:     c.config,
		NetworkSettings: &container.NetworkSettings{
			Ports: ports, Networks: endpoints,
		},
	}
	if c.config.Hostname == "" {
		shown := *c.config
		shown.Hostname = c.hostname()
		res.Config = &shown
	}
	writeJSON(r.w, http.StatusOK, res)
	return nil
}

// status is what docker ps shows.
func (c *ctr) statusText(now time.Time) string {
	switch c.state {
	case container.StateRunning:
		return "Up " + units.HumanDuration(now.Sub(c.started))
	case container.StateExited:
		return fmt.Sprintf("Exited (%d) %s ago", c.exit.code, units.HumanDuration(now.Sub(c.finished)))
	case container.StateRemoving:
		return "Removal In Progress"
	}
	return "Created"
}

func (s *Server) containerList(r *request) error {
	if err := r.refuse("size"); err != nil {
		return err
	}
	filters, err := parseFilters(r.query("filters"), "id", "name", "status", "label", "exited", "ancestor", "before", "since", "network")
	if err != nil {
		return err
	}
	all := r.bool("all") || len(filters["status"]) > 0 || len(filters["exited"]) > 0
	limit := 0
	if text := r.query("limit"); text != "" {
		if limit, err = strconv.Atoi(text); err != nil {
			return invalid("invalid limit %q", text)
		}
		all = all || limit > 0
	}
	var before, since time.Time
	for _, bound := range []struct {
		filter string
		at     *time.Time
	}{{"before", &before}, {"since", &since}} {
		for _, ref := range filters[bound.filter] {
			c, err := s.find(ref)
			if err != nil {
				return err
			}
			*bound.at = c.created
		}
	}
	now := time.Now()
	out := []container.Summary{}
	for _, c := range s.list() {
		ok, err := s.matches(r.Context(), c, filters)
		if err != nil {
			return err
		}
		if !ok || !before.IsZero() && !c.created.Before(before) || !since.IsZero() && !c.created.After(since) {
			continue
		}
		ports := portSummaries(c.ports())
		endpoints := c.endpoints()
		c.mu.Lock()
		if !all && c.state != container.StateRunning {
			c.mu.Unlock()
			continue
		}
		sum := container.Summary{
			ID:              c.id,
			Names:           []string{"/" + c.name},
			Image:           c.imageName,
			ImageID:         c.image.ID.String(),
			Command:         strings.Join(c.plan.spec.Args, " "),
			Created:         c.created.Unix(),
			Ports:           ports,
			Labels:          c.config.Labels,
			State:           c.state,
			Status:          c.statusText(now),
			NetworkSettings: &container.NetworkSettingsSummary{Networks: endpoints},
			Mounts:          append([]container.MountPoint{}, c.mounts...),
		}
		sum.HostConfig.NetworkMode = string(c.host.NetworkMode)
		c.mu.Unlock()
		if sum.Labels == nil {
			sum.Labels = map[string]string{}
		}
		out = append(out, sum)
		if limit > 0 && len(out) == limit {
			break
		}
	}
	writeJSON(r.w, http.StatusOK, out)
	return nil
}

// matches applies the filters that look at one container.
func (s *Server) matches(ctx context.Context, c *ctr, filters map[string][]string) (bool, error) {
	any := func(name string, match func(string) bool) bool {
		values := filters[name]
		return len(values) == 0 || slices.ContainsFunc(values, match)
	}
	c.mu.Lock()
	state, exit := c.state, c.exit
	c.mu.Unlock()
	for _, value := range filters["status"] {
		if err := container.ValidateContainerState(container.ContainerState(value)); err != nil {
			return false, invalid("invalid filter 'status=%s'", value)
		}
	}
	for _, value := range filters["exited"] {
		if _, err := strconv.Atoi(value); err != nil {
			return false, invalid("invalid filter 'exited=%s'", value)
		}
	}
	images := map[string]bool{}
	for _, value := range filters["ancestor"] {
		if img, err := s.Images.Get(ctx, value); err == nil {
			images[img.ID.String()] = true
		}
	}
	return any("id", func(v string) bool { return strings.HasPrefix(c.id, v) }) &&
		any("name", func(v string) bool {
			v = strings.TrimPrefix(v, "/")
			ok, err := path.Match(v, c.name)
			return strings.Contains(c.name, strings.Trim(v, "^$")) && !strings.HasPrefix(v, "^") || err == nil && ok || strings.Trim(v, "^/$") == c.name
		}) &&
		any("status", func(v string) bool { return string(state) == v }) &&
		any("exited", func(v string) bool {
			return state == container.StateExited && strconv.Itoa(exit.code) == v
		}) &&
		any("network", func(v string) bool { return string(c.plan.spec.Network) == v }) &&
		(len(filters["ancestor"]) == 0 || images[c.image.ID.String()]) &&
		matchLabels(filters["label"], c.config.Labels), nil
}

func portSummaries(ports network.PortMap) []container.PortSummary {
	out := []container.PortSummary{}
	for _, port := range slices.SortedFunc(maps.Keys(ports), func(a, b network.Port) int { return strings.Compare(a.String(), b.String()) }) {
		p := container.PortSummary{PrivatePort: port.Num(), Type: string(port.Proto())}
		if len(ports[port]) == 0 {
			out = append(out, p)
		}
		for _, b := range ports[port] {
			n, _ := strconv.ParseUint(b.HostPort, 10, 16)
			p.IP, p.PublicPort = b.HostIP, uint16(n)
			out = append(out, p)
		}
	}
	return out
}
