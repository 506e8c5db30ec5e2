/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Checksums of TCP and UDP with their pseudo headers, for segmentation and coalescing.
 */
#ifndef PYFLANNEL_TRANSPORT_H
#define PYFLANNEL_TRANSPORT_H

#include "checksum.h"

/* The addresses of an IP packet of either family, as the pseudo header has them. */
static inline struct checksum transport_addresses(const uint8_t *packet)
{
	struct checksum sum = { 0 };

	if (packet[0] >> 4 == 4)
		checksum_add(&sum, ((const struct ipv4_header *)packet)->source, 2 * 4);
	else
		checksum_add(&sum, ((const struct ipv6_header *)packet)->source, 2 * 16);
	return sum;
}

/* RFC 9293, section 3.1 and RFC 8200, section 8.1; @length of the transport header and data. */
static inline struct checksum transport_pseudo(const uint8_t *packet, uint8_t protocol,
					       size_t length)
{
	struct checksum sum = transport_addresses(packet);

	checksum_add_word(&sum, protocol);
	checksum_add_word(&sum, (uint16_t)length);
	return sum;
}

#endif
