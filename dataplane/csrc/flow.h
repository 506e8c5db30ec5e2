/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The inner packet as encapsulation and decapsulation see it.
 */
#ifndef PYFLANNEL_FLOW_H
#define PYFLANNEL_FLOW_H

#include "inet.h"

struct flow {
	struct inet_address source;
	struct inet_address destination;
	size_t length; /* of the whole IP packet, without padding behind it */
	size_t header_length; /* of the IP header with IPv4 options, without IPv6 extensions */
	uint8_t protocol; /* of what follows that header */
	bool fragment; /* or may be one */
	uint8_t ecn;
	uint32_t hash;
};

bool flow_parse(const uint8_t *packet, size_t length, uint16_t ethertype, struct flow *flow);
void flow_set_ecn(uint8_t *packet, uint16_t ethertype, uint8_t ecn);
bool flow_is_multicast(const struct inet_address *address);
bool flow_bad_source(const struct inet_address *address);

#endif
