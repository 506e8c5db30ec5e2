/* SPDX-License-Identifier: Apache-2.0 */
#ifndef PYFLANNEL_ENCAP_H
#define PYFLANNEL_ENCAP_H

#include "context.h"
#include "gso.h"
#include "send.h"

#define TUN_QUEUES_MAX 64

/* Keys of the epoll set: first TUN queues, then send sockets that are full, then what the worker
 * added.
 */
#define ENCAP_KEY_SOCKET TUN_QUEUES_MAX
#define ENCAP_KEY_RECEIVE (TUN_QUEUES_MAX + SEND_SOCKETS_MAX)
#define ENCAP_KEY_STOP (ENCAP_KEY_RECEIVE + 1)
#define ENCAP_KEYS (ENCAP_KEY_STOP + 1)

/* What a wait has found. */
enum { READY_ENCAP = 1, READY_RECEIVE = 2, READY_STOP = 4 };

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
	bool muted; /* the queues, while a socket waits for room */
	uint64_t batches;
	uint64_t now; /* at the begin of the batch, ns */
	uint8_t *arena;
	size_t used; /* of the arena */
	struct sender sender;
	struct fp_counters counters;
};

int encap_open(struct encap_side *side, struct fp_ctx *ctx, const struct fp_io *io);
void encap_close(struct encap_side *side);
int encap_wait(struct encap_side *side, int timeout_ms);
int encap_turn(struct encap_side *side);
void encap_drain(struct encap_side *side, int timeout_ms);

#endif
