/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The C of the fast path, without Python and without root, under AddressSanitizer and UBSan.
 *
 *   check                       everything; repeatable
 *   check corpus FOLDER COUNT   write inputs of each invariant to FOLDER/{decap,segment,coalesce}/
 */
#include "check.h"

#include "checksum.h"

#define INPUTS 20000

struct invariant {
	const char *name;
	void (*holds)(const uint8_t *input, size_t size);
	void (*make)(struct input *input);
};

static const struct invariant invariants[] = {
	{ "decap", decap_holds, make_decap_input },
	{ "segment", segment_holds, make_segment_input },
	{ "coalesce", coalesce_holds, make_coalesce_input },
};

void check_checksum(void)
{
	static uint8_t bytes[4096 + 8];

	for (size_t i = 0; i < sizeof(bytes); i++)
		bytes[i] = (uint8_t)random_below(256);
	for (size_t length = 0; length <= 4096; length++) {
		uint8_t *copy = exactly(bytes + length % 8, length);
		uint16_t expected = (uint16_t)~naive_sum(copy, length, 0);
		size_t first = length ? random_below((uint32_t)length) : 0;
		struct checksum parts = { 0 };

		HOLDS(checksum(copy, length) == expected);
		checksum_add(&parts, copy, first);
		checksum_add(&parts, copy + first, length - first);
		HOLDS(get_be16(checksum_field(&parts)) == expected);
		if (length >= 20) {
			size_t at = 2 * random_below((uint32_t)length / 2);
			uint16_t before = (uint16_t)(copy[at] << 8 | copy[at + 1]);
			be16 updated = checksum_replace(put_be16(expected), before, 0x1234);

			copy[at] = 0x12;
			copy[at + 1] = 0x34;
			HOLDS(get_be16(updated) == checksum(copy, length));
		}
		free(copy);
	}
	memset(bytes, 0xff, sizeof(bytes));
	HOLDS(checksum(bytes, 4096) == 0);
}

static int write_corpus(const char *folder, int count)
{
	static struct input input;
	char path[4096];

	for (size_t i = 0; i < sizeof(invariants) / sizeof(invariants[0]); i++) {
		for (int number = 0; number < count; number++) {
			FILE *file;

			do
				invariants[i].make(&input);
			while (input.size > 2048);
			snprintf(path, sizeof(path), "%s/%s/%02d", folder, invariants[i].name,
				 number);
			file = fopen(path, "wb");
			if (!file) {
				perror(path);
				return 1;
			}
			fwrite(input.bytes, 1, input.size, file);
			fclose(file);
		}
	}
	return 0;
}

int main(int argc, char **argv)
{
	static struct input input;

	random_seed(1);
	if (argc == 4)
		return write_corpus(argv[2], atoi(argv[3]));
	check_checksum();
	check_backlog();
	check_room();
	check_fib();
	for (size_t i = 0; i < sizeof(invariants) / sizeof(invariants[0]); i++) {
		for (int number = 0; number < INPUTS; number++) {
			invariants[i].make(&input);
			invariants[i].holds(input.bytes, input.size);
		}
	}
	check_suspects();
	check_handover();
	check_worker();
	check_wire();
	puts("all holds");
	return 0;
}
