/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DOC: From the TUN to the wire
 *
 * A batch reads BATCH_BYTES or READS_PER_BATCH packets from one TUN queue into an arena, gives each
 * the 22 bytes that encapsulation pushes, and sends (csrc/send.c). In the arena stand, with a gap
 * in front of a super-packet that lets its payload begin a cache line:
 *
 *	| push | packet | push | packet | push | first segment | push | next segment | ...
 *
 * so that datagrams of one size and one peer are one stretch of memory. A super-packet is read
 * straight into that form: readv() is told to leave a gap where the push and the headers of each
 * segment will be, at the places that the last super-packet of the queue had. When the guess was
 * wrong the payload is moved once.
 *
 * Of a queue in which bulk and something else are mixed more is read, to its end if there is room,
 * and the bulk waits in the arena (csrc/backlog.c) while the rest is sent.
 *
 * When a socket's send buffer is full, what it has of the batch stays where it is, and the queue is
 * not read until that is out: it is then the TUN's. Other queues go on, as their packets may leave
 * by another socket, to a peer behind a faster link.
 */
#define _GNU_SOURCE
#include "encap.h"

#include <errno.h>
#include <math.h>
#include <sys/uio.h>
#include <unistd.h>

#include "ecn.h"

#define PACKET_MAX 65535
#define BATCH_BYTES (256 * 1024)
#define READS_PER_BATCH 64
/* While the link is the slowest part: what is read then stands in front of all else. */
#define SLOW_BATCH_BYTES (32 * 1024)
#define SLOW_NS (100 * 1000 * 1000ULL)
#define AHEAD_BYTES (2 * 1024 * 1024)
#define READS_AHEAD 256
/* How long a queue counts as mixed after it was seen to be. */
#define MIXED_NS (2000 * 1000 * 1000ULL)
/* Segments that one readv() puts in their places; what is behind them comes in one piece. */
#define READ_SEGMENTS 64
/* Below this the headers could be cut by a guess, and many pieces are slower than moving the
 * payload. */
#define GUESS_SIZE_MIN GSO_HEADERS_MAX
/* Packets without segmentation after which no super-packet is expected any more. */
#define GUESS_MISSES 8
/* How long a queue may stand, and the time between the first two marks. */
#define TARGET_NS (1000 * 1000)
#define INTERVAL_NS (10 * 1000 * 1000)

static_assert(sizeof(struct vnet_header) <= PUSH, "a vnet header has room where the push will be");
/* A packet with the most segments, each with a push and headers, behind a gap for alignment. */
static_assert(PACKET_MAX + (DATAGRAMS_PER_ADD + 1) * (PUSH + GSO_HEADERS_MAX) + CACHE_LINE <=
		      PACKET_ROOM,
	      "what a packet becomes has room");

static void drop(struct encap_side *side, int reason, size_t packets)
{
	count_up(&side->counters.drops[reason], packets);
}

/*
 * Read a packet to @at and its vnet header in front, where the push will be; a super-packet's
 * payloads where the queue's guess says they will be needed.
 */
static ssize_t read_packet(const struct tun_queue *queue, uint8_t *at)
{
	struct iovec iov[READ_SEGMENTS + 1];
	size_t front = sizeof(struct vnet_header);
	size_t length = queue->size ? queue->headers + queue->size : PACKET_MAX;
	size_t left = PACKET_MAX;
	int count = 0;
	ssize_t got;

	while (left) {
		if (count == READ_SEGMENTS || length > left)
			length = left;
		iov[count++] = (struct iovec) { at - front, front + length };
		front = 0;
		left -= length;
		at += length + PUSH + queue->headers;
		length = queue->size;
	}
	do
		got = readv(queue->fd, iov, count);
	while (got < 0 && errno == EINTR);
	return got;
}

/* Undo a wrong guess: make the packet that was read to @packet one piece. */
static void join_pieces(const struct tun_queue *queue, uint8_t *packet, size_t length)
{
	size_t done = queue->headers + queue->size;
	const uint8_t *from = packet + done;

	for (unsigned int i = 1; queue->size && done < length; i++) {
		size_t piece = i == READ_SEGMENTS ? length - done : queue->size;

		if (piece > length - done)
			piece = length - done;
		from += PUSH + queue->headers;
		memmove(packet + done, from, piece);
		from += piece;
		done += piece;
	}
}

static bool guessed(const struct tun_queue *queue, const struct gso *gso, size_t length)
{
	if (gso->segments == 1)
		return !queue->size || length <= queue->headers + queue->size;
	return queue->headers == gso->headers && queue->size == gso->size &&
	       gso->segments <= READ_SEGMENTS;
}

static void guess(struct tun_queue *queue, const struct gso *gso)
{
	if (gso->segments > 1 && gso->size >= GUESS_SIZE_MIN) {
		queue->headers = gso->headers;
		queue->size = gso->size;
		queue->misses = 0;
	} else if (++queue->misses >= GUESS_MISSES) {
		queue->headers = queue->size = 0;
	}
}

/* Whether packets of a queue had to wait for bulk of another flow a moment ago. */
static bool is_mixed(const struct tun_queue *queue, uint64_t now)
{
	return queue->mixed && now - queue->mixed < MIXED_NS;
}

/*
 * A packet was read. Super-packets are bulk themselves: between two such flows none is to overtake,
 * and what waits leaves the cache.
 */
static void note_flow(struct tun_queue *queue, uint32_t flow, bool is_super_packet, uint64_t now)
{
	if (flow == queue->flow)
		return;
	queue->flow = flow;
	if (!is_super_packet && (queue->standing_since || queue->waiting))
		queue->mixed = now;
}

/*
 * Whether a packet that can carry a congestion mark gets one. A local sender is not held back by
 * the TUN, which disowns its packets, so it fills the queue up to its window: milliseconds for all
 * who share it. The rule is CoDel's (RFC 8289), with the time since the queue was last empty for
 * the sojourn time, which the TUN does not tell. A flow that is alone in its queue is not marked,
 * as it would send less for nobody's good, and neither is one that others overtake: its queue does
 * not stand. Packets of senders that do not know marks are not dropped: a loss costs more than it
 * brings here.
 */
static bool must_mark(struct encap_side *side, struct tun_queue *queue)
{
	if (!queue->standing_since || side->now - queue->standing_since < TARGET_NS ||
	    !is_mixed(queue, side->now))
		return false;
	if (queue->marks && side->now < queue->next_mark)
		return false;
	queue->marks++;
	queue->next_mark = side->now + (uint64_t)(INTERVAL_NS / sqrt(queue->marks));
	return true;
}

/*
 * Where in the room for a packet it begins: a super-packet so that its payload begins a cache line,
 * which makes its checksums a third faster.
 */
static uint8_t *start_in(uint8_t *room, const struct tun_queue *queue)
{
	size_t headers = PUSH + queue->headers;
	uintptr_t at = (uintptr_t)room;

	if (!queue->size)
		return room;
	return room + ((at + headers + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE - headers - at);
}

/* Push what encapsulation adds, and have a packet's datagrams sent with the next flush. */
static void send_packet(struct encap_side *side, const struct encap *encap,
			const struct waiting *packet)
{
	for (size_t i = 0; i < packet->datagrams; i++)
		memcpy(packet->datagram + i * packet->size, &encap->peer->push, PUSH);
	sender_add(&side->sender, encap, packet->datagram, packet->datagrams, packet->total,
		   packet->size);
}

/*
 * Make the datagrams of a packet of @got bytes, the vnet header included, that was read to
 * @datagram + PUSH. Return: why it is dropped (enum fp_drop), or -1; how many it would have been is
 * written also then
 */
static int make_datagrams(struct encap_side *side, struct tun_queue *queue, uint8_t *datagram,
			  size_t got, struct encap *encap, struct waiting *packet)
{
	uint8_t *ip = datagram + PUSH;
	struct vnet_header vnet;
	struct gso gso;
	size_t length;
	bool agrees;

	*packet = (struct waiting) { .queue = queue, .datagram = datagram, .datagrams = 1 };
	if (got < sizeof(vnet))
		return FP_DROP_ENCAP_MALFORMED;
	memcpy(&vnet, ip - sizeof(vnet), sizeof(vnet));
	encap_packet(side->ctx, ip, got - sizeof(vnet), encap);
	agrees = gso_parse(&vnet, ip, &encap->flow, &gso);
	packet->datagrams = gso.segments;
	if (encap->drop >= 0)
		return encap->drop;
	if (!agrees || gso.segments > DATAGRAMS_PER_ADD)
		return FP_DROP_ENCAP_MALFORMED;
	length = encap->flow.length;
	packet->flow = encap->flow.hash;
	packet->total = length + gso.segments * PUSH + (gso.segments - 1) * gso.headers;
	packet->size = gso.segments > 1 ? PUSH + gso.headers + gso.size : packet->total;
	if (packet->size > SEND_BYTES)
		return FP_DROP_SEND_SIZE;
	if (!guessed(queue, &gso, length)) {
		join_pieces(queue, ip, length);
		if (gso.segments > 1)
			gso_spread(&gso, ip, PUSH);
	}
	guess(queue, &gso);
	if (gso.segments > 1)
		side->bulk_ms = side->now / 1000000;
	note_flow(queue, packet->flow, gso.segments > 1, side->now);
	if (encap->flow.ecn != ECN_NOT_ECT && must_mark(side, queue)) {
		flow_set_ecn(ip, get_be16(encap->peer->push.eth.type), ECN_CE);
		encap->outer_tos = ecn_push(ECN_CE);
		count_up(&side->counters.congestion_marks, 1);
	}
	if (gso.protocol)
		gso_fill(&gso, ip, PUSH);
	else if (!gso_complete_checksum(&vnet, ip, &encap->flow))
		return FP_DROP_ENCAP_MALFORMED;
	return -1;
}

/* What a batch has read. */
struct batch {
	bool overtakes; /* what comes may overtake what waits */
	bool emptied; /* nothing is left in the queue */
	size_t packets;
	size_t bytes; /* of these, encapsulated */
};

/*
 * A queue has handed over no packet. EINVAL, EFAULT: the kernel has lost one that it cannot
 * describe or copy, see tun_put_user(); ENOMEM: it has no memory for the list of pieces, now.
 * Return: 0 when more can be read, now or later, or an errno
 */
static int note_no_packet(struct encap_side *side, struct batch *batch, int err)
{
	switch (err) {
	case EINVAL:
	case EFAULT:
		drop(side, FP_DROP_ENCAP_MALFORMED, 1);
		return 0;
	case EAGAIN:
	case ENOMEM:
		batch->emptied = true;
		return 0;
	default:
		return err;
	}
}

/* Read one packet and put it on the way, or have it wait. Return: 0, or an errno */
static int take_packet(struct encap_side *side, struct tun_queue *queue, uint8_t *room,
		       struct batch *batch)
{
	uint8_t *datagram = start_in(room, queue);
	struct waiting packet;
	struct encap encap;
	ssize_t got = read_packet(queue, datagram + PUSH);
	int reason;

	if (got <= 0)
		return note_no_packet(side, batch, got < 0 ? errno : EAGAIN);
	count_up(&side->counters.tun_reads, 1);
	batch->packets++;
	reason = make_datagrams(side, queue, datagram, (size_t)got, &encap, &packet);
	if (reason >= 0) {
		drop(side, reason, packet.datagrams);
		return 0;
	}
	batch->packets += packet.datagrams - 1;
	batch->bytes += packet.total;
	backlog_use(&side->backlog, datagram + packet.total);
	if (backlog_must_wait(&side->backlog, packet.flow, packet.total, batch->overtakes)) {
		queue->waiting++;
		backlog_add(&side->backlog, &packet);
	} else {
		send_packet(side, &encap, &packet);
	}
	return 0;
}

/* A queue was seen empty, or not, at the end of a batch. */
static void note_standing(struct tun_queue *queue, bool empty, uint64_t now)
{
	if (empty) {
		queue->standing_since = 0;
		queue->marks = 0;
	} else if (!queue->standing_since) {
		queue->standing_since = now;
	}
}

/* Send what was added, as far as the sockets have room. */
static void flush(struct encap_side *side)
{
	sender_flush(&side->sender);
	if (!side->sender.full)
		backlog_release(&side->backlog);
}

/**
 * encap_flush_full() - Send what full sockets hold, as far as they have room now
 * @side: Side that no other thread is in
 */
void encap_flush_full(struct encap_side *side)
{
	sender_flush_full(&side->sender);
	if (!side->sender.full)
		backlog_release(&side->backlog);
}

/* Have room to read to while sockets are full. Return: whether there is */
static bool make_room(struct encap_side *side)
{
	if (!side->sender.full)
		return true;
	if (!sender_park(&side->sender))
		return false;
	backlog_release(&side->backlog);
	return true;
}

static size_t batch_bytes(const struct encap_side *side)
{
	return side->now - side->sender.slow_at < SLOW_NS ? SLOW_BATCH_BYTES : BATCH_BYTES;
}

/* Read a batch of a queue. Return: 0, or an errno */
static int read_batch(struct encap_side *side, struct tun_queue *queue, struct batch *batch)
{
	unsigned int most = READS_PER_BATCH;
	size_t bytes = batch_bytes(side);
	int err = 0;

	queue->served = side->now;
	batch->overtakes = side->reads_ahead && is_mixed(queue, side->now);
	if (batch->overtakes) {
		backlog_begin(&side->backlog);
		most = READS_AHEAD;
		bytes = AHEAD_BYTES;
	}
	while (!err && !batch->emptied && most-- && batch->bytes < bytes &&
	       sender_has_room(&side->sender)) {
		uint8_t *room = backlog_room(&side->backlog);

		if (!room)
			break;
		err = take_packet(side, queue, room, batch);
	}
	note_standing(queue, batch->emptied, side->now);
	return err;
}

/* Put a batch of what waits on the way; where it goes now is looked up anew. */
static void send_waiting(struct encap_side *side)
{
	size_t most = batch_bytes(side), bytes = 0;

	while (encap_can_send_waiting(side) && bytes < most && sender_has_room(&side->sender)) {
		struct waiting packet = backlog_take(&side->backlog);
		struct encap encap;

		packet.queue->waiting--;
		encap_packet(side->ctx, packet.datagram + PUSH,
			     (packet.datagrams > 1 ? packet.size : packet.total) - PUSH, &encap);
		if (encap.drop >= 0) {
			drop(side, encap.drop, packet.datagrams);
			continue;
		}
		send_packet(side, &encap, &packet);
		bytes += packet.total;
	}
}

/**
 * encap_turn() - Move a batch of a queue, and one of what waits, without blocking
 * @side:  Side that no other thread is in
 * @queue: NULL for none
 *
 * Return: packets read, or -EBADFD when the TUN device is gone
 */
int encap_turn(struct encap_side *side, struct tun_queue *queue)
{
	struct batch batch = { 0 };
	int err = 0;

	side->now = now_ns();
	fib_enter(side->ctx->fib, &side->reader);
	sender_begin(&side->sender);
	if (queue && make_room(side))
		err = read_batch(side, queue, &batch);
	flush(side);
	if (queue) {
		queue->full = side->sender.added & side->sender.full;
		queue->starved = side->sender.full && !batch.packets && !batch.emptied && !err;
	}
	if (encap_can_send_waiting(side)) {
		send_waiting(side);
		flush(side);
	}
	if (side->sender.full)
		sender_forget_peers(&side->sender);
	fib_leave(&side->reader);
	return err && !batch.packets ? -err : (int)batch.packets;
}

/**
 * encap_open() - Make the side; on failure encap_close() is still to be called
 * @side:     Zeroed
 * @ctx:      Context, which must outlive the side
 * @io:       Sockets to send from and their offloads
 * @epoll_fd: Where those without room wait for it
 * @key:      Their key there
 *
 * Return: 0, or an errno
 */
int encap_open(struct encap_side *side, struct fp_ctx *ctx, const struct fp_io *io, int epoll_fd,
	       uint64_t key)
{
	int err;

	side->ctx = ctx;
	err = backlog_open(&side->backlog);
	if (err)
		return err;
	err = sender_open(&side->sender, io, epoll_fd, key, &side->counters);
	if (err)
		return err;
	fib_reader_add(ctx->fib, &side->reader);
	side->registered = true;
	return 0;
}

/** encap_close() - Free what encap_open() made, also when it failed */
void encap_close(struct encap_side *side)
{
	if (side->registered) {
		fib_reader_remove(side->ctx->fib, &side->reader);
		sender_close(&side->sender);
	}
	backlog_close(&side->backlog);
}

/**
 * encap_drain() - Send what is held for sockets that were full, and what waits
 * @side:     Side that no thread is in
 * @deadline: When to stop waiting for room, as of now_ns()
 *
 * Return: whether all is out
 */
bool encap_drain(struct encap_side *side, uint64_t deadline)
{
	while (side->sender.full || side->backlog.count) {
		uint64_t now = now_ns();

		if (encap_can_send_waiting(side)) {
			encap_turn(side, NULL);
			continue;
		}
		encap_flush_full(side);
		if (side->sender.full &&
		    (now >= deadline ||
		     !sender_wait(&side->sender, (int)((deadline - now) / 1000000) + 1)))
			return false;
	}
	return true;
}

/** encap_give_up() - Count what encap_drain() left as lost; only encap_close() may follow */
void encap_give_up(struct encap_side *side)
{
	size_t left = sender_left(&side->sender);

	while (side->backlog.count)
		left += backlog_take(&side->backlog).datagrams;
	drop(side, FP_DROP_SEND_BUFFER, left);
}
