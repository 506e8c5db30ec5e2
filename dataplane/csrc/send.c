/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DOC: Messages to the peers
 *
 * Datagrams of one size for one peer go out as one message with UDP_SEGMENT, up to 64 of them; all
 * messages of a batch go out with one sendmmsg() for each socket.
 *
 * A flow always has the same socket, and a socket's messages are sent in the order in which their
 * first packets were added, each flow's packets in order. When a socket's send buffer is full, what
 * it holds stays here until epoll says that there is room or a timer that there should be, and is
 * lost where epoll cannot be asked. The other sockets go on meanwhile: they may lead elsewhere.
 */
#define _GNU_SOURCE
#include "send.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define BIT(index) (1ULL << (index))
#define MESSAGES 128
/* Messages to a peer that refused a segmented one, before the next is tried. */
#define UNSEGMENTED_MESSAGES 4096

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

/* Have the epoll set wake up in @ns, 0 for never. */
static void set_timer(const struct sender *sender, long ns)
{
	timerfd_settime(sender->timer_fd, 0, &(struct itimerspec) { .it_value.tv_nsec = ns }, NULL);
}

/* A socket is full. Return: whether it can be waited for: there are fs.epoll.max_user_watches */
static bool block(struct sender *sender, unsigned int index)
{
	struct send_socket *socket = &sender->socket[index];
	struct epoll_event event = { .events = EPOLLOUT, .data.u64 = sender->key };

	if (!(sender->full & BIT(index))) {
		if (epoll_ctl(sender->epoll_fd, EPOLL_CTL_ADD, socket->fd, &event))
			return false;
		count_up(&sender->counters->sends_blocked, 1);
		sender->full |= BIT(index);
	}
	socket->full_at = now_ns();
	set_timer(sender, ROOM_LATE_NS);
	return true;
}

static void unblock(struct sender *sender, unsigned int index)
{
	if (!(sender->full & BIT(index)))
		return;
	epoll_ctl(sender->epoll_fd, EPOLL_CTL_DEL, sender->socket[index].fd, NULL);
	sender->full &= ~BIT(index);
	if (!sender->full)
		set_timer(sender, 0);
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
static void add_split(const struct sender *sender, const struct send *send, struct outgoing *out)
{
	unsigned int skip = send->sent;

	for (int i = send->first; i >= 0; i = sender->piece[i].next) {
		const struct piece *piece = &sender->piece[i];

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

static void gather(const struct sender *sender, const struct send_socket *socket,
		   struct outgoing *out)
{
	out->count = out->pieces = 0;
	for (int i = socket->first; i >= 0 && out->count < MESSAGES; i = sender->send[i].next) {
		const struct send *send = &sender->send[i];
		unsigned int first = out->pieces;

		if (send->split) {
			add_split(sender, send, out);
			continue;
		}
		for (int p = send->first; p >= 0; p = sender->piece[p].next)
			out->iov[out->pieces++] =
				(struct iovec) { sender->piece[p].start, sender->piece[p].length };
		add_message(out, send, first, send->datagrams > 1);
	}
}

static int take_piece(struct sender *sender)
{
	int index = sender->free_piece;

	assert(index >= 0);
	sender->free_piece = sender->piece[index].next;
	sender->pieces++;
	return index;
}

static int take_send(struct sender *sender)
{
	int index = sender->free_send;

	assert(index >= 0);
	sender->free_send = sender->send[index].next;
	sender->sends++;
	return index;
}

static void free_pieces(struct sender *sender, int first, int last)
{
	for (int i = first; i >= 0; i = sender->piece[i].next)
		sender->pieces--;
	sender->piece[last].next = sender->free_piece;
	sender->free_piece = first;
}

/* The first send of @socket is through. */
static void free_first(struct sender *sender, struct send_socket *socket)
{
	int index = socket->first;
	struct send *send = &sender->send[index];

	free_pieces(sender, send->first, send->last);
	free(send->parked);
	socket->first = send->next;
	send->next = sender->free_send;
	sender->free_send = index;
	sender->sends--;
}

/* The first message of @socket is out, or dropped. Return: its datagrams */
static unsigned int advance(struct sender *sender, struct send_socket *socket)
{
	struct send *send = &sender->send[socket->first];
	unsigned int datagrams = send->split ? 1 : send->datagrams;

	send->sent += datagrams;
	if (send->sent == send->datagrams)
		free_first(sender, socket);
	return datagrams;
}

static void count_for_peer(const struct fib_entry *peer, unsigned int datagrams, size_t bytes)
{
	traffic_add(&peer->traffic->encap_packets, datagrams);
	traffic_add(&peer->traffic->encap_bytes, bytes);
}

/* Datagrams are out, @bytes of inner packets. @peer is NULL once the FIB section has ended. */
static void count_sent(struct sender *sender, const struct fib_entry *peer, unsigned int datagrams,
		       size_t bytes)
{
	count_up(&sender->counters->traffic.encap_packets, datagrams);
	count_up(&sender->counters->traffic.encap_bytes, bytes);
	if (peer)
		count_for_peer(peer, datagrams, bytes);
}

static void count_dropped(struct sender *sender, const struct fib_entry *peer, int reason,
			  unsigned int datagrams)
{
	count_up(&sender->counters->drops[reason], datagrams);
	if (peer)
		traffic_add(&peer->traffic->drops, datagrams);
}

/*
 * The first message of @socket was refused. EMSGSIZE and EINVAL: a segment is larger than what the
 * route or device to this peer takes; EIO: the device computes no checksums and the kernel does not
 * help (before 6.2). Then its datagrams go one by one, as do the next ones to this peer; all else
 * is a drop.
 */
static void refused(struct sender *sender, struct send_socket *socket, int err)
{
	struct send *send = &sender->send[socket->first];

	if (!send->split && send->datagrams > 1 &&
	    (err == EMSGSIZE || err == EINVAL || err == EIO)) {
		send->split = true;
		count_up(&sender->counters->sends_unsegmented, 1);
		if (send->peer)
			atomic_store_explicit(&send->peer->traffic->unsegmented,
					      UNSEGMENTED_MESSAGES, memory_order_relaxed);
		return;
	}
	count_dropped(sender, send->peer, send_drop(err), advance(sender, socket));
}

/* Send what a socket has, until it is through or has no room. */
static void flush_socket(struct sender *sender, unsigned int index)
{
	struct send_socket *socket = &sender->socket[index];
	struct outgoing out;

	while (socket->first >= 0) {
		int sent;

		gather(sender, socket, &out);
		if (out.count == 1)
			sent = sendmsg(socket->fd, &out.message[0].msg_hdr, MSG_DONTWAIT) < 0 ? -1
											      : 1;
		else
			sent = sendmmsg(socket->fd, out.message, out.count, MSG_DONTWAIT);
		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0 && errno == EAGAIN) {
			if (block(sender, index))
				return;
			errno = ENOBUFS;
		}
		if (sent < 0) {
			refused(sender, socket, errno);
			continue;
		}
		count_up(&sender->counters->sends, (uint64_t)sent);
		for (int i = 0; i < sent; i++) {
			const struct msghdr *message = &out.message[i].msg_hdr;
			const struct fib_entry *peer = sender->send[socket->first].peer;
			unsigned int datagrams = advance(sender, socket);
			size_t bytes = 0;

			for (size_t p = 0; p < message->msg_iovlen; p++)
				bytes += message->msg_iov[p].iov_len;
			count_sent(sender, peer, datagrams, bytes - datagrams * PUSH);
		}
	}
	socket->last = -1;
	unblock(sender, index);
}

/* Whether nothing is left of any of these sockets, a bit each. */
static bool are_idle(const struct sender *sender, uint64_t sockets)
{
	for (unsigned int i = 0; i < sender->sockets; i++) {
		if ((sockets & BIT(i)) && room_left(sender->socket[i].fd))
			return false;
	}
	return true;
}

/* Full sockets may have room again: see whether it is what they need. */
static void adapt_rooms(struct sender *sender)
{
	/* A full one has something left as a rule, which spares asking the others. */
	bool is_idle = are_idle(sender, sender->full) && are_idle(sender, ~sender->full);
	uint64_t now = now_ns();

	if (!is_idle)
		sender->slow_at = now;
	for (unsigned int i = 0; i < sender->sockets; i++) {
		struct send_socket *socket = &sender->socket[i];

		if (sender->full & BIT(i))
			room_adapt(&socket->room, socket->fd, is_idle, now - socket->full_at);
	}
}

/** sender_begin() - A batch begins: nothing was added yet, as @added counts */
void sender_begin(struct sender *sender)
{
	sender->added = 0;
}

/** sender_flush() - Send what was added for sockets that are not full */
void sender_flush(struct sender *sender)
{
	for (unsigned int i = 0; i < sender->sockets; i++) {
		if (sender->socket[i].first >= 0 && !(sender->full & BIT(i)))
			flush_socket(sender, i);
	}
}

/** sender_flush_full() - Send what full sockets have, as one of them may have room again */
void sender_flush_full(struct sender *sender)
{
	adapt_rooms(sender);
	for (unsigned int i = 0; i < sender->sockets; i++) {
		if (sender->full & BIT(i))
			flush_socket(sender, i);
	}
}

static unsigned int socket_of(const struct sender *sender, uint32_t flow)
{
	return flow % sender->sockets;
}

/** sender_is_full() - Whether the socket of a flow, told by its hash, waits for room */
bool sender_is_full(const struct sender *sender, uint32_t flow)
{
	return sender->full & BIT(socket_of(sender, flow));
}

/* Bytes of all datagrams of a send. */
static size_t length_of(const struct sender *sender, const struct send *send)
{
	size_t length = 0;

	for (int i = send->first; i >= 0; i = sender->piece[i].next)
		length += sender->piece[i].length;
	return length;
}

/* Put what a send has into one piece of memory of its own. Return: false without memory */
static bool park(struct sender *sender, struct send *send)
{
	struct piece *first = &sender->piece[send->first];
	size_t length = 0;

	send->parked = malloc(length_of(sender, send));
	if (!send->parked)
		return false;
	for (int i = send->first; i >= 0; i = sender->piece[i].next) {
		memcpy(send->parked + length, sender->piece[i].start, sender->piece[i].length);
		length += sender->piece[i].length;
	}
	if (send->last != send->first) {
		free_pieces(sender, first->next, send->last);
		send->last = send->first;
	}
	*first = (struct piece) { send->parked, length, -1 };
	send->closed = true;
	return true;
}

/**
 * sender_park() - Let the memory that datagrams of full sockets lie in be used anew
 *
 * Return: false when there is none to move them to
 */
bool sender_park(struct sender *sender)
{
	for (unsigned int s = 0; s < sender->sockets; s++) {
		for (int i = sender->socket[s].first; i >= 0; i = sender->send[i].next) {
			struct send *send = &sender->send[i];

			if (!send->parked && !park(sender, send))
				return false;
		}
	}
	return true;
}

/* Whether datagrams to this peer go one by one for now. */
static bool is_unsegmented(const struct sender *sender, struct fib_traffic *traffic)
{
	unsigned int left = atomic_load_explicit(&traffic->unsegmented, memory_order_relaxed);

	if (left)
		atomic_store_explicit(&traffic->unsegmented, left - 1, memory_order_relaxed);
	return left || !sender->segment;
}

/*
 * The message on @socket that @datagrams of @size bytes may join, or NULL. Nothing may overtake
 * them later, so one that they cannot join is closed.
 */
static struct send *open_send(struct sender *sender, const struct send_socket *socket,
			      const struct encap *encap, size_t datagrams, size_t size)
{
	for (int i = socket->first; i >= 0; i = sender->send[i].next) {
		struct send *send = &sender->send[i];

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

static struct send *new_send(struct sender *sender, struct send_socket *socket,
			     const struct encap *encap, size_t size)
{
	int index = take_send(sender);
	struct send *send = &sender->send[index];

	*send = (struct send) {
		.peer = encap->peer,
		.tos = encap->outer_tos,
		.size = size,
		.most = SEND_BYTES / size < DATAGRAMS_PER_SEND ? (unsigned int)(SEND_BYTES / size)
							       : DATAGRAMS_PER_SEND,
		.split = is_unsegmented(sender, encap->peer->traffic),
		.first = -1,
		.last = -1,
		.next = -1,
	};
	send->to_length = underlay_sockaddr(encap->peer, &send->to);
	if (socket->first < 0)
		socket->first = index;
	else
		sender->send[socket->last].next = index;
	socket->last = index;
	return send;
}

static void add_piece(struct sender *sender, struct send *send, uint8_t *start, size_t length)
{
	struct piece *last = send->last >= 0 ? &sender->piece[send->last] : NULL;
	int index;

	if (last && last->start + last->length == start) {
		last->length += length;
		return;
	}
	index = take_piece(sender);
	sender->piece[index] = (struct piece) { start, length, -1 };
	if (last)
		last->next = index;
	else
		send->first = index;
	send->last = index;
}

/**
 * sender_add() - Put datagrams to one peer on the way
 * @sender:    Sender with room
 * @encap:     Their peer, flow and outer TOS; the FIB section lasts until sender_forget_peers()
 * @start:     Where they lie, until they are sent
 * @datagrams: How many
 * @length:    Bytes of all
 * @size:      Bytes of each but the last, SEND_BYTES at most
 */
void sender_add(struct sender *sender, const struct encap *encap, uint8_t *start, size_t datagrams,
		size_t length, size_t size)
{
	unsigned int index = socket_of(sender, encap->flow.hash);
	struct send_socket *socket = &sender->socket[index];

	sender->added |= BIT(index);
	while (datagrams) {
		size_t one = datagrams == 1 ? length : size;
		struct send *send = open_send(sender, socket, encap, datagrams, one);
		size_t count, bytes;

		if (!send)
			send = new_send(sender, socket, encap, one);
		count = send->most - send->datagrams;
		if (count > datagrams)
			count = datagrams;
		bytes = count == datagrams ? length : count * size;
		add_piece(sender, send, start, bytes);
		send->datagrams += (unsigned int)count;
		send->closed = send->datagrams == send->most || bytes != count * send->size;
		start += bytes;
		datagrams -= count;
		length -= bytes;
	}
}

/** sender_wait() - Wait until a socket that was full has room. Return: whether one has */
bool sender_wait(const struct sender *sender, int timeout_ms)
{
	struct pollfd full[SEND_SOCKETS_MAX];
	nfds_t count = 0;

	for (unsigned int i = 0; i < sender->sockets; i++) {
		if (sender->full & BIT(i))
			full[count++] = (struct pollfd) { sender->socket[i].fd, POLLOUT, 0 };
	}
	return poll(full, count, timeout_ms) > 0;
}

/** sender_left() - How many datagrams are not sent */
size_t sender_left(const struct sender *sender)
{
	size_t left = 0;

	for (unsigned int s = 0; s < sender->sockets; s++) {
		for (int i = sender->socket[s].first; i >= 0; i = sender->send[i].next)
			left += sender->send[i].datagrams - sender->send[i].sent;
	}
	return left;
}

/* Bytes of a send that are not out, without those that encapsulation pushes. */
static size_t bytes_left(const struct sender *sender, const struct send *send)
{
	return length_of(sender, send) - send->sent * send->size -
	       (send->datagrams - send->sent) * PUSH;
}

/**
 * sender_forget_peers() - Let the FIB section end while messages wait for room
 * @sender: What waits in it counts for its peers as sent, as later nobody knows whose it is
 */
void sender_forget_peers(struct sender *sender)
{
	for (unsigned int s = 0; s < sender->sockets; s++) {
		for (int i = sender->socket[s].first; i >= 0; i = sender->send[i].next) {
			struct send *send = &sender->send[i];

			if (send->peer)
				count_for_peer(send->peer, send->datagrams - send->sent,
					       bytes_left(sender, send));
			send->peer = NULL;
		}
	}
}

/**
 * sender_open() - Make a sender; the descriptors stay the caller's
 * @sender:    Zeroed
 * @io:        Sockets, and whether they segment
 * @epoll_fd:  Where sockets without room wait for it
 * @key:       Their key there
 * @counters:  To count into
 *
 * Return: 0, or an errno, EINVAL for a wrong number of sockets
 */
int sender_open(struct sender *sender, const struct fp_io *io, int epoll_fd, uint64_t key,
		struct fp_counters *counters)
{
	struct epoll_event event = { .events = EPOLLIN, .data.u64 = key };

	if (io->send_count < 1 || io->send_count > SEND_SOCKETS_MAX)
		return EINVAL;
	sender->counters = counters;
	sender->epoll_fd = epoll_fd;
	sender->key = key;
	sender->segment = io->segment;
	sender->sockets = (unsigned int)io->send_count;
	for (unsigned int i = 0; i < sender->sockets; i++) {
		sender->socket[i] =
			(struct send_socket) { .fd = io->send[i], .first = -1, .last = -1 };
		room_open(&sender->socket[i].room, io->send[i]);
	}
	for (int i = 0; i < PIECES; i++)
		sender->piece[i].next = i + 1 < PIECES ? i + 1 : -1;
	for (int i = 0; i < SENDS; i++)
		sender->send[i].next = i + 1 < SENDS ? i + 1 : -1;
	sender->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	if (sender->timer_fd < 0)
		return errno;
	if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, sender->timer_fd, &event)) {
		int err = errno;

		close(sender->timer_fd);
		return err;
	}
	return 0;
}

/** sender_close() - Free what sender_open() made */
void sender_close(struct sender *sender)
{
	for (unsigned int s = 0; s < sender->sockets; s++) {
		for (int i = sender->socket[s].first; i >= 0; i = sender->send[i].next)
			free(sender->send[i].parked);
	}
	close(sender->timer_fd);
}
