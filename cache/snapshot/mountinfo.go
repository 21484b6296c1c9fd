// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"
)

// mountsBelow returns the mount points below dir (not dir itself), in the order in which they were mounted.
func mountsBelow(dir string) ([]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseMounts(f, dir)
}

// parseMounts reads mountinfo: the fifth field of a line is the mount point, with special bytes as \ooo.
func parseMounts(r io.Reader, dir string) ([]string, error) {
	var points []string
	prefix := strings.TrimSuffix(dir, "/") + "/"
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 5 {
			return nil, fmt.Errorf("mountinfo: line %q has too few fields", lines.Text())
		}
		if point := unescape(fields[4]); strings.HasPrefix(point, prefix) {
			points = append(points, point)
		}
	}
	return points, lines.Err()
}

// unescape undoes the kernel's octal escapes.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) && isOctal(s[i+1:i+4]) {
			b.WriteByte((s[i+1]-'0')<<6 | (s[i+2]-'0')<<3 | (s[i+3] - '0'))
			i += 3
			continue
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func isOctal(s string) bool { return strings.Trim(s, "01234567") == "" && s[0] < '4' }
