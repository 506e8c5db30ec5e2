/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Samples of packets that fail a source check: in the order in which they came, without what only
 * repeats the one before, the oldest where there are too many, and never more than asked for. The
 * counters are complete.
 *
 * Each sender is an address of loopback, none of them a peer's.
 */
#define _GNU_SOURCE
#include "check.h"

#include <sys/socket.h>
#include <unistd.h>

#include "decap.h"
#include "node.h"

#define SENDERS 100
#define SOME 10

/* A node, and how many datagrams it was sent. */
struct host {
	struct node node;
	uint64_t sent;
};

/* Datagrams from the sender of this number, counted when this returns. */
static void send_from(struct host *host, uint8_t number, int datagrams)
{
	struct vxlan_push push = { .vxlan = vxlan_header_of(1),
				   .eth = { .source = { 2, 0, 0, 0, 0, number } } };
	struct fp_counters counters;
	struct sockaddr_in own;
	int fd = udp_socket(&own, number);

	for (int i = 0; i < datagrams; i++)
		HOLDS(sendto(fd, &push, sizeof(push), 0,
			     (const struct sockaddr *)&host->node.address,
			     sizeof(host->node.address)) == sizeof(push));
	close(fd);
	host->sent += (uint64_t)datagrams;
	do {
		fp_worker_turn(host->node.worker);
		fp_counters_read(host->node.ctx, &counters);
	} while (counters.drops[FP_DROP_UNKNOWN_VTEP] < host->sent);
	HOLDS(counters.drops[FP_DROP_UNKNOWN_VTEP] == host->sent);
}

/* The next samples, of as many as are asked for, are of the senders from @first on. */
static void expect(struct host *host, size_t capacity, uint8_t first, size_t count)
{
	struct fp_suspect suspect[SUSPECTS + 1];

	HOLDS(fp_suspects_take(host->node.ctx, suspect, capacity) == count);
	for (size_t i = 0; i < count; i++) {
		uint8_t number = (uint8_t)(first + i);

		HOLDS(suspect[i].reason == FP_DROP_UNKNOWN_VTEP);
		HOLDS(suspect[i].outer_source[15] == number + 1);
		HOLDS(suspect[i].mac[5] == number);
	}
}

void check_suspects(void)
{
	struct host host = { 0 };

	open_node(&host.node, 1, 0);
	expect(&host, SUSPECTS, 0, 0);
	/* More than one round of the ring, each sender twice. */
	for (uint8_t round = 0; round < 3; round++) {
		for (uint8_t number = 1; number <= SUSPECTS - SOME; number++)
			send_from(&host, number, 2);
		expect(&host, SOME, 1, SOME);
		expect(&host, SUSPECTS + 1, 1 + SOME, SUSPECTS - 2 * SOME);
		expect(&host, SUSPECTS, 0, 0);
	}
	/* More than it holds. */
	for (uint8_t number = 1; number <= SENDERS; number++)
		send_from(&host, number, 1);
	expect(&host, SUSPECTS + 1, 1, SUSPECTS);
	/* The last one again, as that was taken. */
	send_from(&host, SENDERS, 1);
	expect(&host, SUSPECTS, SENDERS, 1);
	close_node(&host.node);
}
