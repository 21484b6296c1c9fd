// SPDX-License-Identifier: Apache-2.0

package op

import (
	"fmt"
	"slices"

	"github.com/moby/buildkit/solver/pb"

	"github.com/seed-68981b69/slipway/executor/cdi"
)

// Devices finds the CDI devices of the host that a name stands for: a *cdi.Devices.
type Devices interface {
	Find(name string) ([]cdi.Device, error)
}

// findDevices returns the full names of the devices that a step gets. Optional ones that are not here are missing.
func findDevices(devices Devices, wanted []*pb.CDIDevice) (names, missing []string, err error) {
	for _, w := range wanted {
		var found []cdi.Device
		if devices != nil {
			if found, err = devices.Find(w.Name); err != nil {
				return nil, nil, err
			}
		}
		if len(found) == 0 && !w.Optional {
			return nil, nil, fmt.Errorf("required device %q is not here: no CDI device of that name is registered with the engine", w.Name)
		}
		if len(found) == 0 {
			missing = append(missing, w.Name)
		}
		for _, f := range found {
			if !slices.Contains(names, f.Name) {
				names = append(names, f.Name)
			}
		}
	}
	return names, missing, nil
}
