/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Invariant of coalescing. Whatever packets come from the wire: nothing outside of them is read or
 * written, and of those with a sound IP header
 *  - each is written exactly once, alone or in one super-packet;
 *  - what was joined is, cut again by segmentation, the same packets byte for byte, but for the id
 * of packets with DF that all have one, and for the two forms of zero in a checksum;
 *  - within a flow all are written in the order in which they came, and nothing that came behind a
 *    fragment is written before it;
 *  - after gro_undo() each packet is as it came;
 * and the shorter way, gro_continue(), takes nothing that flow_parse() refuses.
 *
 * Input: one byte of which bits 0 and 1 switch TCP and UDP on, the hint in 2 bytes, then packets,
 * each with its length in 2 bytes in front.
 */
#include "invariants.h"

#include "checksum.h"
#include "gro.h"
#include "gso.h"

#define PACKETS_MAX 4096

struct given {
	uint8_t *packet; /* may be changed */
	const uint8_t *before;
	size_t length;
	struct flow flow;
	bool written;
};

struct stream {
	struct given given[PACKETS_MAX];
	size_t count;
	size_t writes;
};

static uint16_t ethertype_of(const uint8_t *packet)
{
	return packet[0] >> 4 == 4 ? ETHERTYPE_IPV4 : ETHERTYPE_IPV6;
}

static struct given *owner_of(struct stream *stream, const uint8_t *place)
{
	for (size_t i = 0; i < stream->count; i++) {
		struct given *given = &stream->given[i];

		if (place >= given->packet && place < given->packet + given->length)
			return given;
	}
	HOLDS(!"a piece lies in no packet");
	return NULL;
}

static bool one_flow(const struct flow *a, const struct flow *b)
{
	return a->hash == b->hash && inet_equal(&a->source, &b->source) &&
	       inet_equal(&a->destination, &b->destination) && a->protocol == b->protocol;
}

static void note_written(struct stream *stream, struct given *given)
{
	HOLDS(!given->written);
	given->written = true;
	stream->writes++;
	for (struct given *other = stream->given; other < given; other++)
		HOLDS(other->written ||
		      !(one_flow(&other->flow, &given->flow) || other->flow.fragment));
}

/* Let what may differ be equal. */
static void forget_id(uint8_t *packet)
{
	if (packet[0] >> 4 == 4) {
		struct ipv4_header *ip = (struct ipv4_header *)packet;

		ip->checksum = checksum_replace(ip->checksum, get_be16(ip->id), 0);
		ip->id = put_be16(0);
	}
}

static void forget_negative_zero(be16 *checksum)
{
	if (get_be16(*checksum) == 0xffff)
		*checksum = put_be16(0);
}

static void equal(const struct gso *gso, const uint8_t *a, const uint8_t *b, size_t length,
		  bool any_id)
{
	uint8_t *one = exactly(a, length), *two = exactly(b, length);
	uint8_t *each[] = { one, two };

	for (int i = 0; i < 2; i++) {
		if (any_id)
			forget_id(each[i]);
		if (each[i][0] >> 4 == 4)
			forget_negative_zero(&((struct ipv4_header *)each[i])->checksum);
		if (gso->protocol == PROTOCOL_TCP)
			forget_negative_zero(
				&((struct tcp_header *)(each[i] + gso->transport))->checksum);
	}
	HOLDS(memcmp(one, two, length) == 0);
	free(one);
	free(two);
}

/* Cut a super-packet again and find its packets. */
static void super_packet_holds(struct stream *stream, const struct gro *gro,
			       const struct gro_packet *held, const struct vnet_header *vnet,
			       const struct iovec *iov, unsigned int pieces)
{
	size_t length = 0, at = 0;
	uint8_t *packet, *room;
	struct flow flow;
	struct gso gso;
	int segment = held->first;
	const struct ipv4_header *ip = (const struct ipv4_header *)held->packet;
	bool any_id = held->packet[0] >> 4 == 4 && held->fixed_id;

	HOLDS(!any_id || get_be16(ip->fragment) & IPV4_DONT_FRAGMENT);
	for (unsigned int i = 0; i < pieces; i++)
		length += iov[i].iov_len;
	packet = malloc(length);
	HOLDS(packet);
	for (unsigned int i = 0; i < pieces; i++) {
		memcpy(packet + at, iov[i].iov_base, iov[i].iov_len);
		at += iov[i].iov_len;
	}
	HOLDS(flow_parse(packet, length, ethertype_of(packet), &flow) && flow.length == length);
	HOLDS(gso_parse(vnet, packet, &flow, &gso) && gso.segments == held->segments);
	HOLDS(gso.segments <= GRO_SEGMENTS_PER_PACKET);
	room = malloc(length + gso.segments * gso.headers);
	HOLDS(room);
	memcpy(room, packet, length);
	gso_spread(&gso, room, 0);
	gso_fill(&gso, room, 0);
	for (size_t i = 0; i < gso.segments; i++) {
		const uint8_t *place = i ? gro->segment[segment].payload : held->packet;
		struct given *given = owner_of(stream, place);
		size_t payload = i + 1 == gso.segments ? gso.payload - i * gso.size : gso.size;

		HOLDS(given->flow.length == gso.headers + payload);
		if (i) {
			HOLDS(place == given->packet + gso.headers);
			segment = gro->segment[segment].next;
		}
		equal(&gso, room + i * (gso.headers + gso.size), given->before,
		      gso.headers + payload, any_id);
		note_written(stream, given);
	}
	free(room);
	free(packet);
}

static void write_out(struct stream *stream, struct gro *gro)
{
	for (unsigned int i = 0; i < gro->packets; i++) {
		struct gro_packet *held = &gro->packet[i];
		struct given *given = owner_of(stream, held->packet);
		struct iovec iov[GRO_SEGMENTS_PER_PACKET];
		struct vnet_header vnet;
		struct gro_edit edit;
		unsigned int pieces = gro_finish(gro, held, &vnet, &edit, iov);

		if (held->segments > 1) {
			super_packet_holds(stream, gro, held, &vnet, iov, pieces);
			gro_undo(held, &edit);
		} else {
			HOLDS(pieces == 1 && iov[0].iov_base == given->packet &&
			      iov[0].iov_len == given->flow.length);
			HOLDS(!vnet.flags || held->partial);
			note_written(stream, given);
		}
	}
	gro_start(gro);
}

void coalesce_holds(const uint8_t *input, size_t size)
{
	static struct stream stream;
	static struct gro gro;
	size_t hint;

	if (size < 3)
		return;
	gro.tcp = input[0] & 1;
	gro.udp = input[0] & 2;
	hint = (size_t)input[1] << 8 | input[2];
	input += 3;
	size -= 3;
	stream.count = stream.writes = 0;
	gro_start(&gro);
	while (size >= 2 && stream.count < PACKETS_MAX) {
		struct given *given = &stream.given[stream.count];
		size_t length = (size_t)input[0] << 8 | input[1];

		input += 2;
		size -= 2;
		if (length > size)
			length = size;
		*given = (struct given) { .packet = exactly(input, length),
					  .before = input,
					  .length = length };
		input += length;
		size -= length;
		if (!length ||
		    !flow_parse(given->packet, length, ethertype_of(given->packet), &given->flow)) {
			HOLDS(!gro_continue(&gro, given->packet, length));
			free(given->packet);
			continue;
		}
		stream.count++;
		if (gro_continue(&gro, given->packet, length))
			continue;
		while (!gro_add(&gro, given->packet, &given->flow, hint, NULL))
			write_out(&stream, &gro);
	}
	write_out(&stream, &gro);
	HOLDS(stream.writes == stream.count);
	for (size_t i = 0; i < stream.count; i++) {
		HOLDS(memcmp(stream.given[i].packet, stream.given[i].before,
			     stream.given[i].length) == 0);
		free(stream.given[i].packet);
	}
}
