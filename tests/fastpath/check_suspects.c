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

#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include "decap.h"

#define SENDERS 100
#define SOME 10

struct host {
	struct fp_ctx *ctx;
	struct fp_worker *worker;
	int tun[2];
	int receive;
	struct sockaddr_in address;
	uint64_t sent;
};

static int bound_socket(struct sockaddr_in *address, uint32_t host)
{
	socklen_t length = sizeof(*address);
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);

	*address = (struct sockaddr_in) { .sin_family = AF_INET };
	address->sin_addr.s_addr = htonl(INADDR_LOOPBACK + host);
	HOLDS(fd >= 0 && bind(fd, (struct sockaddr *)address, length) == 0);
	HOLDS(getsockname(fd, (struct sockaddr *)address, &length) == 0);
	return fd;
}

static void open_host(struct host *host)
{
	struct fp_config config = config_of(1, FP_SPOOF_ENFORCE);
	struct fp_io io = { .tun_count = 1, .receive_count = 1, .send_count = 1 };

	*host = (struct host) { .ctx = fp_ctx_new(&config) };
	HOLDS(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, host->tun) == 0);
	host->receive = bound_socket(&host->address, 0);
	io.tun = &host->tun[1];
	io.tun_write = host->tun[1];
	io.receive = io.send = &host->receive;
	host->worker = fp_worker_new(host->ctx, &io);
	HOLDS(host->worker);
}

static void close_host(struct host *host)
{
	fp_worker_free(host->worker);
	fp_ctx_free(host->ctx);
	close(host->tun[0]);
	close(host->tun[1]);
	close(host->receive);
}

/* Datagrams from the sender of this number, counted when this returns. */
static void send_from(struct host *host, uint8_t number, int datagrams)
{
	struct vxlan_push push = { .vxlan = vxlan_header_of(1),
				   .eth = { .source = { 2, 0, 0, 0, 0, number } } };
	struct fp_counters counters;
	struct sockaddr_in own;
	int fd = bound_socket(&own, number);

	for (int i = 0; i < datagrams; i++)
		HOLDS(sendto(fd, &push, sizeof(push), 0, (const struct sockaddr *)&host->address,
			     sizeof(host->address)) == sizeof(push));
	close(fd);
	host->sent += (uint64_t)datagrams;
	do {
		fp_worker_turn(host->worker);
		fp_counters_read(host->ctx, &counters);
	} while (counters.drops[FP_DROP_UNKNOWN_VTEP] < host->sent);
	HOLDS(counters.drops[FP_DROP_UNKNOWN_VTEP] == host->sent);
}

/* The next samples, of as many as are asked for, are of the senders from @first on. */
static void expect(struct host *host, size_t capacity, uint8_t first, size_t count)
{
	struct fp_suspect suspect[SUSPECTS + 1];

	HOLDS(fp_suspects_take(host->ctx, suspect, capacity) == count);
	for (size_t i = 0; i < count; i++) {
		uint8_t number = (uint8_t)(first + i);

		HOLDS(suspect[i].reason == FP_DROP_UNKNOWN_VTEP);
		HOLDS(suspect[i].outer_source[15] == number + 1);
		HOLDS(suspect[i].mac[5] == number);
	}
}

void check_suspects(void)
{
	struct host host;

	open_host(&host);
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
	close_host(&host);
}
