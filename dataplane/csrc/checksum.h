/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
 *
 * Words are summed in memory order: one's complement addition does not mind which byte comes first,
 * so the folded sum is stored as it stands and nothing is swapped (RFC 1071, section 2, B).
 */
#ifndef PYFLANNEL_CHECKSUM_H
#define PYFLANNEL_CHECKSUM_H

#include <endian.h>

#include "inet.h"

#define CHECKSUM_BLOCK 64

uint64_t checksum_blocks(const uint8_t *octet, size_t blocks);

/* Bytes that one checksum covers, as they come; begin with a zeroed one. */
struct checksum {
	uint64_t sum; /* of 16-bit words in memory order, not folded */
	bool odd; /* whether the bytes so far end in half a word */
};

static inline uint16_t checksum_fold(uint64_t sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)((sum & 0xffff) + (sum >> 16));
}

/* Sum of the 16-bit words of @length bytes, an odd last byte standing for a first one. */
static inline uint64_t checksum_words(const uint8_t *octet, size_t length)
{
	size_t blocks = length / CHECKSUM_BLOCK;
	uint64_t sum = blocks ? checksum_blocks(octet, blocks) : 0;
	uint64_t wide;
	uint32_t word;
	uint16_t half;

	octet += blocks * CHECKSUM_BLOCK;
	length -= blocks * CHECKSUM_BLOCK;
	for (; length >= sizeof(wide); octet += sizeof(wide), length -= sizeof(wide)) {
		memcpy(&wide, octet, sizeof(wide));
		sum += (wide & UINT32_MAX) + (wide >> 32);
	}
	if (length & sizeof(word)) {
		memcpy(&word, octet, sizeof(word));
		sum += word;
		octet += sizeof(word);
	}
	if (length & sizeof(half)) {
		memcpy(&half, octet, sizeof(half));
		sum += half;
		octet += sizeof(half);
	}
	if (length & 1) {
		half = 0;
		memcpy(&half, octet, 1);
		sum += half;
	}
	return sum;
}

/**
 * checksum_add() - Let a checksum cover more bytes
 * @checksum: Of the bytes before
 * @bytes:    No alignment needed
 * @length:   Of @bytes; after an odd number in all, more may follow
 */
static inline void checksum_add(struct checksum *checksum, const void *bytes, size_t length)
{
	uint64_t sum = checksum_words(bytes, length);

	/* A sum that began in the middle of a word has its bytes the other way round. */
	checksum->sum += checksum->odd ? __builtin_bswap16(checksum_fold(sum)) : sum;
	checksum->odd ^= length & 1;
}

/** checksum_add_word() - Let a checksum cover one more word, given in host order */
static inline void checksum_add_word(struct checksum *checksum, uint16_t word)
{
	checksum->sum += htobe16(word);
}

/** checksum_partial() - The sum as a field that another adds to, such as a pseudo header's */
static inline be16 checksum_partial(const struct checksum *checksum)
{
	uint16_t folded = checksum_fold(checksum->sum);
	be16 field;

	memcpy(&field, &folded, sizeof(field));
	return field;
}

/** checksum_field() - The checksum field for these bytes, or zero if they hold their own */
static inline be16 checksum_field(const struct checksum *checksum)
{
	be16 field = checksum_partial(checksum);

	field.octet[0] ^= 0xff;
	field.octet[1] ^= 0xff;
	return field;
}

/**
 * checksum() - One's complement sum of 16-bit words, complemented
 * @bytes:  What to sum; no alignment needed
 * @length: In bytes; an odd last byte counts as the high one
 *
 * Return: the checksum in host order; 0 over a header whose own checksum is right
 */
static inline uint16_t checksum(const void *bytes, size_t length)
{
	struct checksum all = { checksum_words(bytes, length), false };

	return get_be16(checksum_field(&all));
}

/**
 * checksum_replace() - Update a checksum for one changed 16-bit word
 * @sum:    The checksum field as it stands
 * @before: The word's old value, host order
 * @after:  The word's new value, host order
 *
 * Return: the new field, RFC 1624 equation 3
 */
static inline be16 checksum_replace(be16 sum, uint16_t before, uint16_t after)
{
	uint64_t total = (uint16_t)~get_be16(sum);

	total += (uint16_t)~before;
	total += after;
	return put_be16((uint16_t)~checksum_fold(total));
}

#endif
