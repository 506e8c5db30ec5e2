/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Invariant of segmentation. Whatever vnet header and packet come from the TUN: nothing outside of
 * the packet is read or of its segments written, and what is accepted becomes segments that
 *  - are sound IP packets, each of the full size but the last, whose TCP or UDP checksum is right;
 *  - carry exactly the payload of the packet, in order and at its sequence numbers;
 *  - have its headers but for lengths, id, sequence number, checksums, and FIN, PSH, CWR.
 *
 * Input: 12 bytes of vnet header, one byte of gap, the packet.
 */
#include "invariants.h"

#include "gso.h"
#include "transport.h"

#define SEGMENTS_BYTES (1024 * 1024)

static uint16_t ethertype_of(const uint8_t *packet)
{
	return packet[0] >> 4 == 4 ? ETHERTYPE_IPV4 : ETHERTYPE_IPV6;
}

static void header_holds(const struct gso *gso, const uint8_t *before, const uint8_t *after,
			 size_t index)
{
	uint8_t expected[GSO_HEADERS_MAX], got[GSO_HEADERS_MAX];
	struct {
		uint8_t *header;
		const uint8_t *from;
	} each[] = { { expected, before }, { got, after } };

	for (int i = 0; i < 2; i++) {
		uint8_t *header = each[i].header;

		memcpy(header, each[i].from, gso->headers);
		if (header[0] >> 4 == 4) {
			memset(header + offsetof(struct ipv4_header, total_length), 0, 4);
			memset(header + offsetof(struct ipv4_header, checksum), 0, 2);
		} else {
			memset(header + offsetof(struct ipv6_header, payload_length), 0, 2);
		}
		if (gso->protocol == PROTOCOL_TCP) {
			struct tcp_header *tcp = (struct tcp_header *)(header + gso->transport);
			uint32_t sequence = get_be32(tcp->sequence);

			if (i == 0)
				sequence += (uint32_t)(index * gso->size);
			tcp->sequence = put_be32(sequence);
			tcp->checksum = put_be16(0);
			tcp->flags &= (uint8_t) ~(TCP_FIN | TCP_PSH | TCP_CWR);
		} else {
			struct udp_header *udp = (struct udp_header *)(header + gso->transport);

			udp->length = udp->checksum = put_be16(0);
		}
	}
	HOLDS(memcmp(expected, got, gso->headers) == 0);
}

static void segments_hold(const struct gso *gso, const uint8_t *before, uint8_t *segments,
			  size_t gap)
{
	size_t seen = 0;

	for (size_t i = 0; i < gso->segments; i++) {
		uint8_t *segment = segments + i * (gso->headers + gso->size + gap);
		size_t left = gso->payload - seen;
		size_t length = gso->headers + (left < gso->size ? left : gso->size);
		struct checksum sum =
			transport_pseudo(segment, gso->protocol, length - gso->transport);
		struct flow flow;

		HOLDS(flow_parse(segment, length, ethertype_of(segment), &flow));
		HOLDS(flow.length == length);
		checksum_add(&sum, segment + gso->transport, length - gso->transport);
		HOLDS(get_be16(checksum_field(&sum)) == 0);
		HOLDS(memcmp(segment + gso->headers, before + gso->headers + seen,
			     length - gso->headers) == 0);
		header_holds(gso, before, segment, i);
		seen += length - gso->headers;
	}
	HOLDS(seen == gso->payload);
}

void segment_holds(const uint8_t *input, size_t size)
{
	struct vnet_header vnet;
	uint8_t *packet, *segments;
	struct flow flow;
	struct gso gso;
	size_t gap, total;

	if (size < sizeof(vnet) + 2 || size > UINT16_MAX)
		return;
	memcpy(&vnet, input, sizeof(vnet));
	gap = input[sizeof(vnet)];
	input += sizeof(vnet) + 1;
	size -= sizeof(vnet) + 1;
	packet = exactly(input, size);
	if (flow_parse(packet, size, ethertype_of(packet), &flow) &&
	    gso_parse(&vnet, packet, &flow, &gso)) {
		total = flow.length + (gso.segments - 1) * (gap + gso.headers);
		if (!gso.protocol) {
			if (!gso_complete_checksum(&vnet, packet, &flow))
				HOLDS(memcmp(packet, input, size) == 0);
			HOLDS(memcmp(packet, input, flow.header_length) == 0);
		} else if (total <= SEGMENTS_BYTES) {
			segments = malloc(total);
			HOLDS(segments);
			memcpy(segments, packet, flow.length);
			gso_spread(&gso, segments, gap);
			gso_fill(&gso, segments, gap);
			segments_hold(&gso, packet, segments, gap);
			free(segments);
		}
	}
	free(packet);
}
