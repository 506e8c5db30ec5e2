/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
 *
 * Words are summed in memory order: one's complement addition does not mind which byte comes first,
 * so the folded sum is stored as it stands and nothing is swapped (RFC 1071, section 2, B).
 */
#include "checksum.h"

#include <endian.h>

/* The same C for AVX2 and for what every x86-64 has; other machines have one version. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) &&                 \
	!defined(__clang__)
#define VECTOR_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define VECTOR_CLONES
#endif

#define BLOCK_BYTES 64

/* Four 64-bit lanes; the compiler makes of them what the machine has. */
typedef uint64_t lanes __attribute__((vector_size(32)));

static uint16_t fold(uint64_t sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)((sum & 0xffff) + (sum >> 16));
}

/*
 * Sum of the 32-bit words of whole blocks, low and high ones apart so that no carry is lost: a lane
 * has room for 2^32 words.
 */
VECTOR_CLONES
static uint64_t sum_blocks(const uint8_t *octet, size_t blocks)
{
	const lanes low = { UINT32_MAX, UINT32_MAX, UINT32_MAX, UINT32_MAX };
	lanes sum[4] = { { 0 } };

	for (; blocks; blocks--, octet += BLOCK_BYTES) {
		lanes a, b;

		memcpy(&a, octet, sizeof(a));
		memcpy(&b, octet + sizeof(a), sizeof(b));
		sum[0] += a & low;
		sum[1] += a >> 32;
		sum[2] += b & low;
		sum[3] += b >> 32;
	}
	sum[0] += sum[1] + sum[2] + sum[3];
	return sum[0][0] + sum[0][1] + sum[0][2] + sum[0][3];
}

static uint64_t sum_bytes(const uint8_t *octet, size_t length)
{
	size_t blocks = length / BLOCK_BYTES;
	uint64_t sum = blocks ? sum_blocks(octet, blocks) : 0;
	uint64_t wide;
	uint32_t word;
	uint16_t half;

	octet += blocks * BLOCK_BYTES;
	length -= blocks * BLOCK_BYTES;
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
void checksum_add(struct checksum *checksum, const void *bytes, size_t length)
{
	uint64_t sum = sum_bytes(bytes, length);

	/* A sum that began in the middle of a word has its bytes the other way round. */
	checksum->sum += checksum->odd ? __builtin_bswap16(fold(sum)) : sum;
	checksum->odd ^= length & 1;
}

/** checksum_add_word() - Let a checksum cover one more word, given in host order */
void checksum_add_word(struct checksum *checksum, uint16_t word)
{
	checksum->sum += htobe16(word);
}

/** checksum_partial() - The sum as a field that another adds to, such as a pseudo header's */
be16 checksum_partial(const struct checksum *checksum)
{
	uint16_t folded = fold(checksum->sum);
	be16 field;

	memcpy(&field, &folded, sizeof(field));
	return field;
}

/** checksum_field() - The checksum field for these bytes, or zero if they hold their own */
be16 checksum_field(const struct checksum *checksum)
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
uint16_t checksum(const void *bytes, size_t length)
{
	struct checksum all = { 0 };

	checksum_add(&all, bytes, length);
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
be16 checksum_replace(be16 sum, uint16_t before, uint16_t after)
{
	uint64_t total = (uint16_t)~get_be16(sum);

	total += (uint16_t)~before;
	total += after;
	return put_be16((uint16_t)~fold(total));
}
