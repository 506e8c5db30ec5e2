/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
 */
#include "checksum.h"

static uint16_t fold(uint64_t sum)
{
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)sum;
}

/**
 * checksum() - One's complement sum of 16-bit words, complemented
 * @bytes:  What to sum; no alignment needed
 * @length: In bytes; an odd last byte counts as the high one
 *
 * Return: the checksum in host order; 0 over a header whose own checksum is right
 */
uint16_t checksum(const void *bytes, size_t length)
{
	const uint8_t *octet = bytes;
	uint64_t sum = 0;
	size_t i;

	for (i = 0; i + 1 < length; i += 2)
		sum += (uint32_t)octet[i] << 8 | octet[i + 1];
	if (i < length)
		sum += (uint32_t)octet[i] << 8;
	return (uint16_t)~fold(sum);
}

/**
 * checksum_replace() - Update a checksum for one changed 16-bit word
 * @sum:    The checksum field as it stands
 * @before: The word's old value, host order
 * @after:  The word's new value, host order
 *
 * Return: the new field, RFC 1624 equation 3
 */
be16 checksum_replace(be16 sum, uint16_t before, uint16_t after)
{
	uint64_t total = (uint16_t)~get_be16(sum);

	total += (uint16_t)~before;
	total += after;
	return put_be16((uint16_t)~fold(total));
}
