/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Explicit congestion notification through the tunnel. Push as the kernel's INET_ECN_encapsulate()
 * does, pop as RFC 6040, section 4.2 says.
 */
#ifndef PYFLANNEL_ECN_H
#define PYFLANNEL_ECN_H

#include <stdint.h>

enum ecn { ECN_NOT_ECT = 0, ECN_ECT1 = 1, ECN_ECT0 = 2, ECN_CE = 3, ECN_MASK = 3 };

#define ECN_DROP (-1)

/* Return: the outer codepoint for @inner; CE restarts as ECT(0). */
static inline uint8_t ecn_push(uint8_t inner)
{
	return inner == ECN_CE ? ECN_ECT0 : inner;
}

/* Return: the inner codepoint after decapsulation, or ECN_DROP. */
static inline int ecn_pop(uint8_t outer, uint8_t inner)
{
	if (outer == ECN_CE)
		return inner == ECN_NOT_ECT ? ECN_DROP : ECN_CE;
	if (outer == ECN_ECT1 && inner == ECN_ECT0)
		return ECN_ECT1;
	return inner;
}

#endif
