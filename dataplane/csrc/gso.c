/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DOC: Segmentation of the super-packets that a TUN with offloads hands over
 *
 * A super-packet is headers and up to 64 KB of payload. It becomes segments that lie in one piece
 * of memory with a gap in front of each, room for what encapsulation pushes:
 *
 *	packet                        packet + stride
 *	| headers | payload 0 | gap | headers | payload 1 | gap | headers | last payload |
 *
 * where the stride is headers + gso size + gap. The reader of the TUN lets the kernel put the
 * payload there at once (csrc/encap.c guesses the sizes, which seldom change); else gso_spread()
 * moves it. gso_fill() then writes the headers as the kernel's tcp_gso_segment(),
 * __udp_gso_segment() and inet_gso_segment() do.
 *
 * The vnet header is not the kernel's word alone: who may open a packet socket, also in a
 * container, chooses its fields. So it is held against the packet.
 */
#include "gso.h"

#include "transport.h"

/**
 * gso_parse() - Check a vnet header against its packet
 * @vnet:   From the kernel
 * @packet: From the IP header; min(length, GSO_HEADERS_MAX) bytes lie here in one piece
 * @flow:   What flow_parse() said of it
 * @gso:    Written when the headers agree
 *
 * Return: whether they agree
 */
bool gso_parse(const struct vnet_header *vnet, const uint8_t *packet, const struct flow *flow,
	       struct gso *gso)
{
	unsigned int version = packet[0] >> 4;
	uint8_t type = vnet->gso_type & ~VNET_GSO_ECN;
	size_t transport = vnet->checksum_start;
	size_t length = flow->length;

	*gso = (struct gso) { .segments = 1 };
	if (type == VNET_GSO_NONE)
		return true;
	if (transport < flow->header_length || transport > GSO_HEADERS_MAX ||
	    !(vnet->flags & VNET_NEEDS_CHECKSUM))
		return false;
	gso->transport = transport;
	if (type == VNET_GSO_UDP) {
		gso->protocol = PROTOCOL_UDP;
		gso->headers = transport + sizeof(struct udp_header);
	} else if (type == (version == 4 ? VNET_GSO_TCPV4 : VNET_GSO_TCPV6)) {
		const struct tcp_header *tcp = (const struct tcp_header *)(packet + transport);
		size_t header;

		if (length < transport + sizeof(*tcp) || transport + sizeof(*tcp) > GSO_HEADERS_MAX)
			return false;
		header = tcp_header_length(tcp);
		if (header < sizeof(*tcp))
			return false;
		gso->protocol = PROTOCOL_TCP;
		gso->headers = transport + header;
	} else {
		return false;
	}
	if (gso->headers >= length || gso->headers > GSO_HEADERS_MAX || vnet->gso_size == 0)
		return false;
	/* Only in IPv6 may other headers be in between. */
	if (flow->protocol == gso->protocol ? transport != flow->header_length : version == 4)
		return false;
	gso->size = vnet->gso_size;
	gso->payload = length - gso->headers;
	gso->segments = (gso->payload + gso->size - 1) / gso->size;
	return true;
}

/**
 * gso_spread() - Move the payload of a packet that lies in one piece to where its segments will be
 * @gso:    What gso_parse() said
 * @packet: With room behind it: (segments - 1) times @gap and headers
 * @gap:    Bytes to leave in front of the headers of each segment but the first
 */
void gso_spread(const struct gso *gso, uint8_t *packet, size_t gap)
{
	uint8_t *payload = packet + gso->headers;

	/* From behind, so that nothing is overwritten before it has moved. */
	for (size_t i = gso->segments - 1; i > 0; i--) {
		size_t begin = i * gso->size;
		size_t length = i + 1 == gso->segments ? gso->payload - begin : gso->size;

		memmove(payload + begin + i * (gap + gso->headers), payload + begin, length);
	}
}

/* The headers that segments have in common, and the sums of what is the same in all. */
struct common {
	uint8_t headers[GSO_HEADERS_MAX]; /* with zero where segments differ */
	uint32_t sequence; /* of the first */
	uint16_t id;
	uint8_t flags;
	struct checksum ip;
	struct checksum transport; /* with the pseudo header but for its length */
};

static void find_common(struct common *common, const struct gso *gso, const uint8_t *packet)
{
	uint8_t *transport = common->headers + gso->transport;

	memcpy(common->headers, packet, gso->headers);
	if (packet[0] >> 4 == 4) {
		struct ipv4_header *ip = (struct ipv4_header *)common->headers;

		common->id = get_be16(ip->id);
		ip->total_length = ip->id = ip->checksum = put_be16(0);
		common->ip = (struct checksum) { 0 };
		checksum_add(&common->ip, ip, (size_t)(ip->version_ihl & 0x0f) * 4);
	}
	if (gso->protocol == PROTOCOL_TCP) {
		struct tcp_header *tcp = (struct tcp_header *)transport;

		common->sequence = get_be32(tcp->sequence);
		common->flags = tcp->flags;
		tcp->sequence = put_be32(0);
		tcp->flags = 0;
		tcp->checksum = put_be16(0);
	} else {
		struct udp_header *udp = (struct udp_header *)transport;

		udp->length = udp->checksum = put_be16(0);
	}
	common->transport = transport_addresses(packet);
	checksum_add_word(&common->transport, gso->protocol);
	checksum_add(&common->transport, transport, gso->headers - gso->transport);
}

static void fill_ipv4(struct ipv4_header *ip, const struct common *common, size_t length,
		      size_t index)
{
	struct checksum sum = common->ip;
	uint16_t id = (uint16_t)(common->id + index);

	ip->total_length = put_be16((uint16_t)length);
	ip->id = put_be16(id);
	checksum_add_word(&sum, (uint16_t)length);
	checksum_add_word(&sum, id);
	ip->checksum = checksum_field(&sum);
}

/* @sum covers the common transport header and the payload. */
static void fill_tcp(struct tcp_header *tcp, const struct common *common, struct checksum sum,
		     size_t offset, bool last)
{
	uint32_t sequence = common->sequence + (uint32_t)offset;

	tcp->sequence = put_be32(sequence);
	tcp->flags = common->flags;
	/* The end of the data is in the last, the reaction to marks in the first. */
	if (!last)
		tcp->flags &= (uint8_t) ~(TCP_FIN | TCP_PSH);
	if (offset)
		tcp->flags &= (uint8_t)~TCP_CWR;
	checksum_add_word(&sum, (uint16_t)(sequence >> 16));
	checksum_add_word(&sum, (uint16_t)sequence);
	checksum_add_word(&sum, tcp->flags);
	tcp->checksum = checksum_field(&sum);
}

static void fill_udp(struct udp_header *udp, struct checksum sum, size_t length)
{
	udp->length = put_be16((uint16_t)length);
	checksum_add_word(&sum, (uint16_t)length);
	udp->checksum = checksum_field(&sum);
	/* RFC 768: zero would mean that there is none. */
	if (get_be16(udp->checksum) == 0)
		udp->checksum = put_be16(0xffff);
}

/**
 * gso_fill() - Write the headers of all segments
 * @gso:    What gso_parse() said, with more than one segment or not
 * @packet: The first segment; the super-packet's headers lie here, the payloads in their places
 * @gap:    Bytes between the end of a segment and the headers of the next
 */
void gso_fill(const struct gso *gso, uint8_t *packet, size_t gap)
{
	struct common common;

	find_common(&common, gso, packet);
	for (size_t i = 0; i < gso->segments; i++) {
		uint8_t *segment = packet + i * (gso->headers + gso->size + gap);
		size_t offset = i * gso->size, left = gso->payload - offset;
		size_t payload = left < gso->size ? left : gso->size;
		size_t length = gso->headers + payload;
		struct checksum sum = common.transport;

		memcpy(segment, common.headers, gso->headers);
		if (common.headers[0] >> 4 == 4)
			fill_ipv4((struct ipv4_header *)segment, &common, length, i);
		else
			((struct ipv6_header *)segment)->payload_length =
				put_be16((uint16_t)(length - sizeof(struct ipv6_header)));
		checksum_add_word(&sum, (uint16_t)(length - gso->transport));
		checksum_add(&sum, segment + gso->headers, payload);
		if (gso->protocol == PROTOCOL_TCP)
			fill_tcp((struct tcp_header *)(segment + gso->transport), &common, sum,
				 offset, payload == left);
		else
			fill_udp((struct udp_header *)(segment + gso->transport), sum,
				 length - gso->transport);
	}
}

/**
 * gso_complete_checksum() - Finish the checksum of a packet that is not cut
 * @vnet:   With VNET_NEEDS_CHECKSUM or without
 * @packet: From the IP header
 * @flow:   What flow_parse() said of it
 *
 * Return: whether the vnet header fits the packet
 */
bool gso_complete_checksum(const struct vnet_header *vnet, uint8_t *packet, const struct flow *flow)
{
	size_t start = vnet->checksum_start;
	size_t field = start + vnet->checksum_offset;
	struct checksum sum = { 0 };
	be16 value;

	if (!(vnet->flags & VNET_NEEDS_CHECKSUM))
		return true;
	/* The IP header has been read and routed by: it stays as it is. */
	if (start < flow->header_length || start > flow->length ||
	    field + sizeof(value) > flow->length)
		return false;
	checksum_add(&sum, packet + start, flow->length - start);
	value = checksum_field(&sum);
	/* As csum_fold() ? : CSUM_MANGLED_0 in skb_checksum_help(). */
	if (get_be16(value) == 0)
		value = put_be16(0xffff);
	memcpy(packet + field, &value, sizeof(value));
	return true;
}
