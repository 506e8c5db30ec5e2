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
 * When a socket's send buffer is full, the batch stays where it is and nothing is read until there
 * is room: the queue is then the TUN's.
 */
#define _GNU_SOURCE
#include "encap.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "ecn.h"

#define PACKET_MAX 65535
#define ARENA_BYTES (1024 * 1024)
#define BATCH_BYTES (128 * 1024)
#define READS_PER_BATCH 64
/* Of one read: a full packet in segments of the smallest MSS that Linux sends (48) makes 22. */
#define SENDS_PER_READ 24
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

static void drop(struct encap_side *side, int reason, size_t packets)
{
	count_up(&side->counters.drops[reason], packets);
}

/* Read a packet to @at, a super-packet's payloads where the queue's guess says they will be needed.
 */
static ssize_t read_packet(const struct tun_queue *queue, uint8_t *at, struct vnet_header *vnet)
{
	struct iovec iov[2 + READ_SEGMENTS];
	size_t length = queue->size ? queue->headers + queue->size : PACKET_MAX;
	size_t left = PACKET_MAX;
	int count = 1;
	ssize_t got;

	iov[0] = (struct iovec) { vnet, sizeof(*vnet) };
	while (left) {
		if (count == 1 + READ_SEGMENTS || length > left)
			length = left;
		iov[count++] = (struct iovec) { at, length };
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

/*
 * Whether a packet that can carry a congestion mark gets one. A local sender is not held back by
 * the TUN, which disowns its packets, so it fills the queue up to its window: milliseconds for all
 * who share it. The rule is CoDel's (RFC 8289), with the time since the queue was last empty for
 * the sojourn time, which the TUN does not tell. Packets of senders that do not know marks are not
 * dropped: a loss costs more than it brings here.
 */
static bool must_mark(struct encap_side *side, struct tun_queue *queue)
{
	if (!queue->standing_since || side->now - queue->standing_since < TARGET_NS)
		return false;
	if (queue->marks && side->now < queue->next_mark)
		return false;
	queue->marks++;
	queue->next_mark = side->now + (uint64_t)(INTERVAL_NS / sqrt(queue->marks));
	return true;
}

/*
 * Where the next packet goes: behind the others, and a super-packet so that its payload begins a
 * cache line, which makes its checksums a third faster.
 */
static size_t start_of(const struct encap_side *side, const struct tun_queue *queue)
{
	size_t headers = PUSH + queue->headers;

	if (!queue->size)
		return side->used;
	return (side->used + headers + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE - headers;
}

/* Read one packet and put it on the way. Return: bytes read, 0 when there is none, or -errno */
static ssize_t take_packet(struct encap_side *side, struct tun_queue *queue, size_t *packets)
{
	uint8_t *datagram = side->arena + start_of(side, queue);
	uint8_t *packet = datagram + PUSH;
	struct vnet_header vnet;
	struct encap encap;
	struct gso gso;
	size_t length, stride, total;
	ssize_t got = read_packet(queue, packet, &vnet);

	if (got < 0)
		return errno == EAGAIN ? 0 : -errno;
	count_up(&side->counters.tun_reads, 1);
	*packets += 1;
	if (got < (ssize_t)sizeof(vnet)) {
		drop(side, FP_DROP_ENCAP_MALFORMED, 1);
		return 1;
	}
	length = (size_t)got - sizeof(vnet);
	encap_packet(side->ctx, packet, length, &encap);
	if (encap.drop >= 0) {
		drop(side, encap.drop, 1);
		return got;
	}
	length = encap.flow.length;
	if (!gso_parse(&vnet, packet, &encap.flow, &gso)) {
		drop(side, FP_DROP_ENCAP_MALFORMED, 1);
		return got;
	}
	stride = PUSH + gso.headers + gso.size;
	total = length + gso.segments * PUSH + (gso.segments - 1) * gso.headers;
	if (total > (size_t)(side->arena + ARENA_BYTES - datagram) ||
	    gso.segments > (SENDS_PER_READ - 1) * DATAGRAMS_PER_SEND) {
		drop(side, FP_DROP_ENCAP_MALFORMED, 1);
		return got;
	}
	if ((gso.segments > 1 ? stride : total) > SEND_BYTES) {
		drop(side, FP_DROP_SEND_SIZE, 1);
		return got;
	}
	if (!guessed(queue, &gso, length)) {
		join_pieces(queue, packet, length);
		if (gso.segments > 1)
			gso_spread(&gso, packet, PUSH);
	}
	guess(queue, &gso);
	if (encap.flow.ecn != ECN_NOT_ECT && must_mark(side, queue)) {
		flow_set_ecn(packet, get_be16(encap.peer->push.eth.type), ECN_CE);
		encap.outer_tos = ecn_push(ECN_CE);
		count_up(&side->counters.congestion_marks, 1);
	}
	if (gso.protocol) {
		gso_fill(&gso, packet, PUSH);
	} else if (!gso_complete_checksum(&vnet, packet, &encap.flow)) {
		drop(side, FP_DROP_ENCAP_MALFORMED, 1);
		return got;
	}
	for (size_t i = 0; i < gso.segments; i++)
		memcpy(datagram + i * stride, &encap.peer->push, PUSH);
	*packets += gso.segments - 1;
	side->used = (size_t)(datagram + total - side->arena);
	sender_add(&side->sender, &encap, datagram, gso.segments, total,
		   gso.segments > 1 ? stride : total);
	return got;
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

/**
 * encap_flush() - Send all that is held, as far as the sockets have room
 * @side: Side that no other thread is in
 *
 * Return: whether everything is out
 */
bool encap_flush(struct encap_side *side)
{
	bool sent = sender_flush(&side->sender);

	if (sent)
		side->used = 0;
	return sent;
}

/* Move a batch of one queue. Return: packets, or -errno */
static int encap_batch(struct encap_side *side, struct tun_queue *queue)
{
	size_t packets = 0;
	ssize_t got = 0;

	side->now = queue->served = now_ns();
	fib_enter(side->ctx->fib, &side->reader);
	for (unsigned int i = 0; i < READS_PER_BATCH && side->used < BATCH_BYTES &&
				 side->sender.sends <= SENDS - SENDS_PER_READ;
	     i++) {
		got = take_packet(side, queue, &packets);
		if (got <= 0)
			break;
	}
	note_standing(queue, got == 0, side->now);
	if (!encap_flush(side))
		sender_forget_peers(&side->sender);
	fib_leave(&side->reader);
	return got < 0 && !packets ? (int)got : (int)packets;
}

/**
 * encap_turn() - Move a batch of a queue, without blocking
 * @side: Side that no other thread is in
 *
 * Return: packets moved, or -EBADFD when the TUN device is gone
 */
int encap_turn(struct encap_side *side, struct tun_queue *queue)
{
	if (encap_is_blocked(side) || (encap_holds(side) && !encap_flush(side)))
		return 0;
	return encap_batch(side, queue);
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
	side->arena =
		mmap(NULL, ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (side->arena == MAP_FAILED) {
		side->arena = NULL;
		return ENOMEM;
	}
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
	if (side->registered)
		fib_reader_remove(side->ctx->fib, &side->reader);
	if (side->arena)
		munmap(side->arena, ARENA_BYTES);
}

/**
 * encap_drain() - Send what is held for sockets that were full
 * @side:       Side that no thread is in
 * @timeout_ms: How long to wait for room each time; what is held then is lost
 */
void encap_drain(struct encap_side *side, int timeout_ms)
{
	while (!encap_flush(side) && sender_wait(&side->sender, timeout_ms))
		;
}
