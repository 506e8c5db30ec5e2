/* SPDX-License-Identifier: Apache-2.0 */
#ifndef PYFLANNEL_ENCAP_H
#define PYFLANNEL_ENCAP_H

#include <netinet/in.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "context.h"
#include "gso.h"

#define TUN_QUEUES_MAX 64
#define SEND_SOCKETS_MAX 64
#define SENDS 128
#define PIECES 256

/* Keys of the epoll set: first TUN queues, then send sockets that are full, then what the worker
 * added.
 */
#define ENCAP_KEY_SOCKET TUN_QUEUES_MAX
#define ENCAP_KEY_RECEIVE (TUN_QUEUES_MAX + SEND_SOCKETS_MAX)
#define ENCAP_KEY_STOP (ENCAP_KEY_RECEIVE + 1)
#define ENCAP_KEYS (ENCAP_KEY_STOP + 1)

/* What a wait has found. */
enum { READY_ENCAP = 1, READY_RECEIVE = 2, READY_STOP = 4 };

/* Equal datagrams, and at most one shorter at the end, that lie in one piece of memory. */
struct piece {
	uint8_t *start;
	size_t length;
	int next; /* of the same send, or -1 */
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
	int next; /* of the same socket, or -1 */
};

struct send_socket {
	int fd;
	int first, last; /* its sends of this batch, in order; -1 for none */
	bool blocked;
};

struct tun_queue {
	int fd;
	uint64_t served; /* when, in batches */
	size_t headers, size; /* guess for the next super-packet; 0, 0: that there is none */
	unsigned int misses; /* packets since the last super-packet */
	uint64_t standing_since; /* not empty since then; 0: it was */
	uint64_t next_mark;
	unsigned int marks; /* since the queue was last empty */
};

/* The way from the TUN to the wire. One thread at a time is in it. */
struct encap_side {
	struct fp_ctx *ctx;
	struct fib_reader reader;
	bool registered; /* as a reader */
	int epoll_fd; /* -1 before encap_open() */
	unsigned int queues;
	struct tun_queue queue[TUN_QUEUES_MAX];
	struct tun_queue *next; /* ready, and served longest ago; or NULL */
	unsigned int sockets;
	struct send_socket socket[SEND_SOCKETS_MAX];
	unsigned int blocked; /* sockets that wait for room */
	bool segment;
	uint64_t batches;
	uint64_t now; /* at the begin of the batch, ns */
	uint8_t *arena;
	size_t used; /* of the arena */
	unsigned int pieces, sends;
	struct piece piece[PIECES];
	struct send send[SENDS];
	struct fp_counters counters;
};

int encap_open(struct encap_side *side, struct fp_ctx *ctx, const struct fp_io *io);
void encap_close(struct encap_side *side);
int encap_wait(struct encap_side *side, int timeout_ms);
int encap_turn(struct encap_side *side);
void encap_drain(struct encap_side *side, int timeout_ms);

#endif
