/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The header in front of each packet of a TUN with IFF_VNET_HDR: linux/virtio_net.h, struct
 * virtio_net_hdr_mrg_rxbuf. All fields are in host order, as long as TUNSETVNETBE is not used.
 */
#ifndef PYFLANNEL_VNET_H
#define PYFLANNEL_VNET_H

#include <assert.h>
#include <stdint.h>

enum vnet_flag {
	VNET_NEEDS_CHECKSUM = 0x01, /* the field holds the sum of the pseudo header only */
};

enum vnet_gso {
	VNET_GSO_NONE = 0,
	VNET_GSO_TCPV4 = 1,
	VNET_GSO_TCPV6 = 4,
	VNET_GSO_UDP = 5,
	VNET_GSO_ECN = 0x80, /* with TCP: the super-packet has CWR set */
};

struct vnet_header {
	uint8_t flags;
	uint8_t gso_type;
	uint16_t header_length;
	uint16_t gso_size; /* payload bytes of each segment but the last */
	uint16_t checksum_start; /* from the first byte of the IP header */
	uint16_t checksum_offset; /* of the field, from checksum_start */
	uint16_t buffers;
};
static_assert(sizeof(struct vnet_header) == 12, "virtio_net_hdr_mrg_rxbuf");

#endif
