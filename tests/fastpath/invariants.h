/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What must hold for any input, shared by the fuzz targets (fuzz.c) and the check program
 * (check.c). Each takes bytes that may be anything and aborts when its invariant, which opens its
 * file, fails.
 */
#ifndef PYFLANNEL_TESTS_INVARIANTS_H
#define PYFLANNEL_TESTS_INVARIANTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define HOLDS(condition)                                                                           \
	do {                                                                                       \
		if (!(condition)) {                                                                \
			fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__,          \
				#condition);                                                       \
			abort();                                                                   \
		}                                                                                  \
	} while (0)

void decap_holds(const uint8_t *input, size_t size);
void segment_holds(const uint8_t *input, size_t size);
void coalesce_holds(const uint8_t *input, size_t size);

/* A copy that ends where its memory ends, so that reading on is seen. */
void *exactly(const void *bytes, size_t size);

#endif
