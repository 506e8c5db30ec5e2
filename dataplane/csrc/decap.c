/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DOC: From the wire to the TUN
 *
 * A batch is what one recvmmsg() brings. With UDP_GRO a message holds many datagrams of one flow of
 * the underlay. Each is checked by decap_datagram() and its inner packet held (csrc/gro.c), joined
 * with others of its flow where the TUN takes super-packets; at the end of the batch all are
 * written.
 *
 * Large messages are received a few at a time, so that their bytes are still in the cache when they
 * are written; small ones by the slotful.
 */
#define _GNU_SOURCE
#include "decap.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#define SLOT_BYTES (64 * 1024 + CACHE_LINE)
/* So that a transport header behind IPv4 begins a cache line: its checksum is a third faster then.
 */
#define SLOT_OFFSET (CACHE_LINE - PUSH - sizeof(struct ipv4_header))
#define ARENA_BYTES ((size_t)RECEIVES * SLOT_BYTES)
#define SLOTS_MIN 4
/* Average message above which SLOTS_MIN are received at a time. */
#define LARGE_MESSAGE 4096

static void drop(struct decap_side *side, const struct fib_entry *sender, int reason)
{
	count_up(&side->counters.drops[reason], 1);
	if (sender)
		traffic_add(&sender->traffic->drops, 1);
}

/* Keep a sample for the operator's log, unless the ring is full or it repeats the last one. */
static void note_suspect(struct decap_side *side, int reason, const struct inet_address *source,
			 const struct decap *decap)
{
	unsigned int head = atomic_load_explicit(&side->suspects_head, memory_order_relaxed);
	unsigned int tail = atomic_load_explicit(&side->suspects_tail, memory_order_acquire);
	struct fp_suspect *last = &side->suspect[(head - 1) % SUSPECTS];
	struct fp_suspect *suspect = &side->suspect[head % SUSPECTS];

	if (head - tail == SUSPECTS)
		return;
	if (head != tail && last->reason == reason &&
	    memcmp(last->outer_source, source, sizeof(*source)) == 0)
		return;
	suspect->reason = reason;
	memcpy(suspect->outer_source, source, sizeof(*source));
	memcpy(suspect->mac, decap->mac, ETH_ALEN);
	memcpy(suspect->inner_source, &decap->flow.source, sizeof(decap->flow.source));
	atomic_store_explicit(&side->suspects_head, head + 1, memory_order_release);
}

/** decap_take_suspects() - Move up to @capacity samples out. Return: how many */
size_t decap_take_suspects(struct decap_side *side, struct fp_suspect *into, size_t capacity)
{
	unsigned int head = atomic_load_explicit(&side->suspects_head, memory_order_acquire);
	unsigned int tail = atomic_load_explicit(&side->suspects_tail, memory_order_relaxed);
	size_t count = 0;

	while (tail != head && count < capacity)
		into[count++] = side->suspect[tail++ % SUSPECTS];
	atomic_store_explicit(&side->suspects_tail, tail, memory_order_release);
	return count;
}

/* What the kernel says about a message beside its bytes. */
struct outer {
	struct inet_address source;
	uint8_t tos;
	size_t segment; /* UDP_GRO's size of its datagrams, 0 for one */
};

static struct outer outer_of(const struct receive *receive, struct msghdr *header)
{
	struct outer outer = { 0 };
	int value;

	if (receive->from.ss_family == AF_INET)
		outer.source = inet_from_ipv4(
			(const uint8_t *)&((const struct sockaddr_in *)&receive->from)->sin_addr);
	else
		memcpy(&outer.source, &((const struct sockaddr_in6 *)&receive->from)->sin6_addr,
		       sizeof(outer.source));
	for (struct cmsghdr *c = CMSG_FIRSTHDR(header); c; c = CMSG_NXTHDR(header, c)) {
		if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_TOS) {
			outer.tos = *CMSG_DATA(c);
			continue;
		}
		memcpy(&value, CMSG_DATA(c), sizeof(value));
		if (c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_TCLASS)
			outer.tos = (uint8_t)value;
		else if (c->cmsg_level == SOL_UDP && c->cmsg_type == UDP_GRO && value > 0)
			outer.segment = (size_t)value;
	}
	return outer;
}

/* Write a packet with a vnet header in front, where its push was. Return: 0, or an errno */
static int write_tun(struct decap_side *side, const struct vnet_header *vnet, struct iovec *packet,
		     unsigned int pieces)
{
	ssize_t written;

	static_assert(sizeof(*vnet) <= PUSH, "a vnet header has room where the push was");
	packet->iov_base = (uint8_t *)packet->iov_base - sizeof(*vnet);
	packet->iov_len += sizeof(*vnet);
	memcpy(packet->iov_base, vnet, sizeof(*vnet));
	do
		written = writev(side->tun_fd, packet, (int)pieces);
	while (written < 0 && errno == EINTR);
	count_up(&side->counters.tun_writes, 1);
	return written < 0 ? errno : 0;
}

static void count_written(struct decap_side *side, const struct fib_entry *sender, size_t packets,
			  size_t bytes)
{
	count_up(&side->counters.traffic.decap_packets, packets);
	count_up(&side->counters.traffic.decap_bytes, bytes);
	if (sender) {
		traffic_add(&sender->traffic->decap_packets, packets);
		traffic_add(&sender->traffic->decap_bytes, bytes);
		atomic_store_explicit(&sender->traffic->heard_ms, side->received_ms,
				      memory_order_relaxed);
	}
}

/* Write a packet as it came. */
static void write_single(struct decap_side *side, const struct fib_entry *sender,
			 const struct vnet_header *vnet, uint8_t *packet, size_t length)
{
	struct iovec iov = { packet, length };
	int err = write_tun(side, vnet, &iov, 1);

	if (err)
		drop(side, sender, err == EIO ? FP_DROP_TUN_DOWN : FP_DROP_TUN_WRITE);
	else
		count_written(side, sender, 1, length);
}

/* Write all that is held, in the order in which it came. */
static void write_held(struct decap_side *side)
{
	static const struct vnet_header plain;
	struct gro *gro = &side->gro;

	for (unsigned int i = 0; i < gro->packets; i++) {
		struct gro_packet *held = &gro->packet[i];
		struct iovec iov[GRO_SEGMENTS_PER_PACKET];
		struct vnet_header vnet;
		struct gro_edit edit;
		unsigned int pieces = gro_finish(gro, held, &vnet, &edit, iov);

		if (held->segments == 1) {
			write_single(side, held->sender, &vnet, held->packet, held->length);
			continue;
		}
		if (write_tun(side, &vnet, iov, pieces) == 0) {
			count_written(side, held->sender, held->segments,
				      held->total + (held->segments - 1) * held->headers);
			continue;
		}
		/* Whatever the kernel has against it, the packets alone are as good. */
		gro_undo(held, &edit);
		write_single(side, held->sender, &plain, held->packet, held->length);
		for (int s = held->first; s >= 0; s = gro->segment[s].next)
			write_single(side, held->sender, &plain,
				     gro->segment[s].payload - held->headers,
				     gro->segment[s].length + held->headers);
	}
	gro_start(gro);
}

/* Check one datagram and hold its packet. Return: whether it passed without remark */
static bool take_datagram(struct decap_side *side, const struct outer *outer, uint8_t *datagram,
			  size_t length, size_t hint)
{
	struct decap decap;

	decap_datagram(side->ctx, &side->cache, datagram, length, &outer->source, outer->tos,
		       &decap);
	if (decap.drop >= 0) {
		drop(side, decap.sender, decap.drop);
	} else {
		while (!gro_add(&side->gro, decap.packet, &decap.flow, hint, decap.sender))
			write_held(side);
	}
	if (decap.spoofed >= 0)
		count_up(&side->counters.spoofed[decap.spoofed], 1);
	if (decap.spoofed >= 0 || decap.drop == FP_DROP_UNKNOWN_VTEP ||
	    decap.drop == FP_DROP_VTEP_MAC || decap.drop == FP_DROP_INNER_SOURCE)
		note_suspect(side, decap.spoofed >= 0 ? decap.spoofed : decap.drop, &outer->source,
			     &decap);
	return decap.drop < 0 && decap.spoofed < 0;
}

/*
 * Whether a datagram, and its packet, only goes on where the one @before it stopped. That one
 * passed, came in the same message, and had the same headers, so there is nothing left to check.
 */
static bool goes_on(struct decap_side *side, const uint8_t *before, uint8_t *datagram,
		    size_t length)
{
	return length > PUSH && memcmp(before, datagram, PUSH) == 0 &&
	       gro_continue(&side->gro, datagram + PUSH, length - PUSH);
}

/*
 * A kernel peer on a virtual link sends a super-packet as one datagram. UDP_GRO then tells the
 * inner gso size, and the inner packet is as long as the message: nothing less will do, as one
 * damaged length must not cost the datagrams behind it.
 */
static bool is_super_packet(const uint8_t *message, size_t length)
{
	const struct vxlan_push *push = (const struct vxlan_push *)message;

	return length >= PUSH + sizeof(struct ipv4_header) &&
	       PUSH + ip_total_length(message + PUSH, get_be16(push->eth.type) == ETHERTYPE_IPV4) ==
		       length;
}

/* Make a message ready to be received into; the kernel changes these fields of those it fills. */
static void make_room(struct receive *receive, struct msghdr *header)
{
	header->msg_namelen = sizeof(receive->from);
	header->msg_controllen = sizeof(receive->control);
}

/* Return: its datagrams */
static int take_message(struct decap_side *side, struct receive *receive, struct mmsghdr *message)
{
	struct outer outer = outer_of(receive, &message->msg_hdr);
	uint8_t *datagram = receive->iov.iov_base;
	size_t left = message->msg_len;
	size_t hint = 0, size = left;
	bool passed = false;
	int datagrams = 0;

	if (outer.segment && outer.segment < left) {
		if (is_super_packet(datagram, left))
			hint = outer.segment;
		else
			size = outer.segment;
	}
	do {
		size_t length = left < size ? left : size;

		if (!passed || !goes_on(side, datagram - size, datagram, length))
			passed = take_datagram(side, &outer, datagram, length, hint);
		datagrams++;
		datagram += length;
		left -= length;
	} while (left);
	make_room(receive, &message->msg_hdr);
	return datagrams;
}

/* Move what one recvmmsg() brings. Return: messages, 0 when there is none */
static int decap_batch(struct decap_side *side, struct receive_socket *socket, int *datagrams)
{
	size_t bytes = 0;
	int received = recvmmsg(socket->fd, side->message, socket->slots, MSG_DONTWAIT, NULL);

	if (received <= 0)
		return 0;
	side->received_ms = coarse_ms();
	count_up(&side->counters.receives, (uint64_t)received);
	for (int i = 0; i < received; i++) {
		bytes += side->message[i].msg_len;
		*datagrams += take_message(side, &side->receive[i], &side->message[i]);
	}
	write_held(side);
	socket->slots = RECEIVES;
	if (bytes / (size_t)received > LARGE_MESSAGE) {
		socket->slots = SLOTS_MIN;
		side->bulk_ms = side->received_ms;
	}
	return received;
}

/**
 * decap_turn() - Move what has come by a socket, without blocking
 * @side:    Side that no other thread is in
 * @socket:  Socket that no other side reads
 * @batches: At most so many
 *
 * Return: datagrams
 */
int decap_turn(struct decap_side *side, struct receive_socket *socket, unsigned int batches)
{
	int datagrams = 0;

	fib_enter(side->ctx->fib, &side->reader);
	side->cache = (struct sender_cache) { 0 };
	while (batches--) {
		unsigned int slots = socket->slots;
		int received = decap_batch(side, socket, &datagrams);

		if ((unsigned int)received < slots)
			break;
	}
	fib_leave(&side->reader);
	return datagrams;
}

/** receive_socket_init() - Make a socket ready for decap_turn(); @fd stays the caller's */
void receive_socket_init(struct receive_socket *socket, int fd)
{
	*socket = (struct receive_socket) { .fd = fd, .slots = RECEIVES };
}

/**
 * decap_open() - Make the side; on failure decap_close() is still to be called
 *
 * Return: 0, or an errno
 */
int decap_open(struct decap_side *side, struct fp_ctx *ctx, const struct fp_io *io)
{
	side->ctx = ctx;
	side->tun_fd = io->tun_write;
	side->gro.tcp = io->coalesce_tcp;
	side->gro.udp = io->coalesce_udp;
	gro_start(&side->gro);
	/* Pages that no message reaches are never touched. */
	side->arena =
		mmap(NULL, ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (side->arena == MAP_FAILED) {
		side->arena = NULL;
		return ENOMEM;
	}
	for (unsigned int i = 0; i < RECEIVES; i++) {
		struct receive *receive = &side->receive[i];

		receive->iov = (struct iovec) { side->arena + i * SLOT_BYTES + SLOT_OFFSET,
						SLOT_BYTES - SLOT_OFFSET };
		side->message[i].msg_hdr = (struct msghdr) {
			.msg_name = &receive->from,
			.msg_iov = &receive->iov,
			.msg_iovlen = 1,
			.msg_control = &receive->control,
		};
		make_room(receive, &side->message[i].msg_hdr);
	}
	fib_reader_add(ctx->fib, &side->reader);
	side->registered = true;
	return 0;
}

/** decap_close() - Free what decap_open() made, also when it failed */
void decap_close(struct decap_side *side)
{
	if (side->registered)
		fib_reader_remove(side->ctx->fib, &side->reader);
	if (side->arena)
		munmap(side->arena, ARENA_BYTES);
}
