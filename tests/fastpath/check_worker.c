/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Two workers, the whole way of a packet, over sockets of an ordinary user.
 *
 *   tun of node 2 -> worker -> UDP over loopback -> worker -> tun of node 1
 *
 * Whatever offloads there are, the same input must give the same packets, each flow's in order.
 */
#define _GNU_SOURCE
#include "check.h"

#include <sys/uio.h>

#include "gso.h"
#include "node.h"

#define FLOWS 3
#define PACKET_MAX 65535
#define OUTPUT_BYTES (8 * 1024 * 1024)

/* Packets of one flow, each with its length in four bytes in front. */
struct output {
	uint8_t *bytes;
	size_t size;
};

static void append(struct output *output, const uint8_t *packet, size_t length)
{
	uint32_t size = (uint32_t)length;

	HOLDS(output->size + sizeof(size) + length <= OUTPUT_BYTES);
	memcpy(output->bytes + output->size, &size, sizeof(size));
	memcpy(output->bytes + output->size + sizeof(size), packet, length);
	output->size += sizeof(size) + length;
}

/* Append what the kernel behind the TUN would make of a packet to its flow's output. */
static void append_segments(struct output output[FLOWS], const struct vnet_header *vnet,
			    const uint8_t *packet, size_t length)
{
	static uint8_t room[4 * PACKET_MAX];
	struct flow flow;
	struct gso gso;
	unsigned int index;

	HOLDS(flow_parse(packet, length, ETHERTYPE_IPV4, &flow) && flow.length == length);
	HOLDS(gso_parse(vnet, packet, &flow, &gso));
	memcpy(room, packet, length);
	index = packet[flow.header_length + 1] % FLOWS;
	if (!gso.protocol) {
		HOLDS(gso_complete_checksum(vnet, room, &flow));
		append(&output[index], room, length);
		return;
	}
	gso_spread(&gso, room, 0);
	gso_fill(&gso, room, 0);
	for (size_t i = 0; i < gso.segments; i++) {
		size_t left = gso.payload - i * gso.size;

		append(&output[index], room + i * (gso.headers + gso.size),
		       gso.headers + (left < gso.size ? left : gso.size));
	}
}

/* Make the next packet of a flow as the kernel hands it over. Return: its length */
static size_t next_packet(struct spec *flow, struct vnet_header *vnet, uint8_t *packet)
{
	size_t size = 1 + random_below(random_below(3) ? 20 : 1400);
	size_t length;

	*vnet = (struct vnet_header) { 0 };
	flow->payload = random_below(2) ? size : size * (1 + random_below(40));
	if (flow->payload > 60000)
		flow->payload = 60000;
	flow->fill++;
	flow->flags = random_below(8) ? TCP_ACK : TCP_ACK | TCP_PSH;
	flow->partial = flow->payload > size || random_below(2);
	length = build(flow, packet);
	if (flow->partial) {
		vnet->flags = VNET_NEEDS_CHECKSUM;
		vnet->checksum_start = 20;
		vnet->checksum_offset = flow->udp ? 6 : 16;
	}
	if (flow->payload > size) {
		vnet->gso_type = flow->udp ? VNET_GSO_UDP : VNET_GSO_TCPV4;
		vnet->gso_size = (uint16_t)size;
		vnet->header_length = (uint16_t)headers_of(flow);
	} else if (random_below(10) == 0 && !flow->partial) {
		packet[20 + (flow->udp ? 6 : 16)] ^= 1;
	}
	flow->sequence += (uint32_t)flow->payload;
	flow->id = (uint16_t)(flow->id + 1 + flow->payload / size);
	return length;
}

static void take(const struct node *node, struct output output[FLOWS])
{
	static uint8_t packet[PACKET_MAX];
	struct vnet_header vnet;
	struct iovec iov[] = { { &vnet, sizeof(vnet) }, { packet, sizeof(packet) } };
	ssize_t got;

	while ((got = readv(node->tun[0], iov, 2)) > 0)
		append_segments(output, &vnet, packet, (size_t)got - sizeof(vnet));
}

static void move(struct node *from, struct node *to, struct output output[FLOWS])
{
	while (fp_worker_turn(from->worker) > 0)
		;
	while (fp_worker_turn(to->worker) > 0)
		take(to, output);
	take(to, output);
}

/* The same packets with these offloads. */
static void run(int offload, struct output got[FLOWS], struct output expected[FLOWS])
{
	static uint8_t packet[PACKET_MAX];
	struct node from, to;
	struct spec flow[FLOWS];
	struct vnet_header vnet;

	random_seed(7);
	open_node(&from, 2, offload);
	open_node(&to, 1, offload);
	route_to(&from, 1, &to);
	route_to(&to, 2, &from);
	for (uint16_t i = 0; i < FLOWS; i++) {
		got[i].size = expected[i].size = 0;
		flow[i] = (struct spec) { .source_node = 2,
					  .destination_node = 1,
					  .source_port = i,
					  .udp = i == 1,
					  .tcp_options = 3,
					  .fragment = IPV4_DONT_FRAGMENT };
	}
	for (int turn = 0; turn < 150; turn++) {
		for (unsigned int count = random_below(6); count; count--) {
			size_t length = next_packet(&flow[random_below(FLOWS)], &vnet, packet);

			append_segments(expected, &vnet, packet, length);
			put(&from, &vnet, packet, length);
			if (length > 8000)
				break;
		}
		move(&from, &to, got);
	}
	for (int i = 0; i < FLOWS; i++)
		HOLDS(got[i].size == expected[i].size &&
		      memcmp(got[i].bytes, expected[i].bytes, got[i].size) == 0);
	close_node(&from);
	close_node(&to);
}

/* A datagram holds 65,507 bytes: an inner packet of 65,485 is the longest. */
static void check_longest(struct output got[FLOWS])
{
	static uint8_t packet[PACKET_MAX];
	static const struct vnet_header plain;
	struct fp_counters counters;
	struct node from, to;

	open_node(&from, 2, EVERY);
	open_node(&to, 1, EVERY);
	route_to(&from, 1, &to);
	route_to(&to, 2, &from);
	for (size_t length = 65484; length <= PACKET_MAX; length++) {
		struct spec spec = {
			.udp = true, .source_node = 2, .destination_node = 1, .payload = length - 28
		};

		got[0].size = 0;
		put(&from, &plain, packet, build(&spec, packet));
		move(&from, &to, got);
		HOLDS(got[0].size == (length <= 65485 ? sizeof(uint32_t) + length : 0));
	}
	fp_counters_read(from.ctx, &counters);
	HOLDS(counters.drops[FP_DROP_SEND_SIZE] == PACKET_MAX - 65485);
	close_node(&from);
	close_node(&to);
}

#define MESSAGES 30
#define SEGMENTS 50

/* More comes at once than is held before it is written: it is written in parts, in order. */
static void check_many(int offload, struct output got[FLOWS], struct output expected[FLOWS])
{
	static uint8_t packet[PACKET_MAX];
	struct fp_counters counters;
	struct node from, to;

	open_node(&from, 2, offload);
	open_node(&to, 1, offload);
	route_to(&from, 1, &to);
	route_to(&to, 2, &from);
	got[1].size = expected[1].size = 0;
	for (uint8_t i = 0; i < MESSAGES; i++) {
		struct spec spec = { .udp = true,
				     .source_node = 2,
				     .destination_node = 1,
				     .source_port = 1,
				     .payload = SEGMENTS * UDP_SEGMENT_BYTES,
				     .fill = i,
				     .partial = true };
		size_t length = build(&spec, packet);

		append_segments(expected, &udp_super_packet, packet, length);
		put(&from, &udp_super_packet, packet, length);
	}
	move(&from, &to, got);
	HOLDS(expected[1].size == MESSAGES * SEGMENTS * (sizeof(uint32_t) + 20 + 8 + 20));
	HOLDS(got[1].size == expected[1].size &&
	      memcmp(got[1].bytes, expected[1].bytes, got[1].size) == 0);
	fp_counters_read(to.ctx, &counters);
	HOLDS(counters.traffic.decap_packets == MESSAGES * SEGMENTS);
	HOLDS(counters.receives < MESSAGES);
	close_node(&from);
	close_node(&to);
}

void check_worker(void)
{
	struct output got[FLOWS], expected[FLOWS];

	for (int i = 0; i < FLOWS; i++) {
		got[i].bytes = malloc(OUTPUT_BYTES);
		expected[i].bytes = malloc(OUTPUT_BYTES);
		HOLDS(got[i].bytes && expected[i].bytes);
	}
	for (int offload = 0; offload <= EVERY; offload++)
		run(offload, got, expected);
	check_longest(got);
	check_many(GSO | GRO, got, expected);
	check_many(EVERY, got, expected);
	for (int i = 0; i < FLOWS; i++) {
		free(got[i].bytes);
		free(expected[i].bytes);
	}
}
