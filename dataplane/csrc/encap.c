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
 * Of several ready queues the one that was served longest ago is next. A queue whose flows send
 * seldom so never waits for more than one batch of the others.
 *
 * When a socket's send buffer is full, the batch stays where it is, nothing is read and the side
 * waits for that socket: the queue is then the TUN's.
 */
#define _GNU_SOURCE
#include "encap.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <sys/epoll.h>
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

/* Nothing can be read while a socket waits: the queues must not keep the epoll set ready. */
static void watch_queues(struct encap_side *side)
{
	bool mute = side->sender.blocked;

	for (unsigned int i = 0; i < side->queues && side->muted != mute; i++) {
		struct epoll_event event = { .events = mute ? 0 : EPOLLIN, .data.u64 = i };

		epoll_ctl(side->epoll_fd, EPOLL_CTL_MOD, side->queue[i].fd, &event);
	}
	side->muted = mute;
}

static void flush_socket(struct encap_side *side, uint64_t key)
{
	sender_flush_socket(&side->sender, (unsigned int)(key - ENCAP_KEY_SOCKET));
	watch_queues(side);
}

/* Send all of the batch. Return: whether everything is out */
static bool flush(struct encap_side *side)
{
	bool sent = sender_flush(&side->sender);

	watch_queues(side);
	if (sent)
		side->used = 0;
	return sent;
}

/* Move a batch of one queue. Return: packets, or -errno */
static int encap_batch(struct encap_side *side, struct tun_queue *queue)
{
	size_t packets = 0;
	ssize_t got = 0;

	queue->served = ++side->batches;
	side->now = now_ns();
	fib_enter(side->ctx->fib, &side->reader);
	for (unsigned int i = 0; i < READS_PER_BATCH && side->used < BATCH_BYTES &&
				 side->sender.sends <= SENDS - SENDS_PER_READ;
	     i++) {
		got = take_packet(side, queue, &packets);
		if (got <= 0)
			break;
	}
	note_standing(queue, got == 0, side->now);
	if (!flush(side))
		sender_forget_peers(&side->sender);
	fib_leave(&side->reader);
	return got < 0 && !packets ? (int)got : (int)packets;
}

/**
 * encap_wait() - Wait until a turn has work
 * @side:       Side that no other thread is in
 * @timeout_ms: As for epoll_wait()
 *
 * Return: READY_... of what the worker has to look at, 0 for nothing, or -EBADFD when the TUN
 * device is gone
 */
int encap_wait(struct encap_side *side, int timeout_ms)
{
	struct epoll_event event[ENCAP_KEYS];
	int count = epoll_wait(side->epoll_fd, event, ENCAP_KEYS, timeout_ms);
	int ready = 0;

	side->next = NULL;
	for (int i = 0; i < count; i++) {
		uint64_t key = event[i].data.u64;

		if (key == ENCAP_KEY_STOP) {
			ready |= READY_STOP;
		} else if (key == ENCAP_KEY_RECEIVE) {
			ready |= READY_RECEIVE;
		} else if (key >= ENCAP_KEY_SOCKET) {
			flush_socket(side, key);
			ready |= READY_ENCAP;
		} else {
			/* tun_chr_poll() reports an error only when the device is gone. */
			if (event[i].events & EPOLLERR)
				return -EBADFD;
			if (!side->next || side->queue[key].served < side->next->served)
				side->next = &side->queue[key];
			ready |= READY_ENCAP;
		}
	}
	return ready;
}

/**
 * encap_turn() - Move a batch of the queue that encap_wait() found, without blocking
 * @side: Side that no other thread is in
 *
 * Return: packets moved, or -EBADFD when the TUN device is gone
 */
int encap_turn(struct encap_side *side)
{
	if (side->sender.blocked || (side->sender.sends && !flush(side)) || !side->next)
		return 0;
	return encap_batch(side, side->next);
}

/**
 * encap_open() - Make the side; on failure encap_close() is still to be called
 *
 * Return: 0, or an errno
 */
int encap_open(struct encap_side *side, struct fp_ctx *ctx, const struct fp_io *io)
{
	int err;

	if (io->tun_count < 1 || io->tun_count > TUN_QUEUES_MAX)
		return EINVAL;
	side->ctx = ctx;
	side->queues = (unsigned int)io->tun_count;
	side->arena =
		mmap(NULL, ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (side->arena == MAP_FAILED) {
		side->arena = NULL;
		return ENOMEM;
	}
	side->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (side->epoll_fd < 0)
		return errno;
	err = sender_open(&side->sender, io, side->epoll_fd, ENCAP_KEY_SOCKET, &side->counters);
	if (err)
		return err;
	for (unsigned int i = 0; i < side->queues; i++) {
		struct epoll_event event = { .events = EPOLLIN, .data.u64 = i };

		side->queue[i].fd = io->tun[i];
		if (epoll_ctl(side->epoll_fd, EPOLL_CTL_ADD, io->tun[i], &event))
			return errno;
	}
	fib_reader_add(ctx->fib, &side->reader);
	side->registered = true;
	return 0;
}

/** encap_close() - Free what encap_open() made, also when it failed */
void encap_close(struct encap_side *side)
{
	if (side->registered)
		fib_reader_remove(side->ctx->fib, &side->reader);
	if (side->epoll_fd >= 0)
		close(side->epoll_fd);
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
	while (side->sender.blocked) {
		struct epoll_event event[SEND_SOCKETS_MAX];
		int ready = epoll_wait(side->epoll_fd, event, SEND_SOCKETS_MAX, timeout_ms);

		if (ready <= 0)
			return;
		for (int i = 0; i < ready; i++) {
			if (event[i].data.u64 < ENCAP_KEY_SOCKET ||
			    event[i].data.u64 >= ENCAP_KEY_STOP)
				return;
			flush_socket(side, event[i].data.u64);
		}
	}
	flush(side);
}
