/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The own queue in front of the wire: memory that something waits in is never given out again, who
 * sends little overtakes bulk in the same TUN queue, no flow is reordered, nothing is lost while
 * the wire is full or when the side ends, and another wire's packets go on meanwhile.
 *
 * A TUN queue and the wire are pairs of SOCK_SEQPACKET sockets, which keep packets apart as both
 * do.
 */
#define _GNU_SOURCE
#include "check.h"

#include <arpa/inet.h>
#include <errno.h>
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
#define WIRES 2
#define ROOM (4 << 20)
#define PAYLOAD 200
#define READS_PER_BATCH 64
#define WAIT_NS (100 * 1000 * 1000ULL)

/* A packet in the memory. */
struct span {
	const uint8_t *start, *end;
};

/* What was read since some step, in that order: what waits, has waited, or never did. */
struct memory {
	struct span span[STEPS];
	bool waits[STEPS];
	unsigned int first, last;
};

static void keep(struct memory *memory, const uint8_t *room, size_t total, bool waits)
{
	memory->span[memory->last] = (struct span) { room, room + total };
	memory->waits[memory->last++] = waits;
}

static bool is_free(const struct memory *memory, const uint8_t *room)
{
	for (unsigned int i = memory->first; i < memory->last; i++) {
		if (room < memory->span[i].end && memory->span[i].start < room + PACKET_ROOM)
			return false;
	}
	return true;
}

/* Take the oldest that waits out. Return: whether there was one */
static bool take_oldest(struct backlog *backlog, struct memory *memory)
{
	unsigned int i = memory->first;

	while (i < memory->last && !memory->waits[i])
		i++;
	HOLDS((i < memory->last) == (backlog->count > 0));
	if (i == memory->last)
		return false;
	HOLDS(backlog_take(backlog).datagram == memory->span[i].start);
	memory->waits[i] = false;
	return true;
}

/* All that was taken out or never waited is sent. */
static void release(struct backlog *backlog, struct memory *memory)
{
	backlog_release(backlog);
	while (memory->first < memory->last && !memory->waits[memory->first])
		memory->first++;
}

/*
 * Packets of all sizes come and go: what waits comes out in order, and until the next release
 * nothing of what was handed out since the oldest that waits is handed out again.
 */
static void check_memory(void)
{
	struct backlog *backlog = calloc(1, sizeof(*backlog));
	static struct memory memory;
	unsigned int refused = 0, longest = 0;

	HOLDS(backlog && backlog_open(backlog) == 0);
	for (int step = 0; step < STEPS; step++) {
		uint8_t *room = backlog_room(backlog);
		size_t total = 1 + random_below(random_below(4) ? 70000 : PACKET_ROOM);
		uint32_t flow = random_below(FLOWS);
		bool waits = random_below(3);

		if (room) {
			HOLDS(is_free(&memory, room));
			backlog_use(backlog, room + total);
			keep(&memory, room, total, waits);
		} else {
			refused++;
		}
		if (room && waits) {
			backlog_add(backlog, &(struct waiting) { .datagram = room,
								 .total = total,
								 .flow = flow });
			HOLDS(backlog_must_wait(backlog, flow, 1, false));
		}
		longest = backlog->count > longest ? backlog->count : longest;
		/* Now more comes, now more goes. */
		for (unsigned int out = random_below(step / 1000 % 2 ? 4 : 2); out; out--)
			take_oldest(backlog, &memory);
		if (!room || random_below(4) == 0)
			release(backlog, &memory);
	}
	HOLDS(refused > 100 && longest > 100);
	while (take_oldest(backlog, &memory))
		;
	release(backlog, &memory);
	for (unsigned int i = 0; i < BACKLOG_FLOWS; i++)
		HOLDS(backlog->waits[i] == 0);
	HOLDS(backlog_room(backlog) == backlog->arena);
	backlog_close(backlog);
	free(backlog);
}

/* The encapsulation of one host with two TUN queues, of which most checks use the first. */
struct host {
	struct fp_ctx *ctx;
	struct encap_side *side;
	struct tun_queue queue, other_queue;
	int tun, other_tun; /* the kernel's ends */
	int send[WIRES], wire[WIRES]; /* the side's ends, the wires' ends */
	int epoll_fd;
	uint16_t next[FLOWS]; /* number of its next packet into the queue */
	uint16_t out[FLOWS]; /* and of the one that must leave next */
	int left; /* packets that have left */
};

static void set_route(struct host *host, bool there)
{
	struct fp_route route = route_of(1, 8472);

	if (there)
		HOLDS(fp_route_replace(host->ctx, &route) == 0);
	else
		HOLDS(fp_route_delete(host->ctx, route.subnet, route.subnet_len) == 0);
}

static void join(int *from, int *to)
{
	int pair[2];

	HOLDS(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, pair) == 0);
	*from = pair[0];
	*to = pair[1];
}

static void set_room(int fd, int bytes)
{
	setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
}

static void open_host(struct host *host, bool reads_ahead, int wires)
{
	struct fp_config config = config_of(2, FP_SPOOF_OFF);
	struct fp_io io = { .send_count = wires };

	*host = (struct host) { .epoll_fd = epoll_create1(0) };
	join(&host->tun, &host->queue.fd);
	join(&host->other_tun, &host->other_queue.fd);
	for (int i = 0; i < WIRES; i++)
		join(&host->send[i], &host->wire[i]);
	io.send = host->send;
	host->ctx = fp_ctx_new(&config);
	host->side = calloc(1, sizeof(*host->side));
	HOLDS(host->ctx && host->side);
	HOLDS(encap_open(host->side, host->ctx, &io, host->epoll_fd, 0) == 0);
	set_room(host->tun, ROOM);
	set_room(host->other_tun, ROOM);
	for (int i = 0; i < wires; i++)
		set_room(host->send[i], ROOM);
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
	close(host->other_tun);
	close(host->other_queue.fd);
	for (int i = 0; i < WIRES; i++) {
		close(host->send[i]);
		close(host->wire[i]);
	}
	close(host->epoll_fd);
}

/* The kernel hands over the next packet of a flow in one of its queues. */
static void put_to(struct host *host, int tun, unsigned int flow, uint8_t ecn)
{
	static const struct vnet_header plain;
	uint8_t packet[2048];
	struct spec spec = { .udp = true,
			     .source_node = 2,
			     .destination_node = 1,
			     .source_port = (uint16_t)flow,
			     .id = host->next[flow],
			     .fill = (uint8_t)host->next[flow],
			     .tos = ecn,
			     .payload = PAYLOAD };
	struct iovec iov[] = { { (void *)&plain, sizeof(plain) },
			       { packet, build(&spec, packet) } };

	host->next[flow]++;
	HOLDS(writev(tun, iov, 2) > 0);
}

static void put(struct host *host, unsigned int flow, uint8_t ecn)
{
	put_to(host, host->tun, flow, ecn);
}

/*
 * What has left by a wire, at most @most, each the next of its flow. Return: where among it BULK's
 * last is
 */
static int take_from(struct host *host, int wire, int most)
{
	uint8_t frame[2048];
	int last_bulk = 0;

	for (int i = 1; i <= most && recv(wire, frame, sizeof(frame), 0) > 0; i++) {
		const uint8_t *ip = frame + PUSH;
		unsigned int flow = (unsigned int)(ip[20] << 8 | ip[21]);

		HOLDS(flow < FLOWS && (ip[4] << 8 | ip[5]) == host->out[flow]);
		HOLDS(ip[20 + 8] == (uint8_t)host->out[flow]);
		host->out[flow]++;
		host->left++;
		if (flow == BULK)
			last_bulk = i;
	}
	return last_bulk;
}

static int take(struct host *host, int most)
{
	return take_from(host, host->wire[0], most);
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

	open_host(&host, reads_ahead, 1);
	make_mixed(&host, ECN_NOT_ECT);
	for (unsigned int flow = 2; flow < FLOWS; flow++)
		put(&host, flow, ECN_NOT_ECT);
	turn(&host);
	last_bulk = take(&host, PACKETS);
	/* All at once, or a batch in the order in which they came. */
	HOLDS(host.left == 2 * READS_PER_BATCH + READS_PER_BATCH + (reads_ahead ? FLOWS - 2 : 0));
	HOLDS(last_bulk == host.left - 2 * READS_PER_BATCH);
	HOLDS(!host.side->backlog.count && host.queue.waiting == 0);
	close_host(&host);
}

/* The wire is full while packets wait, and then the side ends, or the route does. */
static void check_full_wire(bool has_route)
{
	struct fp_counters counters = { 0 };
	struct fp_peer_traffic peer;
	struct host host;

	open_host(&host, true, 1);
	make_mixed(&host, ECN_NOT_ECT);
	set_room(host.send[0], 1);
	turn(&host);
	HOLDS(host.side->sender.full);
	HOLDS(host.side->backlog.count && host.queue.waiting);
	set_route(&host, has_route);
	while (!encap_drain(host.side, 0))
		take(&host, 1);
	take(&host, PACKETS);
	counters = host.side->counters;
	HOLDS(!host.side->backlog.count && host.queue.waiting == 0);
	HOLDS(host.left + (int)counters.drops[FP_DROP_NO_ROUTE] == 3 * READS_PER_BATCH);
	HOLDS(has_route == (counters.drops[FP_DROP_NO_ROUTE] == 0));
	if (has_route) {
		HOLDS(fp_peers_traffic(host.ctx, &peer, 1) == 1);
		HOLDS(memcmp(&peer.traffic, &counters.traffic, sizeof(peer.traffic)) == 0);
	}
	close_host(&host);
}

/* The wire is full for good: it ends all the same, and what is lost is counted. */
static void check_dead_wire(void)
{
	struct host host;
	uint64_t began = now_ns();

	open_host(&host, true, 1);
	make_mixed(&host, ECN_NOT_ECT);
	set_room(host.send[0], 1);
	turn(&host);
	HOLDS(!encap_drain(host.side, began + WAIT_NS) && now_ns() - began >= WAIT_NS);
	encap_give_up(host.side);
	take(&host, PACKETS);
	HOLDS(host.left < 3 * READS_PER_BATCH);
	HOLDS(host.left + (int)host.side->counters.drops[FP_DROP_SEND_BUFFER] ==
	      3 * READS_PER_BATCH);
	close_host(&host);
}

/* Find a flow that leaves by each wire. */
static void find_flows(struct host *host, unsigned int found[WIRES])
{
	for (unsigned int flow = 0; flow < FLOWS; flow++) {
		put(host, flow, ECN_NOT_ECT);
		turn(host);
		for (int i = 0; i < WIRES; i++) {
			int before = host->left;

			take_from(host, host->wire[i], 1);
			if (host->left > before)
				found[i] = flow;
		}
	}
}

/*
 * One wire is full: the queue with its packets waits, and the other one goes on, in memory that is
 * used anew again and again, until it has a packet for the full wire as well.
 */
static void check_other_wire(void)
{
	unsigned int flow[WIRES];
	struct host host;

	open_host(&host, false, WIRES);
	find_flows(&host, flow);
	set_room(host.send[0], 1);
	for (int i = 0; i < READS_PER_BATCH; i++)
		put(&host, flow[0], ECN_NOT_ECT);
	turn(&host);
	HOLDS(encap_must_wait(host.side, &host.queue));
	for (int times = 0; times < 400; times++) {
		for (int i = 0; i < READS_PER_BATCH; i++)
			put_to(&host, host.other_tun, flow[1], ECN_NOT_ECT);
		HOLDS(encap_turn(host.side, &host.other_queue) == READS_PER_BATCH);
		HOLDS(!encap_must_wait(host.side, &host.other_queue));
		take_from(&host, host.wire[1], READS_PER_BATCH);
		HOLDS(host.out[flow[1]] == host.next[flow[1]]);
	}
	put_to(&host, host.other_tun, flow[0], ECN_NOT_ECT);
	HOLDS(encap_turn(host.side, &host.other_queue) == 1);
	HOLDS(encap_must_wait(host.side, &host.other_queue));
	while (host.side->sender.full) {
		take(&host, 1);
		encap_flush_full(host.side);
	}
	take(&host, PACKETS);
	HOLDS(host.out[flow[0]] == host.next[flow[0]]);
	HOLDS(!encap_must_wait(host.side, &host.queue));
	HOLDS(!encap_must_wait(host.side, &host.other_queue));
	HOLDS(!host.side->sender.sends && !host.side->sender.pieces);
	/* Full again of the other queue's packets, which this one has nothing to do with. */
	encap_go_on(host.side, &host.queue);
	set_room(host.send[0], 1);
	for (int i = 0; i < READS_PER_BATCH; i++)
		put_to(&host, host.other_tun, flow[0], ECN_NOT_ECT);
	HOLDS(encap_turn(host.side, &host.other_queue) == READS_PER_BATCH);
	HOLDS(encap_must_wait(host.side, &host.other_queue));
	HOLDS(!encap_must_wait(host.side, &host.queue));
	close_host(&host);
}

/* No full socket can be waited for: what it has no room for is lost, and all later goes on. */
static void check_no_watches(void)
{
	struct host host;

	open_host(&host, false, 1);
	host.side->sender.epoll_fd = -1;
	set_room(host.send[0], 1);
	for (int i = 0; i < READS_PER_BATCH; i++)
		put(&host, BULK, ECN_NOT_ECT);
	turn(&host);
	HOLDS(!host.side->sender.full && !host.side->sender.sends);
	take(&host, PACKETS);
	HOLDS(host.left > 0 && host.left < READS_PER_BATCH);
	HOLDS(host.left + (int)host.side->counters.drops[FP_DROP_SEND_BUFFER] == READS_PER_BATCH);
	host.out[BULK] = host.next[BULK];
	put(&host, BULK, ECN_NOT_ECT);
	turn(&host);
	take(&host, 1);
	HOLDS(host.out[BULK] == host.next[BULK]);
	close_host(&host);
}

static int next_readv_error; /* 0 for none */

ssize_t __real_readv(int fd, const struct iovec *iov, int count);
ssize_t __wrap_readv(int fd, const struct iovec *iov, int count);

ssize_t __wrap_readv(int fd, const struct iovec *iov, int count)
{
	if (!next_readv_error)
		return __real_readv(fd, iov, count);
	errno = next_readv_error;
	next_readv_error = 0;
	return -1;
}

/* The kernel hands over no packet, once: what was lost is counted, and what comes then goes on. */
static void check_read_error(int err, int drops)
{
	struct host host;

	open_host(&host, false, 1);
	put(&host, BULK, ECN_NOT_ECT);
	next_readv_error = err;
	turn(&host);
	turn(&host);
	take(&host, PACKETS);
	HOLDS(host.left == 1);
	HOLDS((int)host.side->counters.drops[FP_DROP_ENCAP_MALFORMED] == drops);
	close_host(&host);
}

/* The device is gone. */
static void check_fatal_read_error(void)
{
	struct host host;

	open_host(&host, false, 1);
	next_readv_error = EBADFD;
	HOLDS(encap_turn(host.side, &host.queue) == -EBADFD);
	close_host(&host);
}

/* A flow that fills its queue alone, or is overtaken, does nobody harm: it may go on as it does. */
static void check_marks(bool is_alone, bool reads_ahead, uint8_t ecn)
{
	struct host host;
	bool marks = !is_alone && !reads_ahead && ecn != ECN_NOT_ECT;

	open_host(&host, reads_ahead, 1);
	if (!is_alone)
		make_mixed(&host, ecn);
	for (int i = 0; i < 3; i++) {
		for (int more = 0; more < READS_PER_BATCH + 1; more++)
			put(&host, BULK, ecn);
		turn(&host);
		usleep(2000);
		/* Until its first turn is over, the queue stood. */
		if (i == 0 && reads_ahead)
			host.side->counters.congestion_marks = 0;
	}
	HOLDS((host.side->counters.congestion_marks > 0) == marks);
	close_host(&host);
}

void check_backlog(void)
{
	check_memory();
	check_overtaking(true);
	check_overtaking(false);
	check_full_wire(true);
	check_full_wire(false);
	check_dead_wire();
	check_other_wire();
	check_no_watches();
	check_read_error(EINVAL, 1);
	check_read_error(EFAULT, 1);
	check_read_error(ENOMEM, 0);
	check_read_error(EINTR, 0);
	check_fatal_read_error();
	check_marks(true, false, ECN_ECT0);
	check_marks(false, false, ECN_ECT0);
	check_marks(false, true, ECN_ECT0);
	check_marks(false, false, ECN_NOT_ECT);
}
