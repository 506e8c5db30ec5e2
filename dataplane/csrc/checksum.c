/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The part of a checksum that vector instructions do: the same C for AVX-512, AVX2 and what every
 * x86-64 has, chosen by the processor; other machines have one version.
 */
#include "checksum.h"

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) &&                 \
	!defined(__clang__)
#define FOR_X86(...) __attribute__((target_clones(__VA_ARGS__)))
#define HAS_AVX512() __builtin_cpu_supports("avx512f")
#else
#define FOR_X86(...)
#define HAS_AVX512() false
#endif

/*
 * Define a function that sums the 32-bit words of whole blocks in vectors of @bytes. AVX-512 has
 * one of its own, as the compiler keeps vectors that are larger than the machine's in memory.
 *
 * A 64-bit lane loses the carries out of it. The high words are summed once more apart: without
 * them what remains is the sum of the low ones, for which a lane has room.
 */
#define DEFINE_SUM(name, bytes, ...)                                                               \
	FOR_X86(__VA_ARGS__, "default")                                                            \
	static uint64_t name(const uint8_t *octet, size_t blocks)                                  \
	{                                                                                          \
		typedef uint64_t lanes __attribute__((vector_size(bytes)));                        \
		lanes all[CHECKSUM_BLOCK / (bytes)] = { { 0 } };                                   \
		lanes high[CHECKSUM_BLOCK / (bytes)] = { { 0 } };                                  \
		uint64_t sum = 0;                                                                  \
                                                                                                   \
		for (; blocks; blocks--, octet += CHECKSUM_BLOCK) {                                \
			for (size_t i = 0; i < CHECKSUM_BLOCK / (bytes); i++) {                    \
				lanes words;                                                       \
                                                                                                   \
				memcpy(&words, octet + i * (bytes), sizeof(words));                \
				all[i] += words;                                                   \
				high[i] += words >> 32;                                            \
			}                                                                          \
		}                                                                                  \
		for (size_t i = 0; i < CHECKSUM_BLOCK / (bytes); i++) {                            \
			all[i] += high[i] - (high[i] << 32);                                       \
			for (size_t lane = 0; lane < sizeof(lanes) / sizeof(sum); lane++)          \
				sum += all[i][lane];                                               \
		}                                                                                  \
		return sum;                                                                        \
	}

DEFINE_SUM(sum_512, 64, "avx512f")
DEFINE_SUM(sum_256, 32, "avx2")

/**
 * checksum_blocks() - Sum of the 32-bit words of whole blocks
 * @octet:  No alignment needed
 * @blocks: Of CHECKSUM_BLOCK bytes, fewer than 2^28
 */
uint64_t checksum_blocks(const uint8_t *octet, size_t blocks)
{
	return HAS_AVX512() ? sum_512(octet, blocks) : sum_256(octet, blocks);
}
