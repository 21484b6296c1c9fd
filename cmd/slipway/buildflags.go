// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/platforms"
	"github.com/docker/go-units"
	bkclient "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	spb "github.com/moby/buildkit/sourcepolicy/pb"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/pflag"
)

// stepOptions are the flags of build that say how RUN steps run.
type stepOptions struct {
	shmSize      string
	ulimits      []string
	cgroupParent string
	memory       string
	memorySwap   string
	cpuShares    uint64
	cpuPeriod    uint64
	cpuQuota     int64
	cpusetCPUs   string
	cpusetMems   string
}

func (o *stepOptions) addFlags(f *pflag.FlagSet) {
	f.StringVar(&o.shmSize, "shm-size", "", "size of /dev/shm in RUN steps")
	f.StringArrayVar(&o.ulimits, "ulimit", nil, "limit of RUN steps: NAME=SOFT[:HARD]")
	f.StringVar(&o.cgroupParent, "cgroup-parent", "", "cgroup of RUN steps, below the engine's own")
	f.StringVarP(&o.memory, "memory", "m", "", "memory limit of a RUN step")
	f.StringVar(&o.memorySwap, "memory-swap", "", "limit of memory and swap together, -1 for unlimited swap")
	f.Uint64VarP(&o.cpuShares, "cpu-shares", "c", 0, "CPU shares of a RUN step (relative weight)")
	f.Uint64Var(&o.cpuPeriod, "cpu-period", 0, "CPU period of a RUN step, in microseconds")
	f.Int64Var(&o.cpuQuota, "cpu-quota", 0, "CPU quota of a RUN step per period, in microseconds")
	f.StringVar(&o.cpusetCPUs, "cpuset-cpus", "", "CPUs for RUN steps (0-3, 0,1)")
	f.StringVar(&o.cpusetMems, "cpuset-mems", "", "memory nodes for RUN steps (0-3, 0,1)")
}

func (o *stepOptions) addAttrs(attrs map[string]string) error {
	bytes := func(flag, attr, text string) error {
		if text == "" {
			return nil
		}
		n, err := units.RAMInBytes(text)
		if err != nil {
			return fmt.Errorf("--%s %s: %w", flag, text, err)
		}
		attrs[attr] = strconv.FormatInt(n, 10)
		return nil
	}
	if err := bytes("shm-size", "shm-size", o.shmSize); err != nil {
		return err
	}
	if err := bytes("memory", "memory", o.memory); err != nil {
		return err
	}
	if o.memorySwap == "-1" {
		attrs["memswap"] = "-1"
	} else if err := bytes("memory-swap", "memswap", o.memorySwap); err != nil {
		return err
	}
	var limits []string
	for _, text := range o.ulimits {
		u, err := units.ParseUlimit(text)
		if err != nil {
			return fmt.Errorf("--ulimit %s: %w", text, err)
		}
		limits = append(limits, u.String())
	}
	if len(limits) > 0 {
		attrs["ulimit"] = strings.Join(limits, ",")
	}
	for attr, value := range map[string]string{
		"cgroup-parent": o.cgroupParent, "cpusetcpus": o.cpusetCPUs, "cpusetmems": o.cpusetMems,
		"cpushares": number(o.cpuShares), "cpuperiod": number(o.cpuPeriod), "cpuquota": number(o.cpuQuota),
	} {
		if value != "" {
			attrs[attr] = value
		}
	}
	return nil
}

// number is "" for 0, which means that a flag was not given.
func number[T int64 | uint64](n T) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprint(n)
}

// annotationFlag is TYPE,TYPE[PLATFORM]:KEY=VALUE of --annotation, the part before the colon being optional.
var annotationFlag = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^(?:((?:[a-z-]+(?:\[[A-Za-z0-9_/.-]+\])?,?)+):)?([^=\s]+)=(.*)$`)
})

var annotationLevel = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^([a-z-]+)(?:\[([A-Za-z0-9_/.-]+)\])?$`)
})

// annotations translates --annotation into attributes of outputs.
func annotations(flags []string) (map[string]string, error) {
	attrs := map[string]string{}
	for _, flag := range flags {
		m := annotationFlag().FindStringSubmatch(flag)
		if m == nil {
			return nil, fmt.Errorf("--annotation %s: want [TYPE[PLATFORM]:]KEY=VALUE", flag)
		}
		levels := []string{exptypes.AnnotationManifest}
		if m[1] != "" {
			levels = strings.Split(strings.TrimSuffix(m[1], ","), ",")
		}
		for _, level := range levels {
			l := annotationLevel().FindStringSubmatch(level)
			key := exptypes.AnnotationKey{Type: l[1], Key: m[2]}
			switch key.Type {
			case exptypes.AnnotationManifest, exptypes.AnnotationManifestDescriptor, exptypes.AnnotationIndex, exptypes.AnnotationIndexDescriptor:
			default:
				return nil, fmt.Errorf("--annotation %s: %q is not one of manifest, manifest-descriptor, index, index-descriptor", flag, key.Type)
			}
			if l[2] != "" {
				p, err := platforms.Parse(l[2])
				if err != nil {
					return nil, fmt.Errorf("--annotation %s: %w", flag, err)
				}
				key.Platform = &ocispec.Platform{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant}
			}
			attrs[key.String()] = m[3]
		}
	}
	return attrs, nil
}

// annotate gives the annotations to all outputs that are images.
func (o *buildOptions) annotate(exports []bkclient.ExportEntry) error {
	attrs, err := annotations(o.annotations)
	if err != nil || len(attrs) == 0 {
		return err
	}
	taken := false
	for i := range exports {
		switch exports[i].Type {
		case bkclient.ExporterImage, bkclient.ExporterOCI, bkclient.ExporterDocker, "registry":
		default:
			continue
		}
		taken = true
		if exports[i].Attrs == nil {
			exports[i].Attrs = map[string]string{}
		}
		for k, v := range attrs {
			exports[i].Attrs[k] = v
		}
	}
	if !taken {
		return errors.New("--annotation: none of the outputs is an image")
	}
	return nil
}

// policyEnv names a file with the policy for the build's sources, as it does for BuildKit's other clients.
const policyEnv = "EXPERIMENTAL_BUILDKIT_SOURCE_POLICY"

func readSourcePolicy() (*spb.Policy, error) {
	file := os.Getenv(policyEnv)
	if file == "" {
		return nil, nil
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("$%s: %w", policyEnv, err)
	}
	var policy spb.Policy
	if err := json.Unmarshal(data, &policy); err != nil {
		return nil, fmt.Errorf("$%s: %s: %w", policyEnv, file, err)
	}
	return &policy, nil
}
