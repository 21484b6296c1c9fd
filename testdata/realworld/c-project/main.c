/* SPDX-License-Identifier: Apache-2.0 */
#include "crc.h"

int main(int argc, char **argv) {
	FILE *f = argc > 1 ? fopen(argv[1], "rb") : stdin;
	if (!f) {
		perror(argv[1]);
		return 1;
	}
	printf("%08lx\n", crc_stream(f));
	return 0;
}
