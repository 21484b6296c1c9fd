/* SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>

/* crc_stream returns the CRC-32 of what is left in f. */
unsigned long crc_stream(FILE *f);
