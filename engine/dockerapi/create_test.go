// SPDX-License-Identifier: Apache-2.0

package dockerapi

import (
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/executor"
)

func TestMergeConfig(t *testing.T) {
	img := dockerspec.DockerOCIImageConfig{ImageConfig: ocispec.ImageConfig{
		Entrypoint: []string{"ep"}, Cmd: []string{"cmd"}, User: "u", WorkingDir: "/w", StopSignal: "SIGINT",
		Env: []string{"A=1", "B=2", "C=3"}, Labels: map[string]string{"l": "image", "m": "image"}, ExposedPorts: map[string]struct{}{"80/tcp": {}},
	}}
	for _, tt := range []struct {
		name string
		user container.Config
		args []string
	}{
		{"all from the image", container.Config{}, []string{"ep", "cmd"}},
		{"own command", container.Config{Cmd: []string{"x"}}, []string{"ep", "x"}},
		{"own entrypoint drops the command", container.Config{Entrypoint: []string{"e"}}, []string{"e"}},
		{"both", container.Config{Entrypoint: []string{"e"}, Cmd: []string{"x"}}, []string{"e", "x"}},
		{"no entrypoint", container.Config{Entrypoint: []string{""}, Cmd: []string{"x"}}, []string{"x"}},
	} {
		if err := mergeConfig(&tt.user, img); err != nil {
			t.Fatal(err)
		}
		if got := append(slices.Clone(tt.user.Entrypoint), tt.user.Cmd...); !slices.Equal(got, tt.args) {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.args)
		}
	}
	c := container.Config{Env: []string{"B=own", "C", "D=4"}, Labels: map[string]string{"l": "own"}, User: "me"}
	if err := mergeConfig(&c, img); err != nil {
		t.Fatal(err)
	}
	if want := []string{"A=1", "B=own", "D=4"}; !slices.Equal(c.Env, want) {
		t.Errorf("env %q, want %q", c.Env, want)
	}
	if c.Labels["l"] != "own" || c.Labels["m"] != "image" || c.User != "me" || c.WorkingDir != "/w" || c.StopSignal != "SIGINT" || len(c.ExposedPorts) != 1 {
		t.Errorf("merged: %+v", c)
	}
}

// Every field that docker's clients can set is either done or refused; what they send when nothing is asked for is accepted.
func TestRefusedOptions(t *testing.T) {
	for _, tt := range []struct{ host, want string }{
		{`{}`, ""},
		{`{"NetworkMode":"default","RestartPolicy":{"Name":"no"},"MemorySwappiness":-1,"OomKillDisable":false,"PidsLimit":0,"LogConfig":{"Type":"","Config":{}},
			"ConsoleSize":[24,80],"Dns":[],"Devices":[],"BlkioWeightDevice":[],"MaskedPaths":null,"IpcMode":"","Binds":null,"VolumesFrom":null}`, ""},
		{`{"Dns":["192.0.2.1"],"DnsSearch":["x"],"DnsOptions":["ndots:1"],"SecurityOpt":["seccomp=unconfined","label=disable"]}`, ""},
		{`{"RestartPolicy":{"Name":"always"}}`, "RestartPolicy"},
		{`{"VolumesFrom":["x"]}`, "VolumesFrom"},
		{`{"PidMode":"host"}`, "PidMode"},
		{`{"IpcMode":"host"}`, "IpcMode"},
		{`{"CgroupnsMode":"host"}`, "CgroupnsMode"},
		{`{"Devices":[{"PathOnHost":"/dev/fuse"}]}`, "HostConfig.Devices"},
		{`{"Sysctls":{"a":"b"}}`, "Sysctls"},
		{`{"MemorySwappiness":10}`, "MemorySwappiness"},
		{`{"MemoryReservation":10000000}`, "MemoryReservation"},
		{`{"OomKillDisable":true}`, "OomKillDisable"},
		{`{"OomScoreAdj":5}`, "OomScoreAdj"},
		{`{"MaskedPaths":[]}`, "MaskedPaths"},
		{`{"Links":["a:b"]}`, "Links"},
		{`{"LogConfig":{"Type":"syslog"}}`, "LogConfig"},
		{`{"StorageOpt":{"size":"1G"}}`, "StorageOpt"},
		{`{"UTSMode":"host"}`, "UTSMode"},
		{`{"Runtime":"kata"}`, "Runtime"},
		{`{"BlkioWeight":10}`, "BlkioWeight"},
		{`{"DeviceRequests":[{"Count":-1}]}`, "DeviceRequests"},
		{`{"NetworkMode":"container:x"}`, "NetworkMode"},
		{`{"SecurityOpt":["seccomp={}","apparmor=unconfined","label:disable","seccomp=builtin","no-new-privileges:false"]}`, ""},
		{`{"SecurityOpt":["label=type:t"]}`, "SecurityOpt"},
		{`{"SecurityOpt":["systempaths=unconfined"]}`, "systempaths"},
		{`{"SecurityOpt":["apparmor=mine"]}`, "SecurityOpt"},
		{`{"ExtraHosts":["h:host-gateway"]}`, ""},
		{`{"PortBindings":{"80/sctp":[{}]}}`, "80/sctp"},
		{`{"PortBindings":{"80/tcp":[{"HostPort":"8000-8010"}]}}`, ""},
		{`{"Binds":["/a:/b:rshared"]}`, "propagation"},
		{`{"Mounts":[{"Type":"image","Source":"x","Target":"/y"}]}`, "mounts of type"},
		{`{"Mounts":[{"Type":"bind","Source":"/x","Target":"/y","ReadOnly":true,"BindOptions":{"ReadOnlyNonRecursive":true}}]}`, "BindOptions.ReadOnlyNonRecursive"},
		{`{"Tmpfs":{"/t":"uid=5"}}`, "tmpfs option"},
	} {
		var h container.HostConfig
		if err := json.Unmarshal([]byte(tt.host), &h); err != nil {
			t.Fatalf("%s: %v", tt.host, err)
		}
		_, err := planContainer(&container.Config{Cmd: []string{"x"}, WorkingDir: "/"}, &h)
		switch {
		case tt.want == "" && err != nil:
			t.Errorf("%s: %v", tt.host, err)
		case tt.want != "" && (err == nil || status(err) != http.StatusNotImplemented || !strings.Contains(err.Error(), "not supported yet") || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%s: %v, want a refusal that names %s", tt.host, err, tt.want)
		}
	}
	if err := refuseConfig(container.Config{Domainname: "d"}); err == nil || !strings.Contains(err.Error(), "Config.Domainname") {
		t.Errorf("Domainname: %v", err)
	}
	if err := refuseConfig(container.Config{Healthcheck: &container.HealthConfig{Test: []string{"CMD", "x"}}}); err == nil {
		t.Error("a health check was accepted")
	}
}

func TestPlan(t *testing.T) {
	var h container.HostConfig
	if err := json.Unmarshal([]byte(`{"Binds":["/src/../a:/x/y:ro","vol:/x"],"Tmpfs":{"/x/y/z":"size=2m,ro"},
		"PortBindings":{"53/udp":[{"HostIp":"127.0.0.1","HostPort":"5353"}],"80/tcp":[{"HostPort":"8080"},{"HostIp":"0.0.0.0"},{"HostIp":"::","HostPort":"90-99"}]},
		"ExtraHosts":["a:1.2.3.4","b=[::1]"],"CapAdd":["net_admin"],"CapDrop":["ALL"],"NanoCpus":1500000000,"Memory":8388608,"PidsLimit":9,"SecurityOpt":["no-new-privileges"]}`), &h); err != nil {
		t.Fatal(err)
	}
	p, err := planContainer(&container.Config{Cmd: []string{"x"}, WorkingDir: "/w/../v", StopSignal: "USR1", Volumes: map[string]struct{}{"/x/": {}, "/anon": {}}}, &h)
	if err != nil {
		t.Fatal(err)
	}
	s := p.spec
	if want := []executor.Port{
		{HostIP: "127.0.0.1", HostPort: 5353, ContainerPort: 53, Protocol: "udp"},
		{HostPort: 8080, ContainerPort: 80, Protocol: "tcp"},
		{HostIP: "0.0.0.0", ContainerPort: 80, Protocol: "tcp"},
		{HostIP: "::", HostPort: 90, HostPortEnd: 99, ContainerPort: 80, Protocol: "tcp"},
	}; !slices.Equal(s.Ports, want) {
		t.Errorf("ports %+v, want %+v", s.Ports, want)
	}
	if want := []executor.HostEntry{{Host: "a", IP: "1.2.3.4"}, {Host: "b", IP: "::1"}}; !slices.Equal(s.ExtraHosts, want) {
		t.Errorf("hosts %+v", s.ExtraHosts)
	}
	if s.Cwd != "/v" || s.StopSignal.String() != "user defined signal 1" || !s.NoNewPrivileges || !slices.Equal(s.CapAdd, []string{"CAP_NET_ADMIN"}) ||
		s.Resources != (executor.Resources{MemoryBytes: 8 << 20, CPUPeriod: 100_000, CPUQuota: 150_000, PidsLimit: 9}) {
		t.Errorf("spec %+v", s)
	}
	want := []plannedMount{
		{kind: mount.TypeVolume, target: "/anon", copyUp: true},
		{kind: mount.TypeVolume, source: "vol", target: "/x", recursive: true, copyUp: true},
		{kind: mount.TypeBind, source: "/a", target: "/x/y", readonly: true, create: true, recursive: true, copyUp: true, optional: "ro"},
		{kind: mount.TypeTmpfs, target: "/x/y/z", readonly: true, size: 2 << 20, optional: "size=2m,ro"},
	}
	if d := cmp.Diff(want, p.mounts, cmp.AllowUnexported(plannedMount{})); d != "" {
		t.Error(d)
	}
	for bad, want := range map[string]string{
		`{"Binds":["/a:/x","/b:/x/"]}`: "Duplicate mount point: /x", `{"Binds":["/a:rel"]}`: "must be absolute", `{"Binds":["/a:/"]}`: "destination can't be '/'",
		`{"Binds":["./a:/x"]}`: "includes invalid characters", `{"Binds":["/a:/b:wat"]}`: "invalid mode", `{"Binds":["a:b:c:d"]}`: "invalid volume specification",
		`{"PortBindings":{"80/tcp":[{"HostPort":"90-80"}]}}`: "invalid port specification", `{"PortBindings":{"80/tcp":[{"HostPort":"0-80"}]}}`: "invalid port specification",
		`{"PortBindings":{"80/tcp":[{"HostPort":"90/tcp"}]}}`: "invalid port specification", `{"PortBindings":{"80/tcp":[{"HostPort":"70000"}]}}`: "invalid port specification",
		`{"CapAdd":["NONSENSE"]}`: "invalid capability", `{"Memory":1000}`: "Minimum memory limit", `{"ExtraHosts":["x"]}`: "invalid extra host",
		`{"Mounts":[{"Type":"bind","Source":"rel","Target":"/x"}]}`: "mount path must be absolute", `{"Mounts":[{"Type":"tmpfs","Source":"/x","Target":"/x"}]}`: "Source must not be specified",
	} {
		var h container.HostConfig
		if err := json.Unmarshal([]byte(bad), &h); err != nil {
			t.Fatal(err)
		}
		if _, err := planContainer(&container.Config{Cmd: []string{"x"}, WorkingDir: "/"}, &h); err == nil || status(err) != 400 || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", bad, err, want)
		}
	}
}

func FuzzParseBind(f *testing.F) {
	for _, s := range []string{"/a:/b", "/a:/b:ro,z", "v:/b:nocopy", "/b", "::", "a:b:c:d"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		m, err := parseBind(text)
		if err != nil {
			return
		}
		// A bind source is absolute; a volume's name cannot leave the directory of volumes.
		if m.kind == mount.TypeBind && !strings.HasPrefix(m.source, "/") || m.kind == mount.TypeVolume && (strings.ContainsAny(m.source, "/\x00") || strings.HasPrefix(m.source, ".")) {
			t.Errorf("%q: %+v", text, m)
		}
	})
}
