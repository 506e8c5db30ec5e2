/* SPDX-License-Identifier: Apache-2.0 */
#include "invariants.h"

#include <string.h>

void *exactly(const void *bytes, size_t size)
{
	uint8_t *copy = malloc(size ? size : 1);

	HOLDS(copy);
	if (size)
		memcpy(copy, bytes, size);
	return copy;
}
