/* SPDX-License-Identifier: Apache-2.0 */
#ifndef PYFLANNEL_GSO_H
#define PYFLANNEL_GSO_H

#include "flow.h"
#include "vnet.h"

#define GSO_HEADERS_MAX 256

/* How a packet from the TUN is cut; @segments is 1 for one that goes as it is. */
struct gso {
	uint8_t protocol; /* PROTOCOL_TCP or PROTOCOL_UDP when it is cut */
	size_t transport; /* where the transport header begins */
	size_t headers; /* bytes in front of the payload: IP and transport header */
	size_t size; /* payload bytes of each segment but the last */
	size_t payload; /* of all segments */
	size_t segments;
};

bool gso_parse(const struct vnet_header *vnet, const uint8_t *packet, const struct flow *flow,
	       struct gso *gso);
void gso_spread(const struct gso *gso, uint8_t *packet, size_t gap);
void gso_fill(const struct gso *gso, uint8_t *packet, size_t gap);
bool gso_complete_checksum(const struct vnet_header *vnet, uint8_t *packet,
			   const struct flow *flow);

#endif
