/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The own queue in front of the wire: memory that something waits in is never given out again, who
 * sends little overtakes bulk in the same TUN queue, no flow is reordered, and nothing is lost
 * while the wire is full or when the side ends.
 *
 * A TUN queue and the wire are pairs of SOCK_SEQPACKET sockets, which keep packets apart as both
 * do.
 */
#define _GNU_SOURCE
#include "check.h"

#include <arpa/inet.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/uio.h>
#include <unistd.h>

#include "ecn.h"
#include "encap.h"

#define STEPS 200000
#define FLOWS 40
#define BULK 0 /* the flow that fills a queue */
#define PACKETS 240
#define PAYLOAD 200
#define READS_PER_BATCH 64
#define DRAIN_MS 100

/* What waits, oldest first, and what was handed out beside it since the last release. */
struct span {
	const uint8_t *start, *end;
};

static bool overlaps(const struct span *span, const uint8_t *start, const uint8_t *end)
{
	return start < span->end && span->start < end;
}

/* Room is given out in any order of sizes; what waits must keep its bytes, and come out in order.
 */
static void check_memory(void)
{
	struct backlog *backlog = calloc(1, sizeof(*backlog));
	static struct span waiting[STEPS];
	unsigned int first = 0, last = 0, refused = 0, longest = 0;

	HOLDS(backlog && backlog_open(backlog) == 0);
	for (int step = 0; step < STEPS; step++) {
		uint8_t *room = backlog_room(backlog);
		size_t total = 1 + random_below(random_below(4) ? 70000 : PACKET_ROOM);
		uint32_t flow = random_below(FLOWS);

		if (!room) {
			HOLDS(first < last);
			refused++;
		} else {
			for (unsigned int i = first; i < last; i++)
				HOLDS(!overlaps(&waiting[i], room, room + PACKET_ROOM));
			backlog_use(backlog, room + total);
			if (random_below(3)) {
				backlog_add(backlog, &(struct waiting) { .datagram = room,
									 .total = total,
									 .flow = flow });
				waiting[last++] = (struct span) { room, room + total };
				HOLDS(backlog_must_wait(backlog, flow, 1, false));
			}
		}
		longest = last - first > longest ? last - first : longest;
		/* Now more comes, now more goes. */
		for (unsigned int out = random_below(step / 1000 % 2 ? 4 : 2); out && first < last;
		     out--, first++)
			HOLDS(backlog_take(backlog).datagram == waiting[first].start);
		backlog_release(backlog);
	}
	HOLDS(refused > 100 && longest > 100);
	while (first < last)
		HOLDS(backlog_take(backlog).datagram == waiting[first++].start);
	backlog_release(backlog);
	for (unsigned int i = 0; i < BACKLOG_FLOWS; i++)
		HOLDS(backlog->waits[i] == 0);
	HOLDS(backlog_room(backlog) == backlog->arena);
	backlog_close(backlog);
	free(backlog);
}

/* The encapsulation of one host with one TUN queue. */
struct host {
	struct fp_ctx *ctx;
	struct encap_side *side;
	struct tun_queue queue;
	int tun; /* the kernel's end */
	int send, wire; /* the side's end, the wire's end */
	int epoll_fd;
	uint16_t next[FLOWS]; /* number of its next packet into the queue */
	uint16_t out[FLOWS]; /* and of the one that must leave next */
	int left; /* packets that have left */
};

static void set_route(struct host *host, bool there)
{
	struct fp_route route = {
		.subnet = { [10] = 0xff, [11] = 0xff, [12] = 10, 5, 1, 0 },
		.subnet_len = INET_MAPPED_BITS + 24,
		.mac = { 2, 0, 0, 0, 0, 1 },
		.underlay = { [10] = 0xff, [11] = 0xff, [12] = 127, 0, 0, 1 },
		.port = 8472,
	};

	if (there)
		HOLDS(fp_route_replace(host->ctx, &route) == 0);
	else
		HOLDS(fp_route_delete(host->ctx, route.subnet, route.subnet_len) == 0);
}

static void open_host(struct host *host, bool reads_ahead)
{
	struct fp_config config = {
		.vni = 1,
		.mac = { 2, 0, 0, 0, 0, 2 },
		.network = { [10] = 0xff, [11] = 0xff, [12] = 10, [13] = 5 },
		.network_len = INET_MAPPED_BITS + 16,
		.inner_ipv4 = 1,
	};
	struct fp_io io = { .send_count = 1 };
	int tun[2], wire[2], bytes = 4 << 20;

	*host = (struct host) { .epoll_fd = epoll_create1(0) };
	HOLDS(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, tun) == 0);
	HOLDS(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, wire) == 0);
	setsockopt(tun[0], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
	setsockopt(wire[1], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
	host->tun = tun[0];
	host->queue.fd = tun[1];
	host->wire = wire[0];
	host->send = wire[1];
	io.send = &host->send;
	host->ctx = fp_ctx_new(&config);
	host->side = calloc(1, sizeof(*host->side));
	HOLDS(host->ctx && host->side);
	HOLDS(encap_open(host->side, host->ctx, &io, host->epoll_fd, 0) == 0);
	host->side->reads_ahead = reads_ahead;
	set_route(host, true);
}

static void close_host(struct host *host)
{
	encap_close(host->side);
	free(host->side);
	fp_ctx_free(host->ctx);
	close(host->tun);
	close(host->queue.fd);
	close(host->wire);
	close(host->send);
	close(host->epoll_fd);
}

/* The kernel hands over the next packet of a flow. */
static void put(struct host *host, unsigned int flow, uint8_t ecn)
{
	static const struct vnet_header plain;
	uint8_t packet[2048];
	struct spec spec = { .udp = true,
			     .source_node = 2,
			     .destination_node = 1,
			     .source_port = (uint16_t)flow,
			     .id = host->next[flow]++,
			     .tos = ecn,
			     .payload = PAYLOAD };
	struct iovec iov[] = { { (void *)&plain, sizeof(plain) },
			       { packet, build(&spec, packet) } };

	HOLDS(writev(host->tun, iov, 2) > 0);
}

/* What has left, at most @most, each the next of its flow. Return: where among it BULK's last is */
static int take(struct host *host, int most)
{
	uint8_t frame[2048];
	int last_bulk = 0;

	for (int i = 1; i <= most && recv(host->wire, frame, sizeof(frame), 0) > 0; i++) {
		const uint8_t *ip = frame + PUSH;
		unsigned int flow = (unsigned int)(ip[20] << 8 | ip[21]);

		HOLDS(flow < FLOWS && (ip[4] << 8 | ip[5]) == host->out[flow]);
		host->out[flow]++;
		host->left++;
		if (flow == BULK)
			last_bulk = i;
	}
	return last_bulk;
}

static void turn(struct host *host)
{
	HOLDS(encap_turn(host->side, &host->queue) >= 0);
}

/* A queue that stands: two batches of bulk, one with a packet of another flow, are gone. */
static void make_mixed(struct host *host, uint8_t ecn)
{
	for (int i = 0; i < 3 * READS_PER_BATCH; i++)
		put(host, i == 2 * READS_PER_BATCH - 1 ? 1 : BULK, ecn);
	turn(host);
	turn(host);
	take(host, PACKETS);
	HOLDS(host->left == 2 * READS_PER_BATCH);
}

static void check_overtaking(bool reads_ahead)
{
	struct host host;
	int last_bulk;

	open_host(&host, reads_ahead);
	make_mixed(&host, ECN_NOT_ECT);
	for (unsigned int flow = 2; flow < FLOWS; flow++)
		put(&host, flow, ECN_NOT_ECT);
	turn(&host);
	last_bulk = take(&host, PACKETS);
	/* All at once, or a batch in the order in which they came. */
	HOLDS(host.left == 2 * READS_PER_BATCH + READS_PER_BATCH + (reads_ahead ? FLOWS - 2 : 0));
	HOLDS(last_bulk == host.left - 2 * READS_PER_BATCH);
	HOLDS(!encap_has_waiting(host.side) && host.queue.waiting == 0);
	close_host(&host);
}

/* The wire is full while packets wait, and then the side ends, or the route does. */
static void check_full_wire(bool has_route)
{
	struct fp_counters counters = { 0 };
	struct host host;
	int bytes = 1;

	open_host(&host, true);
	make_mixed(&host, ECN_NOT_ECT);
	setsockopt(host.send, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
	turn(&host);
	HOLDS(encap_is_blocked(host.side));
	HOLDS(encap_has_waiting(host.side) && host.queue.waiting);
	set_route(&host, has_route);
	for (int left = -1; left != host.left;) {
		left = host.left;
		encap_drain(host.side, 0);
		take(&host, PACKETS);
	}
	counters = host.side->counters;
	HOLDS(!encap_has_waiting(host.side) && host.queue.waiting == 0);
	HOLDS(host.left + (int)counters.drops[FP_DROP_NO_ROUTE] == 3 * READS_PER_BATCH);
	HOLDS(has_route == (counters.drops[FP_DROP_NO_ROUTE] == 0));
	close_host(&host);
}

/* A flow that fills its queue alone does nobody harm, so it is not told to send less. */
static void check_marks(bool is_alone, uint8_t ecn)
{
	struct host host;

	open_host(&host, false);
	if (!is_alone)
		make_mixed(&host, ecn);
	for (int i = 0; i < PACKETS; i++)
		put(&host, BULK, ecn);
	for (int i = 0; i < 3; i++) {
		turn(&host);
		usleep(2000);
	}
	HOLDS((host.side->counters.congestion_marks > 0) == (!is_alone && ecn != ECN_NOT_ECT));
	close_host(&host);
}

void check_backlog(void)
{
	check_memory();
	check_overtaking(true);
	check_overtaking(false);
	check_full_wire(true);
	check_full_wire(false);
	check_marks(true, ECN_ECT0);
	check_marks(false, ECN_ECT0);
	check_marks(false, ECN_NOT_ECT);
}
