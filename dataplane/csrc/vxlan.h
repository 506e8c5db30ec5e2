/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The VXLAN header (RFC 7348, section 5) and the bytes that precede every inner packet.
 *
 *  |R|R|R|R|I|R|R|R|            reserved (24)                      |
 *  |              VNI (24)                         | reserved (8)  |
 */
#ifndef PYFLANNEL_VXLAN_H
#define PYFLANNEL_VXLAN_H

#include "inet.h"

#define VXLAN_FLAG_VNI 0x08

struct vxlan_header {
	uint8_t flags;
	uint8_t reserved1[3];
	uint8_t vni[3];
	uint8_t reserved2;
};
static_assert(sizeof(struct vxlan_header) == 8, "VXLAN header");

/* What encapsulation pushes in front of an inner packet. */
struct vxlan_push {
	struct vxlan_header vxlan;
	struct eth_header eth;
};
#define PUSH sizeof(struct vxlan_push)
static_assert(PUSH == 22, "VXLAN and inner Ethernet header");

static inline uint32_t vxlan_vni(const struct vxlan_header *header)
{
	return (uint32_t)header->vni[0] << 16 | (uint32_t)header->vni[1] << 8 | header->vni[2];
}

static inline struct vxlan_header vxlan_header_of(uint32_t vni)
{
	return (struct vxlan_header) {
		.flags = VXLAN_FLAG_VNI,
		.vni = { (uint8_t)(vni >> 16), (uint8_t)(vni >> 8), (uint8_t)vni },
	};
}

static inline bool vxlan_reserved_set(const struct vxlan_header *header)
{
	return (header->flags & ~VXLAN_FLAG_VNI) != 0 || header->reserved1[0] != 0 ||
	       header->reserved1[1] != 0 || header->reserved1[2] != 0 || header->reserved2 != 0;
}

#endif
