// SPDX-License-Identifier: Apache-2.0

// Package cdi finds devices that the host's owner describes for containers, by the Container Device Interface: files that say which device
// nodes, mounts, variables and hooks a container with a device gets. Those files are trusted as the host's configuration is; what a
// build may ask for is the business of whoever calls.
package cdi

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"tags.cncf.io/container-device-interface/pkg/cdi"
	"tags.cncf.io/container-device-interface/pkg/parser"
)

// DefaultSpecDirs are where BuildKit looks for descriptions; a file of a later directory comes before one of an earlier.
var DefaultSpecDirs = []string{"/etc/cdi", "/var/run/cdi", "/etc/buildkit/cdi"}

// The annotations by which a description says of its device to which class it belongs, and that builds may have it unasked. They are BuildKit's.
const (
	classAnnotation     = "org.mobyproject.buildkit.device.class"
	autoAllowAnnotation = "org.mobyproject.buildkit.device.autoallow"
)

// Device is one device.
type Device struct {
	// Name is VENDOR/CLASS=NAME.
	Name        string
	Annotations map[string]string
	// AutoAllowed says that builds may have it without being entitled to it.
	AutoAllowed bool
}

// Devices are those of some directories, as they are now: files may come and go. Its methods may be called concurrently.
type Devices struct {
	dirs        []string
	autoAllowed []string

	mu    sync.Mutex // guards cache
	cache *cdi.Cache // nil until it is needed
}

// New returns the devices of dirs (none: DefaultSpecDirs). Builds may have those in autoAllowed, by name or by kind (VENDOR/CLASS), unasked.
func New(dirs, autoAllowed []string) *Devices {
	if len(dirs) == 0 {
		dirs = DefaultSpecDirs
	}
	return &Devices{dirs: dirs, autoAllowed: autoAllowed}
}

// current reads the directories again. mu is held.
func (d *Devices) current() (*cdi.Cache, error) {
	var err error
	if d.cache == nil {
		d.cache, err = cdi.NewCache(cdi.WithSpecDirs(d.dirs...), cdi.WithAutoRefresh(false))
	} else {
		err = d.cache.Refresh()
	}
	if d.cache == nil {
		return nil, fmt.Errorf("CDI devices in %s: %w", strings.Join(d.dirs, ", "), err)
	}
	return d.cache, nil // a file that is wrong hides its own devices only
}

// List returns all devices by name.
func (d *Devices) List() ([]Device, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	cache, err := d.current()
	if err != nil {
		return nil, err
	}
	var list []Device
	for _, name := range cache.ListDevices() {
		found := cache.GetDevice(name)
		if found == nil {
			continue
		}
		annotations := maps.Clone(found.GetSpec().Annotations)
		if annotations == nil {
			annotations = map[string]string{}
		}
		maps.Copy(annotations, found.Annotations)
		list = append(list, Device{Name: name, Annotations: annotations, AutoAllowed: d.isAutoAllowed(name, annotations)})
	}
	return list, nil
}

func (d *Devices) isAutoAllowed(name string, annotations map[string]string) bool {
	kind, _, _ := strings.Cut(name, "=")
	if slices.Contains(d.autoAllowed, name) || slices.Contains(d.autoAllowed, kind) {
		return true
	}
	allowed, err := strconv.ParseBool(annotations[autoAllowAnnotation])
	return err == nil && allowed
}

// Find returns the devices that a name stands for: VENDOR/CLASS=NAME that one, VENDOR/CLASS=* all of a kind, VENDOR/CLASS the first of it;
// anything else, and a name that nothing has, those of a class. None is no error.
func (d *Devices) Find(name string) ([]Device, error) {
	list, err := d.List()
	if err != nil {
		return nil, err
	}
	var found []Device
	kind, one, _ := strings.Cut(name, "=")
	if vendor, _ := parser.ParseQualifier(kind); vendor != "" {
		for _, dev := range list {
			of, _, _ := strings.Cut(dev.Name, "=")
			if of == kind && (one == "" && len(found) == 0 || one == "*" || dev.Name == name) {
				found = append(found, dev)
			}
		}
	}
	if len(found) > 0 {
		return found, nil
	}
	for _, dev := range list {
		if class, ok := dev.Annotations[classAnnotation]; ok && class == name {
			found = append(found, dev)
		}
	}
	return found, nil
}

// Inject adds devices, by their full names, to what a container gets.
func (d *Devices) Inject(spec *specs.Spec, names []string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	cache, err := d.current()
	if err != nil {
		return err
	}
	if missing, err := cache.InjectDevices(spec, names...); err != nil {
		if len(missing) > 0 {
			return fmt.Errorf("CDI devices that are not here: %s", strings.Join(missing, ", "))
		}
		return fmt.Errorf("CDI devices %s: %w", strings.Join(names, ", "), err)
	}
	return nil
}
