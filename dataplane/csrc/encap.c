/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DOC: From the TUN to the wire
 *
 * A batch reads BATCH_BYTES or READS_PER_BATCH packets from one TUN queue into an arena, gives each
 *the 22 bytes that encapsulation pushes, and sends. Packets stand in the arena one behind the
 *other:
 *
 *	| push | packet | push | packet | push | first segment | push | next segment | ...
 *
 * so that datagrams of one size and one peer are one stretch of memory, and one message with
 *UDP_SEGMENT carries up to 64 of them. A super-packet is read straight into that form: readv() is
 *told to leave a gap where the push and the headers of each segment will be, at the places that the
 *last super-packet of the queue had. When the guess was wrong the payload is moved once.
 *
 * Of several ready queues the one that was served longest ago is next. A queue whose flows send
 *seldom so never waits for more than one batch of the others.
 *
 * When a socket's send buffer is full, the batch stays where it is, nothing is read and the side
 *waits for that socket: the queue is then the TUN's. A flow always has the same socket, and a
 *socket's messages are sent in the order in which their first packets were read, each flow's
 *packets in order.
 */
#define _GNU_SOURCE
#include "encap.h"

#include <errno.h>
#include <math.h>
#include <netinet/udp.h>
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
/* UDP_MAX_SEGMENTS of kernels before 6.9, and the longest UDP payload over IPv4. */
#define DATAGRAMS_PER_SEND 64
#define SEND_BYTES 65507
/* Segments that one readv() puts in their places; what is behind them comes in one piece. */
#define READ_SEGMENTS 64
/* Below this the headers could be cut by a guess, and many pieces are slower than moving the
 * payload. */
#define GUESS_SIZE_MIN GSO_HEADERS_MAX
/* Packets without segmentation after which no super-packet is expected any more. */
#define GUESS_MISSES 8
#define MESSAGES 128
/* How long a queue may stand, and the time between the first two marks. */
#define TARGET_NS (1000 * 1000)
#define INTERVAL_NS (10 * 1000 * 1000)
/* Messages to a peer that refused a segmented one, before the next is tried. */
#define UNSEGMENTED_MESSAGES 4096
#define PUSH sizeof(struct vxlan_push)

static void drop(struct encap_side *side, int reason, size_t packets)
{
	count_up(&side->counters.drops[reason], packets);
}

/* Return: the drop reason for a failed send */
static int send_drop(int err)
{
	switch (err) {
	case ENETUNREACH:
	case EHOSTUNREACH:
	case ENETDOWN:
	case ENODEV:
	case EADDRNOTAVAIL:
		return FP_DROP_SEND_UNREACHABLE;
	case EPERM:
	case EACCES:
		return FP_DROP_SEND_DENIED;
	case EMSGSIZE:
		return FP_DROP_SEND_SIZE;
	case ENOBUFS:
	case ENOMEM:
		return FP_DROP_SEND_BUFFER;
	default:
		return FP_DROP_SEND_ERROR;
	}
}

static socklen_t underlay_sockaddr(const struct fib_entry *peer, struct sockaddr_storage *to)
{
	if (inet_is_ipv4(&peer->underlay)) {
		struct sockaddr_in *in = (struct sockaddr_in *)to;

		*in = (struct sockaddr_in) { .sin_family = AF_INET, .sin_port = htons(peer->port) };
		memcpy(&in->sin_addr, peer->underlay.octet + 12, 4);
		return sizeof(*in);
	} else {
		struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)to;

		*in6 = (struct sockaddr_in6) { .sin6_family = AF_INET6,
					       .sin6_port = htons(peer->port) };
		memcpy(&in6->sin6_addr, &peer->underlay, 16);
		return sizeof(*in6);
	}
}

static void set_blocked(struct encap_side *side, unsigned int index, bool blocked)
{
	struct send_socket *socket = &side->socket[index];
	struct epoll_event event = { .events = EPOLLOUT, .data.u64 = ENCAP_KEY_SOCKET + index };

	if (socket->blocked == blocked)
		return;
	socket->blocked = blocked;
	if (blocked) {
		epoll_ctl(side->epoll_fd, EPOLL_CTL_ADD, socket->fd, &event);
		count_up(&side->counters.sends_blocked, 1);
		side->blocked++;
	} else {
		epoll_ctl(side->epoll_fd, EPOLL_CTL_DEL, socket->fd, &event);
		side->blocked--;
	}
	/* Nothing can be read meanwhile: the queues must not keep the epoll set ready. */
	for (unsigned int i = 0; i < side->queues && side->blocked == (blocked ? 1u : 0u); i++) {
		struct epoll_event queue = { .events = blocked ? 0 : EPOLLIN, .data.u64 = i };

		epoll_ctl(side->epoll_fd, EPOLL_CTL_MOD, side->queue[i].fd, &queue);
	}
}

/* What sendmsg() needs besides the message: control data. */
struct send_control {
	union {
		char bytes[CMSG_SPACE(sizeof(int)) + CMSG_SPACE(sizeof(uint16_t))];
		struct cmsghdr align;
	};
};

static void add_control(struct msghdr *header, int level, int type, const void *value,
			size_t length)
{
	struct cmsghdr *control =
		(struct cmsghdr *)((char *)header->msg_control + header->msg_controllen);

	control->cmsg_level = level;
	control->cmsg_type = type;
	control->cmsg_len = CMSG_LEN(length);
	memcpy(CMSG_DATA(control), value, length);
	header->msg_controllen += CMSG_SPACE(length);
}

static struct msghdr message_of(const struct send *send, struct iovec *iov, size_t pieces,
				struct send_control *control, bool segmented)
{
	struct msghdr header = {
		.msg_name = (void *)&send->to,
		.msg_namelen = send->to_length,
		.msg_iov = iov,
		.msg_iovlen = pieces,
		.msg_control = control,
	};
	bool ipv4 = send->to.ss_family == AF_INET;
	uint16_t size = (uint16_t)send->size;
	int tos = send->tos;

	if (tos)
		add_control(&header, ipv4 ? IPPROTO_IP : IPPROTO_IPV6, ipv4 ? IP_TOS : IPV6_TCLASS,
			    &tos, sizeof(tos));
	if (segmented)
		add_control(&header, SOL_UDP, UDP_SEGMENT, &size, sizeof(size));
	if (!header.msg_controllen)
		header.msg_control = NULL;
	return header;
}

/* What one sendmmsg() is given. */
struct outgoing {
	unsigned int count;
	unsigned int pieces;
	struct mmsghdr message[MESSAGES];
	struct send_control control[MESSAGES];
	struct iovec iov[MESSAGES + PIECES];
};

static void add_message(struct outgoing *out, const struct send *send, unsigned int first,
			bool segmented)
{
	out->message[out->count].msg_hdr = message_of(send, out->iov + first, out->pieces - first,
						      &out->control[out->count], segmented);
	out->count++;
}

/* The datagrams of a split send that are not out yet, a message each. */
static void add_split(const struct encap_side *side, const struct send *send, struct outgoing *out)
{
	unsigned int skip = send->sent;

	for (int i = send->first; i >= 0; i = side->piece[i].next) {
		const struct piece *piece = &side->piece[i];

		for (size_t at = 0; at < piece->length; at += send->size) {
			size_t left = piece->length - at;

			if (skip) {
				skip--;
				continue;
			}
			if (out->count == MESSAGES)
				return;
			out->iov[out->pieces++] =
				(struct iovec) { piece->start + at,
						 left < send->size ? left : send->size };
			add_message(out, send, out->pieces - 1, false);
		}
	}
}

static void gather(const struct encap_side *side, const struct send_socket *socket,
		   struct outgoing *out)
{
	out->count = out->pieces = 0;
	for (int i = socket->first; i >= 0 && out->count < MESSAGES; i = side->send[i].next) {
		const struct send *send = &side->send[i];
		unsigned int first = out->pieces;

		if (send->split) {
			add_split(side, send, out);
			continue;
		}
		for (int p = send->first; p >= 0; p = side->piece[p].next)
			out->iov[out->pieces++] =
				(struct iovec) { side->piece[p].start, side->piece[p].length };
		add_message(out, send, first, send->datagrams > 1);
	}
}

/* The first message of @socket is out, or dropped. Return: its datagrams */
static unsigned int advance(struct encap_side *side, struct send_socket *socket)
{
	struct send *send = &side->send[socket->first];
	unsigned int datagrams = send->split ? 1 : send->datagrams;

	send->sent += datagrams;
	if (send->sent == send->datagrams)
		socket->first = send->next;
	return datagrams;
}

/*
 * The first message of @socket was refused. EMSGSIZE and EINVAL: a segment is larger than what the
 * route or device to this peer takes; EIO: the device computes no checksums and the kernel does not
 * help (before 6.2). Then its datagrams go one by one, as do the next ones to this peer; all else
 * is a drop.
 */
static void refused(struct encap_side *side, struct send_socket *socket, int err)
{
	struct send *send = &side->send[socket->first];

	if (!send->split && send->datagrams > 1 &&
	    (err == EMSGSIZE || err == EINVAL || err == EIO)) {
		send->split = true;
		count_up(&side->counters.sends_unsegmented, 1);
		if (send->peer)
			atomic_store_explicit(&send->peer->traffic->unsegmented,
					      UNSEGMENTED_MESSAGES, memory_order_relaxed);
		return;
	}
	drop(side, send_drop(err), advance(side, socket));
}

/* Send what a socket has, until it is through or has no room. */
static void flush_socket(struct encap_side *side, unsigned int index)
{
	struct send_socket *socket = &side->socket[index];
	struct fp_traffic *total = &side->counters.traffic;
	struct outgoing out;

	while (socket->first >= 0) {
		int sent;

		gather(side, socket, &out);
		if (out.count == 1)
			sent = sendmsg(socket->fd, &out.message[0].msg_hdr, MSG_DONTWAIT) < 0 ? -1
											      : 1;
		else
			sent = sendmmsg(socket->fd, out.message, out.count, MSG_DONTWAIT);
		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0 && errno == EAGAIN) {
			set_blocked(side, index, true);
			return;
		}
		if (sent < 0) {
			refused(side, socket, errno);
			continue;
		}
		count_up(&side->counters.sends, (uint64_t)sent);
		for (int i = 0; i < sent; i++) {
			const struct iovec *iov = out.message[i].msg_hdr.msg_iov;
			unsigned int datagrams = advance(side, socket);

			count_up(&total->encap_packets, datagrams);
			for (size_t p = 0; p < out.message[i].msg_hdr.msg_iovlen; p++)
				count_up(&total->encap_bytes, iov[p].iov_len);
			count_up(&total->encap_bytes, -(uint64_t)(datagrams * PUSH));
		}
	}
	socket->last = -1;
	set_blocked(side, index, false);
}

/* Send all of the batch. Return: whether everything is out */
static bool flush(struct encap_side *side)
{
	for (unsigned int i = 0; i < side->sockets; i++) {
		if (side->socket[i].first >= 0)
			flush_socket(side, i);
	}
	if (side->blocked)
		return false;
	side->used = 0;
	side->pieces = side->sends = 0;
	return true;
}

/* Whether datagrams to this peer go one by one for now. */
static bool is_unsegmented(const struct encap_side *side, struct fib_traffic *traffic)
{
	unsigned int left = atomic_load_explicit(&traffic->unsegmented, memory_order_relaxed);

	if (left)
		atomic_store_explicit(&traffic->unsegmented, left - 1, memory_order_relaxed);
	return left || !side->segment;
}

/*
 * The message on @socket that @datagrams of @size bytes may join, or NULL. Nothing may overtake
 * them later, so one that they cannot join is closed.
 */
static struct send *open_send(struct encap_side *side, const struct send_socket *socket,
			      const struct encap *encap, size_t datagrams, size_t size)
{
	for (int i = socket->first; i >= 0; i = side->send[i].next) {
		struct send *send = &side->send[i];

		if (send->peer != encap->peer || send->closed)
			continue;
		/* Only the last datagram of a message may be shorter. */
		if ((size == send->size || (datagrams == 1 && size < send->size)) &&
		    send->tos == encap->outer_tos)
			return send;
		send->closed = true;
	}
	return NULL;
}

static struct send *new_send(struct encap_side *side, struct send_socket *socket,
			     const struct encap *encap, size_t size)
{
	int index = (int)side->sends++;
	struct send *send = &side->send[index];

	*send = (struct send) {
		.peer = encap->peer,
		.tos = encap->outer_tos,
		.size = size,
		.most = SEND_BYTES / size < DATAGRAMS_PER_SEND ? (unsigned int)(SEND_BYTES / size)
							       : DATAGRAMS_PER_SEND,
		.split = is_unsegmented(side, encap->peer->traffic),
		.first = -1,
		.last = -1,
		.next = -1,
	};
	send->to_length = underlay_sockaddr(encap->peer, &send->to);
	if (socket->first < 0)
		socket->first = index;
	else
		side->send[socket->last].next = index;
	socket->last = index;
	return send;
}

static void add_piece(struct encap_side *side, struct send *send, uint8_t *start, size_t length)
{
	struct piece *last = send->last >= 0 ? &side->piece[send->last] : NULL;

	if (last && last->start + last->length == start) {
		last->length += length;
		return;
	}
	side->piece[side->pieces] = (struct piece) { start, length, -1 };
	if (last)
		last->next = (int)side->pieces;
	else
		send->first = (int)side->pieces;
	send->last = (int)side->pieces++;
}

/* Put @datagrams that lie at @start, each of @size bytes but the last, on the way. */
static void enqueue(struct encap_side *side, const struct encap *encap, uint8_t *start,
		    size_t datagrams, size_t length, size_t size)
{
	struct send_socket *socket = &side->socket[encap->flow.hash % side->sockets];
	struct fib_traffic *traffic = encap->peer->traffic;

	traffic_add(&traffic->encap_packets, datagrams);
	traffic_add(&traffic->encap_bytes, length - datagrams * PUSH);
	while (datagrams) {
		size_t one = datagrams == 1 ? length : size;
		struct send *send = open_send(side, socket, encap, datagrams, one);
		size_t count, bytes;

		if (!send)
			send = new_send(side, socket, encap, one);
		count = send->most - send->datagrams;
		if (count > datagrams)
			count = datagrams;
		bytes = count == datagrams ? length : count * size;
		add_piece(side, send, start, bytes);
		send->datagrams += (unsigned int)count;
		send->closed = send->datagrams == send->most || bytes != count * send->size;
		start += bytes;
		datagrams -= count;
		length -= bytes;
	}
}

/* Read a packet to @at, a super-packet's payloads where the queue's guess says they will be needed.
 */
static ssize_t read_packet(const struct tun_queue *queue, uint8_t *at, struct vnet_header *vnet)
{
	struct iovec iov[2 + READ_SEGMENTS] = { { vnet, sizeof(*vnet) } };
	size_t length = queue->size ? queue->headers + queue->size : PACKET_MAX;
	size_t left = PACKET_MAX;
	int count = 1;
	ssize_t got;

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

/* Read one packet and put it on the way. Return: bytes read, 0 when there is none, or -errno */
static ssize_t take_packet(struct encap_side *side, struct tun_queue *queue, size_t *packets)
{
	uint8_t *datagram = side->arena + side->used;
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
	if (total > ARENA_BYTES - side->used ||
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
	side->used += total;
	enqueue(side, &encap, datagram, gso.segments, total, gso.segments > 1 ? stride : total);
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

/* Move a batch of one queue. Return: packets, or -errno */
static int encap_batch(struct encap_side *side, struct tun_queue *queue)
{
	size_t packets = 0;
	ssize_t got = 0;

	queue->served = ++side->batches;
	side->now = now_ns();
	fib_enter(side->ctx->fib, &side->reader);
	for (unsigned int i = 0; i < READS_PER_BATCH && side->used < BATCH_BYTES &&
				 side->sends <= SENDS - SENDS_PER_READ;
	     i++) {
		got = take_packet(side, queue, &packets);
		if (got <= 0)
			break;
	}
	note_standing(queue, got == 0, side->now);
	if (!flush(side)) {
		for (unsigned int i = 0; i < side->sends; i++)
			side->send[i].peer = NULL;
	}
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
			flush_socket(side, (unsigned int)(key - ENCAP_KEY_SOCKET));
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
	if (side->blocked || (side->sends && !flush(side)) || !side->next)
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
	if (io->send_count < 1 || io->send_count > SEND_SOCKETS_MAX || io->tun_count < 1 ||
	    io->tun_count > TUN_QUEUES_MAX)
		return EINVAL;
	side->ctx = ctx;
	side->segment = io->segment;
	side->sockets = (unsigned int)io->send_count;
	for (unsigned int i = 0; i < side->sockets; i++)
		side->socket[i] = (struct send_socket) { io->send[i], -1, -1, false };
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
	while (side->blocked) {
		struct epoll_event event[SEND_SOCKETS_MAX];
		int ready = epoll_wait(side->epoll_fd, event, SEND_SOCKETS_MAX, timeout_ms);

		if (ready <= 0)
			return;
		for (int i = 0; i < ready; i++) {
			if (event[i].data.u64 < ENCAP_KEY_SOCKET ||
			    event[i].data.u64 >= ENCAP_KEY_STOP)
				return;
			flush_socket(side, (unsigned int)(event[i].data.u64 - ENCAP_KEY_SOCKET));
		}
	}
	flush(side);
}
