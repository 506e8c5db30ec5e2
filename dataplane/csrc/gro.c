/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DOC: Coalescing of inner packets into super-packets, before they are written to the TUN
 *
 * Packets of one batch are held in the order in which they came. A TCP segment or UDP datagram that
 * follows the newest held packet of its flow joins it, under the rules of the kernel's
 * tcp_gro_receive(), udp_gro_receive() and inet_gro_receive(): only what segmentation would give
 * back the same way is joined. Nothing is copied: a held packet is a list of places in the receive
 * buffers. At the end of a batch every held packet is written in order of its first segment, so
 * that no flow is reordered.
 *
 * A super-packet is vouched for to the kernel (VNET_NEEDS_CHECKSUM), so the checksum of each
 * segment is verified before it joins; the first one's when the second comes. A packet that stays
 * alone is handed on as it came and the kernel verifies it itself. One exception: a kernel peer on
 * a virtual link leaves the checksum partial, the pseudo header's sum only, and may send
 * super-packets as one datagram. These pass with the same mark that they had in the peer's kernel.
 */
#include "gro.h"

#include "transport.h"

#define IPV4_PLAIN_HEADER 0x45

/* UDP_GRO tells the gso size of UDP only. A stream may be cut anywhere, and this fits every MTU. */
#define WITHOUT_HINT_BYTES 1200

/* What gro_add() finds out about a packet before it looks for company. */
struct arrival {
	uint8_t *packet;
	size_t length;
	size_t headers;
	size_t transport;
	size_t payload;
	uint8_t protocol;
	be16 checksum;
	struct checksum pseudo;
};

/** gro_start() - Hold nothing */
void gro_start(struct gro *gro)
{
	gro->packets = gro->segments = 0;
	gro->newest = NULL;
	memset(gro->bucket, 0xff, sizeof(gro->bucket));
}

static uint8_t protocol_of(const uint8_t *packet)
{
	return packet[0] >> 4 == 4 ? ((const struct ipv4_header *)packet)->protocol
				   : ((const struct ipv6_header *)packet)->next_header;
}

/* Read the headers of TCP or UDP. Return: false for anything else, also in a fragment */
static bool read_transport(struct arrival *in, const struct flow *flow)
{
	const uint8_t *transport = in->packet + flow->header_length;
	size_t left = flow->length - flow->header_length;

	if (flow->fragment)
		return false;
	in->transport = flow->header_length;
	in->protocol = flow->protocol;
	if (flow->protocol == PROTOCOL_TCP) {
		const struct tcp_header *tcp = (const struct tcp_header *)transport;
		size_t header;

		if (left < sizeof(*tcp))
			return false;
		header = tcp_header_length(tcp);
		if (header < sizeof(*tcp) || header > left)
			return false;
		in->headers = in->transport + header;
		in->checksum = tcp->checksum;
	} else if (flow->protocol == PROTOCOL_UDP) {
		const struct udp_header *udp = (const struct udp_header *)transport;

		if (left < sizeof(*udp) || get_be16(udp->length) != left)
			return false;
		in->headers = in->transport + sizeof(*udp);
		in->checksum = udp->checksum;
	} else {
		return false;
	}
	if (in->headers > GRO_HEADERS_MAX)
		return false;
	in->payload = flow->length - in->headers;
	in->pseudo = transport_pseudo(in->packet, in->protocol, left);
	return true;
}

static bool verify(const uint8_t *packet, size_t transport, size_t length, struct checksum pseudo)
{
	checksum_add(&pseudo, packet + transport, length - transport);
	return get_be16(checksum_field(&pseudo)) == 0;
}

static bool same(const uint8_t *a, const uint8_t *b, size_t from, size_t to)
{
	return memcmp(a + from, b + from, to - from) == 0;
}

#define FIELD_END(type, field) (offsetof(type, field) + sizeof(((type *)0)->field))

static bool same_flow(const struct gro_packet *held, const struct arrival *in)
{
	const uint8_t *a = held->packet, *b = in->packet;

	if (a[0] >> 4 != b[0] >> 4)
		return false;
	if (a[0] >> 4 == 4) {
		if (!same(a, b, offsetof(struct ipv4_header, source), sizeof(struct ipv4_header)) ||
		    a[offsetof(struct ipv4_header, protocol)] != in->protocol)
			return false;
	} else if (!same(a, b, offsetof(struct ipv6_header, source), sizeof(struct ipv6_header)) ||
		   a[offsetof(struct ipv6_header, next_header)] != in->protocol) {
		return false;
	}
	/* Ports come first in both transports. */
	return memcmp(a + held->transport, b + in->transport, 2 * sizeof(be16)) == 0;
}

/*
 * Ids count up, as segmentation will make them. An atomic packet's id means nothing (RFC 6864), so
 * there all may also be equal, as with hosts that do not count; a TUN cannot be told, and the
 * segments behind it will be counted.
 */
static bool id_follows(const struct gro_packet *held, const struct ipv4_header *first,
		       const struct ipv4_header *next)
{
	uint16_t step = (uint16_t)(get_be16(next->id) - get_be16(first->id));

	if (step == 0)
		return get_be16(first->fragment) & IPV4_DONT_FRAGMENT &&
		       (held->segments == 1 || held->fixed_id);
	return step == held->segments && !held->fixed_id;
}

/* Whether the IP header of @b could be that of the segment behind @held (inet_gro_receive()). */
static bool ip_follows(const struct gro_packet *held, const uint8_t *b)
{
	const uint8_t *a = held->packet;

	if (a[0] >> 4 == 4) {
		const struct ipv4_header *first = (const struct ipv4_header *)a;
		const struct ipv4_header *next = (const struct ipv4_header *)b;

		return first->version_ihl == IPV4_PLAIN_HEADER &&
		       next->version_ihl == IPV4_PLAIN_HEADER && first->tos == next->tos &&
		       first->ttl == next->ttl &&
		       get_be16(first->fragment) == get_be16(next->fragment) &&
		       id_follows(held, first, next);
	}
	return same(a, b, 0, FIELD_END(struct ipv6_header, label)) &&
	       a[offsetof(struct ipv6_header, hop_limit)] ==
		       b[offsetof(struct ipv6_header, hop_limit)];
}

static bool tcp_follows(const struct gro_packet *held, const struct arrival *in)
{
	const struct tcp_header *a = (const struct tcp_header *)(held->packet + held->transport);
	const struct tcp_header *b = (const struct tcp_header *)(in->packet + in->transport);

	/* Flags that end a packet may differ, in the last segment; CWR must stand in a first one.
	 */
	return held->headers == in->headers && get_be32(b->sequence) == held->next_sequence &&
	       get_be32(a->acknowledgement) == get_be32(b->acknowledgement) &&
	       a->offset_reserved == b->offset_reserved &&
	       get_be16(a->window) == get_be16(b->window) &&
	       ((a->flags ^ b->flags) & ~(TCP_FIN | TCP_PSH)) == 0 &&
	       same(held->packet, in->packet, in->transport + offsetof(struct tcp_header, urgent),
		    in->headers);
}

/* Whether a flow may grow behind a TCP segment with these flags. */
static bool tcp_may_grow(uint8_t flags)
{
	return (flags & ~TCP_ECE) == TCP_ACK;
}

/* Whether a packet may be joined by others, or join. */
static bool may_join(const struct gro *gro, const struct arrival *in)
{
	if (in->payload == 0)
		return false;
	if (in->protocol == PROTOCOL_UDP)
		return gro->udp && get_be16(in->checksum) != 0;
	return gro->tcp;
}

/* Let a packet join @held if all rules allow it. Return: whether it did */
static bool join(struct gro *gro, struct gro_packet *held, const struct arrival *in)
{
	uint8_t flags = 0;
	struct gro_segment *segment;
	int index;

	if (!held->open || in->payload > held->size || held->segments == GRO_SEGMENTS_PER_PACKET ||
	    held->total + in->payload > UINT16_MAX || !ip_follows(held, in->packet))
		return false;
	if (in->protocol == PROTOCOL_TCP) {
		if (!tcp_follows(held, in))
			return false;
		flags = ((const struct tcp_header *)(in->packet + in->transport))->flags;
	}
	if (!held->verified) {
		held->verified = verify(held->packet, held->transport, held->length,
					transport_pseudo(held->packet, in->protocol,
							 held->length - held->transport));
		held->open = held->verified;
	}
	if (!held->verified || !verify(in->packet, in->transport, in->length, in->pseudo))
		return false;
	gro->newest = held;
	index = (int)gro->segments++;
	segment = &gro->segment[index];
	*segment = (struct gro_segment) { in->packet + in->headers, in->payload, -1 };
	if (held->last < 0)
		held->first = index;
	else
		gro->segment[held->last].next = index;
	held->last = index;
	held->fixed_id = same(held->packet, in->packet, offsetof(struct ipv4_header, id),
			      FIELD_END(struct ipv4_header, id));
	held->segments++;
	held->total += in->payload;
	held->next_sequence += (uint32_t)in->payload;
	held->flags |= flags;
	held->open =
		in->payload == held->size && (in->protocol == PROTOCOL_UDP || tcp_may_grow(flags));
	return true;
}

static struct gro_packet *hold(struct gro *gro, uint8_t *packet, size_t length)
{
	struct gro_packet *held = &gro->packet[gro->packets++];

	*held = (struct gro_packet) {
		.packet = packet,
		.length = length,
		.total = length,
		.segments = 1,
		.first = -1,
		.last = -1,
		.older = -1,
	};
	gro->newest = held;
	return held;
}

/* Whether the checksum field holds the sum of the pseudo header and no more. */
static bool is_partial(const struct arrival *in)
{
	be16 partial = checksum_partial(&in->pseudo);

	/* One in 65,536 complete checksums looks the same. */
	return memcmp(&in->checksum, &partial, sizeof(partial)) == 0 &&
	       !verify(in->packet, in->transport, in->length, in->pseudo);
}

/**
 * gro_add() - Take a packet in
 * @gro:    With room, see the return value
 * @packet: From its IP header, which flow_parse() accepted; must stay until it is written
 * @flow:   What flow_parse() said
 * @hint:   gso size of a super-packet from a kernel peer, 0 when not known
 * @sender: Given back with the packet; packets of different senders are never joined
 *
 * Return: false when there is no room: write what is held, start anew and add again
 */
bool gro_add(struct gro *gro, uint8_t *packet, const struct flow *flow, size_t hint,
	     const struct fib_entry *sender)
{
	struct arrival in = { .packet = packet, .length = flow->length };
	int *bucket = &gro->bucket[flow->hash % GRO_BUCKETS];
	struct gro_packet *held;

	if (gro->packets == GRO_PACKETS || gro->segments == GRO_SEGMENTS)
		return false;
	if (!read_transport(&in, flow)) {
		/* It has a flow all the same, a fragment any: nothing behind it may overtake it. */
		for (unsigned int i = 0; i < gro->packets && flow->fragment; i++)
			gro->packet[i].open = false;
		for (int i = *bucket; i >= 0; i = gro->packet[i].older)
			gro->packet[i].open &= gro->packet[i].hash != flow->hash;
		hold(gro, packet, flow->length)->sender = sender;
		return true;
	}
	for (int i = *bucket; i >= 0; i = gro->packet[i].older) {
		held = &gro->packet[i];
		if (held->hash != flow->hash || !same_flow(held, &in))
			continue;
		if (held->sender == sender && may_join(gro, &in) && join(gro, held, &in))
			return true;
		break;
	}
	held = hold(gro, packet, flow->length);
	held->sender = sender;
	held->headers = in.headers;
	held->transport = in.transport;
	held->size = in.payload;
	held->hash = flow->hash;
	held->older = *bucket;
	*bucket = (int)(held - gro->packet);
	held->partial = is_partial(&in);
	held->open = !held->partial && may_join(gro, &in);
	if (held->partial && hint && hint < in.payload)
		held->size = hint;
	else if (held->partial && in.protocol == PROTOCOL_TCP && !hint &&
		 in.payload > WITHOUT_HINT_BYTES)
		held->size = WITHOUT_HINT_BYTES;
	if (in.protocol == PROTOCOL_TCP) {
		const struct tcp_header *tcp = (const struct tcp_header *)(packet + in.transport);

		held->flags = tcp->flags;
		held->next_sequence = get_be32(tcp->sequence) + (uint32_t)in.payload;
		held->open &= tcp_may_grow(tcp->flags);
	}
	return true;
}

static bool has_sound_header(const uint8_t *packet, size_t length)
{
	bool is_ipv4 = packet[0] >> 4 == 4;

	return ip_total_length(packet, is_ipv4) == length &&
	       (!is_ipv4 || checksum(packet, sizeof(struct ipv4_header)) == 0);
}

/**
 * gro_continue() - Take in a packet that only goes on where the last one stopped
 * @gro:    That the last packet was added to
 * @packet: From its IP header, which nobody has looked at; must stay until it is written
 * @length: Bytes of it
 *
 * This is a shorter way for most packets of a bulk flow: whatever flow_parse() would find in them
 * it has found in those that they join.
 *
 * Return: false when it is anything else: nothing has changed, and it is to be checked and added
 */
bool gro_continue(struct gro *gro, uint8_t *packet, size_t length)
{
	struct arrival in = { .packet = packet, .length = length };
	struct gro_packet *held = gro->newest;
	struct flow flow;

	if (!held || !held->open || length <= held->headers || gro->segments == GRO_SEGMENTS ||
	    packet[0] >> 4 != held->packet[0] >> 4 || !has_sound_header(packet, length))
		return false;
	flow.fragment = false;
	flow.length = length;
	flow.header_length = held->transport;
	flow.protocol = protocol_of(packet);
	return read_transport(&in, &flow) && same_flow(held, &in) && may_join(gro, &in) &&
	       join(gro, held, &in);
}

static void set_total(uint8_t *packet, size_t total)
{
	if (packet[0] >> 4 == 4) {
		struct ipv4_header *ip = (struct ipv4_header *)packet;
		uint16_t before = get_be16(ip->total_length);

		ip->total_length = put_be16((uint16_t)total);
		ip->checksum = checksum_replace(ip->checksum, before, (uint16_t)total);
	} else {
		((struct ipv6_header *)packet)->payload_length =
			put_be16((uint16_t)(total - sizeof(struct ipv6_header)));
	}
}

/**
 * gro_finish() - Make a held packet ready to be written
 * @gro:  That holds it
 * @held: Its first headers become those of the super-packet
 * @vnet: The header to write in front
 * @edit: Where to keep what gro_undo() needs
 * @iov:  The packet's pieces
 *
 * Return: number of pieces
 */
unsigned int gro_finish(struct gro *gro, struct gro_packet *held, struct vnet_header *vnet,
			struct gro_edit *edit, struct iovec iov[GRO_SEGMENTS_PER_PACKET])
{
	uint8_t protocol = protocol_of(held->packet);
	unsigned int count = 1;

	*vnet = (struct vnet_header) { .gso_type = VNET_GSO_NONE };
	iov[0] = (struct iovec) { held->packet, held->length };
	if (held->segments == 1 && !held->partial)
		return 1;
	vnet->flags = VNET_NEEDS_CHECKSUM;
	vnet->checksum_start = (uint16_t)held->transport;
	vnet->checksum_offset = protocol == PROTOCOL_TCP ? offsetof(struct tcp_header, checksum)
							 : offsetof(struct udp_header, checksum);
	if (held->size < held->total - held->headers) {
		vnet->header_length = (uint16_t)held->headers;
		vnet->gso_size = (uint16_t)held->size;
		if (protocol == PROTOCOL_UDP)
			vnet->gso_type = VNET_GSO_UDP;
		else
			vnet->gso_type =
				held->packet[0] >> 4 == 4 ? VNET_GSO_TCPV4 : VNET_GSO_TCPV6;
		if (protocol == PROTOCOL_TCP && held->flags & TCP_CWR)
			vnet->gso_type |= VNET_GSO_ECN;
	}
	if (held->segments == 1)
		return 1;
	memcpy(edit->before, held->packet, held->headers);
	set_total(held->packet, held->total);
	struct checksum pseudo =
		transport_pseudo(held->packet, protocol, held->total - held->transport);
	be16 partial = checksum_partial(&pseudo);

	memcpy(held->packet + held->transport + vnet->checksum_offset, &partial, sizeof(partial));
	if (protocol == PROTOCOL_TCP)
		((struct tcp_header *)(held->packet + held->transport))->flags = held->flags;
	else
		((struct udp_header *)(held->packet + held->transport))->length =
			put_be16((uint16_t)(held->total - held->transport));
	for (int i = held->first; i >= 0; i = gro->segment[i].next)
		iov[count++] = (struct iovec) { gro->segment[i].payload, gro->segment[i].length };
	return count;
}

/** gro_undo() - Give a joined packet's first segment its own headers back */
void gro_undo(struct gro_packet *held, const struct gro_edit *edit)
{
	memcpy(held->packet, edit->before, held->headers);
}
