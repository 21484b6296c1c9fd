// SPDX-License-Identifier: Apache-2.0

package provenance

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// reserved are the keys that are ours to say.
var reserved = []string{"buildConfig", "builderPlatform", "platform", "targetPlatform", "dockerfileVersion"}

// ReadEnvironment reads what an administrator wants to be told about the machine in every provenance: the JSON objects of all files NAME.json in
// dir, the later name counting more (buildkitd's provenanceEnvDir). A directory that does not exist says nothing.
func ReadEnvironment(dir string) (map[string]any, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("environment for provenance: %w", err)
	}
	env := map[string]any{}
	for _, e := range entries {
		if e.IsDir() || !strings.HasSuffix(e.Name(), ".json") {
			continue
		}
		path := filepath.Join(dir, e.Name())
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("environment for provenance: %w", err)
		}
		if err := json.Unmarshal(data, &env); err != nil {
			return nil, fmt.Errorf("environment for provenance: %s: %w", path, err)
		}
	}
	for _, key := range reserved {
		if _, ok := env[key]; ok {
			return nil, fmt.Errorf("environment for provenance: %s: the key %q is not for files", dir, key)
		}
	}
	return env, nil
}
