/* SPDX-License-Identifier: Apache-2.0 */
/* A libFuzzer target: built once for each invariant, with -DHOLDS_FOR_ANY=its name. */
#include "invariants.h"

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size)
{
	HOLDS_FOR_ANY(input, size);
	return 0;
}
