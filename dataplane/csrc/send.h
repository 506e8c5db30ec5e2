/* SPDX-License-Identifier: Apache-2.0 */
#ifndef PYFLANNEL_SEND_H
#define PYFLANNEL_SEND_H

#include <sys/socket.h>

#include "verdict.h"
#include "room.h"

#define SEND_SOCKETS_MAX 64
#define SENDS 512
#define PIECES 1024
/* UDP_MAX_SEGMENTS of kernels before 6.9. */
#define DATAGRAMS_PER_SEND 64
/* Of one sender_add(): a full packet in segments of the smallest MSS that Linux sends (48)
 * makes 22. */
#define SENDS_PER_ADD 24
#define DATAGRAMS_PER_ADD ((SENDS_PER_ADD - 1) * DATAGRAMS_PER_SEND)
/* The longest UDP payload over IPv4. */
#define SEND_BYTES 65507

/* Equal datagrams, and at most one shorter at the end, that lie in one piece of memory. */
struct piece {
	uint8_t *start;
	size_t length;
	int next; /* of the same send, or of those free; or -1 */
};

/* One message: datagrams of one size for one peer. */
struct send {
	const struct fib_entry *peer; /* NULL once the FIB section has ended */
	struct sockaddr_storage to;
	socklen_t to_length;
	uint8_t tos;
	bool closed; /* takes no more: it is full, or ends in a shorter datagram */
	bool split; /* its datagrams are sent one by one */
	size_t size; /* of each datagram but the last */
	unsigned int datagrams;
	unsigned int most; /* datagrams that it may have */
	unsigned int sent; /* of @datagrams, when it is split */
	int first, last; /* pieces */
	uint8_t *parked; /* memory of its own, or NULL */
	int next; /* of the same socket, or of those free; or -1 */
};

struct send_socket {
	int fd;
	int first, last; /* its sends, in order; -1 for none */
	uint64_t full_at; /* when it was last full, ns */
	struct room room;
};

/* Messages that are not sent yet. One thread at a time is in it. */
struct sender {
	struct fp_counters *counters;
	int epoll_fd;
	uint64_t key; /* of full sockets in @epoll_fd, and of @timer_fd */
	int timer_fd; /* readable once a socket is full for long */
	unsigned int sockets;
	struct send_socket socket[SEND_SOCKETS_MAX];
	uint64_t full; /* sockets that wait for room, a bit each */
	uint64_t added; /* sockets that had something added since sender_begin() */
	uint64_t slow_at; /* when one was last full for a link that is busy, ns */
	bool segment;
	unsigned int pieces, sends; /* in use */
	int free_piece, free_send; /* -1 for none */
	struct piece piece[PIECES];
	struct send send[SENDS];
};

/* Whether one sender_add() more may be called. */
static inline bool sender_has_room(const struct sender *sender)
{
	return sender->sends <= SENDS - SENDS_PER_ADD && sender->pieces <= PIECES - SENDS_PER_ADD;
}

int sender_open(struct sender *sender, const struct fp_io *io, int epoll_fd, uint64_t key,
		struct fp_counters *counters);
void sender_close(struct sender *sender);
void sender_add(struct sender *sender, const struct encap *encap, uint8_t *start, size_t datagrams,
		size_t length, size_t size);
void sender_begin(struct sender *sender);
void sender_flush(struct sender *sender);
void sender_flush_full(struct sender *sender);
bool sender_is_full(const struct sender *sender, uint32_t flow);
bool sender_park(struct sender *sender);
bool sender_wait(const struct sender *sender, int timeout_ms);
size_t sender_left(const struct sender *sender);
void sender_forget_peers(struct sender *sender);

#endif
