/* SPDX-License-Identifier: Apache-2.0 */
#include "crc.h"
#include <zlib.h>

unsigned long crc_stream(FILE *f) {
	unsigned char buffer[65536];
	unsigned long crc = crc32(0, Z_NULL, 0);
	size_t n;
	while ((n = fread(buffer, 1, sizeof buffer, f)) > 0)
		crc = crc32(crc, buffer, n);
	return crc;
}
