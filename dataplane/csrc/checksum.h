/* SPDX-License-Identifier: Apache-2.0 */
#ifndef PYFLANNEL_CHECKSUM_H
#define PYFLANNEL_CHECKSUM_H

#include "inet.h"

/* Bytes that one checksum covers, as they come; begin with a zeroed one. */
struct checksum {
	uint64_t sum; /* of 16-bit words in memory order, not folded */
	bool odd; /* whether the bytes so far end in half a word */
};

void checksum_add(struct checksum *checksum, const void *bytes, size_t length);
void checksum_add_word(struct checksum *checksum, uint16_t word);
be16 checksum_field(const struct checksum *checksum);
be16 checksum_partial(const struct checksum *checksum);

uint16_t checksum(const void *bytes, size_t length);
be16 checksum_replace(be16 sum, uint16_t before, uint16_t after);

#endif
