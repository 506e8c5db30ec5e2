/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Segmentation and coalescing without I/O, for tests and diagnosis: what csrc/encap.c and
 * csrc/decap.c do between a read and a write, on memory.
 */
#include <stdlib.h>

#include "_fastpath.h"
#include "gro.h"
#include "gso.h"

static bool parse(const uint8_t *packet, size_t length, struct flow *flow)
{
	return length > 0 &&
	       flow_parse(packet, length, packet[0] >> 4 == 4 ? ETHERTYPE_IPV4 : ETHERTYPE_IPV6,
			  flow);
}

/**
 * fp_segment_check() - Segment a packet of the TUN in place, or complete its checksum
 * @vnet:     12 bytes of virtio-net header
 * @packet:   From the IP header, with room up to @capacity
 * @length:   Bytes of the packet
 * @gap:      Bytes to leave between segments
 * @capacity: Bytes at @packet
 * @stride:   Where to say how far apart the segments begin
 * @total:    Where to say how many bytes they take, gaps included
 *
 * Return: number of segments, or -1 when the headers do not agree or there is no room
 */
int fp_segment_check(const uint8_t *vnet, uint8_t *packet, size_t length, size_t gap,
		     size_t capacity, size_t *stride, size_t *total)
{
	struct vnet_header header;
	struct flow flow;
	struct gso gso;

	memcpy(&header, vnet, sizeof(header));
	if (!parse(packet, length, &flow) || !gso_parse(&header, packet, &flow, &gso))
		return -1;
	*stride = gso.segments > 1 ? gso.headers + gso.size + gap : flow.length;
	*total = flow.length + (gso.segments - 1) * (gso.headers + gap);
	if (*total > capacity)
		return -1;
	if (gso.protocol) {
		gso_spread(&gso, packet, gap);
		gso_fill(&gso, packet, gap);
	} else if (!gso_complete_checksum(&header, packet, &flow)) {
		return -1;
	}
	return (int)gso.segments;
}

/* What has been written, as the TUN would be given it. */
struct written {
	uint8_t *into;
	size_t left;
	size_t *length;
	int count; /* -1 once there was no room */
};

static void write_out(struct gro *gro, struct written *written)
{
	for (unsigned int i = 0; i < gro->packets && written->count >= 0; i++) {
		struct iovec iov[1 + GRO_SEGMENTS_PER_PACKET];
		struct vnet_header vnet;
		struct gro_edit edit;
		unsigned int pieces = gro_finish(gro, &gro->packet[i], &vnet, &edit, iov + 1);
		size_t *length = &written->length[written->count++];

		iov[0] = (struct iovec) { &vnet, sizeof(vnet) };
		*length = 0;
		for (unsigned int p = 0; p <= pieces; p++) {
			if (iov[p].iov_len > written->left) {
				written->count = -1;
				break;
			}
			memcpy(written->into, iov[p].iov_base, iov[p].iov_len);
			written->into += iov[p].iov_len;
			written->left -= iov[p].iov_len;
			*length += iov[p].iov_len;
		}
	}
	gro_start(gro);
}

/**
 * fp_coalesce_check() - Coalesce packets from the wire
 * @tcp:         Whether the TUN takes TCP super-packets
 * @udp:         Whether it takes UDP super-packets
 * @packets:     One behind the other, each from its IP header; changed
 * @length:      Bytes of each
 * @count:       How many
 * @hint:        Gso size of super-packets among them, 0 when not known
 * @into:        Room for what would be written, each with 12 bytes of virtio-net header in front
 * @capacity:    Bytes at @into
 * @into_length: Room for @count lengths, of what is in @into
 *
 * What has no sound IP header is left out.
 *
 * Return: number of packets in @into, or -1 without memory or room
 */
int fp_coalesce_check(int tcp, int udp, uint8_t *packets, const size_t *length, size_t count,
		      size_t hint, uint8_t *into, size_t capacity, size_t *into_length)
{
	struct written written = { into, capacity, into_length, 0 };
	struct gro *gro = calloc(1, sizeof(*gro));

	if (!gro)
		return -1;
	gro->tcp = tcp;
	gro->udp = udp;
	gro_start(gro);
	for (size_t i = 0; i < count; packets += length[i++]) {
		struct flow flow;

		if (gro_continue(gro, packets, length[i]) || !parse(packets, length[i], &flow))
			continue;
		while (!gro_add(gro, packets, &flow, hint, NULL))
			write_out(gro, &written);
	}
	write_out(gro, &written);
	free(gro);
	return written.count;
}
