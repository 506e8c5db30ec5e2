/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Two workers, the whole way of a packet, over sockets of an ordinary user: a TUN queue hands over
 * and takes one packet at a time, and so does a pair of SOCK_SEQPACKET sockets.
 *
 *   tun of node 2 -> worker -> UDP over loopback -> worker -> tun of node 1
 *
 * Whatever offloads there are, the same input must give the same packets, each flow's in order.
 */
#define _GNU_SOURCE
#include "check.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/udp.h>
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "gso.h"

#define FLOWS 3
#define PACKET_MAX 65535
#define OUTPUT_BYTES (8 * 1024 * 1024)

enum { TSO = 1, USO = 2, GSO = 4, GRO = 8, EVERY = 15 };

/* Packets of one flow, each with its length in four bytes in front. */
struct output {
	uint8_t *bytes;
	size_t size;
};

struct node {
	struct fp_ctx *ctx;
	struct fp_worker *worker;
	int tun[2]; /* the test's end, the worker's end */
	int receive, send;
	struct sockaddr_in address;
};

static int udp_socket(struct sockaddr_in *address)
{
	socklen_t length = sizeof(*address);
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
	int bytes = 4 << 20;

	*address = (struct sockaddr_in) { .sin_family = AF_INET };
	address->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof(bytes));
	HOLDS(fd >= 0 && bind(fd, (struct sockaddr *)address, sizeof(*address)) == 0);
	HOLDS(getsockname(fd, (struct sockaddr *)address, &length) == 0);
	return fd;
}

static void open_node(struct node *node, uint8_t number, int offload)
{
	struct sockaddr_in unused;
	int one = 1, bytes = 4 << 20;
	struct fp_config config = config_of(number, FP_SPOOF_ENFORCE);
	struct fp_io io = {
		.tun_count = 1,
		.receive_count = 1,
		.send_count = 1,
		.segment = offload & GSO,
		.coalesce_tcp = offload & TSO,
		.coalesce_udp = offload & USO,
	};

	HOLDS(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, node->tun) == 0);
	for (int i = 0; i < 2; i++)
		setsockopt(node->tun[i], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
	node->receive = udp_socket(&node->address);
	node->send = udp_socket(&unused);
	if (offload & GRO)
		HOLDS(setsockopt(node->receive, IPPROTO_UDP, UDP_GRO, &one, sizeof(one)) == 0);
	node->ctx = fp_ctx_new(&config);
	HOLDS(node->ctx);
	io.tun = &node->tun[1];
	io.tun_write = node->tun[1];
	io.receive = &node->receive;
	io.send = &node->send;
	node->worker = fp_worker_new(node->ctx, &io);
	HOLDS(node->worker);
}

static void route_to(struct node *node, uint8_t number, const struct node *peer)
{
	struct fp_route route = route_of(number, ntohs(peer->address.sin_port));

	HOLDS(fp_route_replace(node->ctx, &route) == 0);
}

static void close_node(struct node *node)
{
	fp_worker_free(node->worker);
	fp_ctx_free(node->ctx);
	close(node->tun[0]);
	close(node->tun[1]);
	close(node->receive);
	close(node->send);
}

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

static void put(const struct node *node, const struct vnet_header *vnet, uint8_t *packet,
		size_t length)
{
	struct iovec iov[] = { { (void *)vnet, sizeof(*vnet) }, { packet, length } };

	HOLDS(writev(node->tun[0], iov, 2) == (ssize_t)(sizeof(*vnet) + length));
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
	const struct vnet_header vnet = { .flags = VNET_NEEDS_CHECKSUM,
					  .gso_type = VNET_GSO_UDP,
					  .gso_size = 20,
					  .header_length = 28,
					  .checksum_start = 20,
					  .checksum_offset = 6 };
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
				     .payload = SEGMENTS * 20,
				     .fill = i,
				     .partial = true };
		size_t length = build(&spec, packet);

		append_segments(expected, &vnet, packet, length);
		put(&from, &vnet, packet, length);
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

#define HELD 40
#define MORE 20

/* What is put to the TUN and leaves by the wire, packets of one flow. */
struct wire {
	struct node node;
	int fd; /* the far end */
	uint8_t put;
	_Atomic uint8_t arrived;
	uint8_t expected;
};

/*
 * A pair of SOCK_SEQPACKET sockets fills up, which UDP over loopback does not, does not mind an
 * address, and refuses with EMSGSIZE what is longer than its room.
 */
static void open_wire(struct wire *wire, int offload)
{
	int pair[2], bytes = 1;

	*wire = (struct wire) { 0 };
	open_node(&wire->node, 2, offload);
	route_to(&wire->node, 1, &wire->node);
	HOLDS(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) == 0);
	setsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
	HOLDS(fcntl(pair[1], F_SETFL, O_NONBLOCK) == 0);
	HOLDS(dup2(pair[1], wire->node.send) == wire->node.send);
	close(pair[1]);
	wire->fd = pair[0];
}

static void put_on(struct wire *wire, unsigned int packets)
{
	static const struct vnet_header plain;
	uint8_t packet[PACKET_MAX];

	while (packets--) {
		struct spec spec = { .udp = true,
				     .source_node = 2,
				     .destination_node = 1,
				     .payload = 200,
				     .fill = wire->put++ };

		put(&wire->node, &plain, packet, build(&spec, packet));
	}
}

static struct fp_counters counters_of(const struct wire *wire)
{
	struct fp_counters counters;

	fp_counters_read(wire->node.ctx, &counters);
	return counters;
}

/* Count what leaves, each packet the next of its flow. */
static void *take_frames(void *argument)
{
	struct wire *wire = argument;
	uint8_t frame[PACKET_MAX];

	while (wire->arrived < wire->expected && recv(wire->fd, frame, sizeof(frame), 0) > 0) {
		/* VXLAN, Ethernet, IPv4 and UDP headers, then the payload. */
		HOLDS(frame[8 + 14 + 20 + 8] == wire->arrived);
		wire->arrived++;
	}
	return NULL;
}

/*
 * The wire is full when a worker ends: what it holds leaves as soon as there is room, in order, and
 * where nobody makes room, it ends all the same.
 */
static void check_drain(bool gets_room)
{
	struct wire wire;
	pthread_t thread;

	open_wire(&wire, 0);
	put_on(&wire, HELD);
	while (fp_worker_turn(wire.node.worker) > 0)
		;
	wire.expected = HELD;
	if (gets_room)
		HOLDS(pthread_create(&thread, NULL, take_frames, &wire) == 0);
	close_node(&wire.node);
	if (gets_room)
		pthread_join(thread, NULL);
	else
		take_frames(&wire);
	HOLDS(gets_room ? wire.arrived == HELD : wire.arrived > 0 && wire.arrived < HELD);
	close(wire.fd);
}

static void turn_or_wait(const struct wire *wire, int threads)
{
	if (threads)
		usleep(100);
	else
		fp_worker_turn(wire->node.worker);
}

/*
 * The wire is full for a while: nothing more is read meanwhile, and nobody wakes up for what cannot
 * be read; then all leaves, in order, and each is counted once. With GSO the wire refuses the
 * packets as one message and is full again and again while it takes them one by one.
 */
static void check_full_wire(int offload, int threads)
{
	const size_t bytes = (HELD + MORE) * (20 + 8 + 200);
	struct fp_counters counters;
	struct fp_peer_traffic peer;
	struct wire wire;
	pthread_t thread;

	open_wire(&wire, offload);
	put_on(&wire, HELD);
	if (threads)
		HOLDS(fp_worker_start(wire.node.worker, threads) == 0);
	while (counters_of(&wire).sends_blocked == 0)
		turn_or_wait(&wire, threads);
	put_on(&wire, MORE);
	if (!threads) {
		struct pollfd ready = { fp_worker_fd(wire.node.worker), POLLIN, 0 };

		HOLDS(poll(&ready, 1, 0) == 1);
		HOLDS(fp_worker_turn(wire.node.worker) == 0);
		HOLDS(poll(&ready, 1, 0) == 0);
	}
	HOLDS(counters_of(&wire).tun_reads == HELD);
	wire.expected = HELD + MORE;
	HOLDS(pthread_create(&thread, NULL, take_frames, &wire) == 0);
	do {
		turn_or_wait(&wire, threads);
		counters = counters_of(&wire);
		HOLDS(fp_peers_traffic(wire.node.ctx, &peer, 1) == 1);
	} while (counters.traffic.encap_bytes < bytes || peer.traffic.encap_bytes < bytes);
	pthread_join(thread, NULL);
	HOLDS(counters.traffic.encap_packets == wire.expected);
	HOLDS(counters.traffic.encap_bytes == bytes);
	HOLDS(counters.sends_unsegmented == (offload & GSO ? 1 : 0));
	HOLDS(memcmp(&peer.traffic, &counters.traffic, sizeof(peer.traffic)) == 0);
	HOLDS(peer.drops == 0);
	close_node(&wire.node);
	close(wire.fd);
}

/* What fills a wire goes nowhere, as to a host that is down: after a while there is more room. */
static void check_stuck_wire(int threads)
{
	struct wire wire;

	open_wire(&wire, 0);
	put_on(&wire, HELD);
	if (threads)
		HOLDS(fp_worker_start(wire.node.worker, threads) == 0);
	while (counters_of(&wire).sends_blocked == 0)
		turn_or_wait(&wire, threads);
	HOLDS(counters_of(&wire).traffic.encap_packets < HELD);
	while (counters_of(&wire).traffic.encap_packets < HELD) {
		if (!threads) {
			struct pollfd ready = { fp_worker_fd(wire.node.worker), POLLIN, 0 };

			HOLDS(poll(&ready, 1, -1) == 1);
		}
		turn_or_wait(&wire, threads);
	}
	wire.expected = HELD;
	take_frames(&wire);
	close_node(&wire.node);
	close(wire.fd);
}

/* The device is gone: as of a TUN, poll() tells of an error. */
static void check_gone(int threads)
{
	struct node node;
	struct pollfd ready = { .events = POLLIN };

	open_node(&node, 2, 0);
	if (threads)
		HOLDS(fp_worker_start(node.worker, threads) == 0);
	/* What is closed with something unread resets the other end. */
	HOLDS(write(node.tun[1], "", 1) == 1);
	close(node.tun[0]);
	node.tun[0] = -1;
	ready.fd = fp_worker_fd(node.worker);
	HOLDS(poll(&ready, 1, -1) == 1);
	if (threads)
		HOLDS(fp_worker_error(node.worker) == EBADFD);
	else
		HOLDS(fp_worker_turn(node.worker) == -EBADFD);
	close_node(&node);
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
	check_drain(true);
	check_drain(false);
	for (int threads = 0; threads <= 3; threads++) {
		check_full_wire(0, threads);
		check_full_wire(GSO, threads);
		check_stuck_wire(threads);
		check_gone(threads);
	}
	for (int i = 0; i < FLOWS; i++) {
		free(got[i].bytes);
		free(expected[i].bytes);
	}
}
