/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A wire that is full, for a while or for good, and a TUN device that is gone.
 */
#define _GNU_SOURCE
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>
#include <unistd.h>

#include "node.h"

#define FRAME_MAX 2048
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
	uint8_t packet[FRAME_MAX];

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
	uint8_t frame[FRAME_MAX];

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

void check_wire(void)
{
	check_drain(true);
	check_drain(false);
	for (int threads = 0; threads <= 3; threads++) {
		check_full_wire(0, threads);
		check_full_wire(GSO, threads);
		check_stuck_wire(threads);
		check_gone(threads);
	}
}
