/* SPDX-License-Identifier: Apache-2.0 */
#ifndef PYFLANNEL_ENCAP_H
#define PYFLANNEL_ENCAP_H

#include "backlog.h"
#include "gso.h"
#include "send.h"

/* A TUN queue. */
struct tun_queue {
	int fd;
	uint64_t served; /* when, ns */
	size_t headers, size; /* guess for the next super-packet; 0, 0: that there is none */
	unsigned int misses; /* packets since the last super-packet */
	uint64_t standing_since; /* not empty since then; 0: it was */
	uint64_t next_mark;
	unsigned int marks; /* since the queue was last empty */
	uint32_t flow; /* hash of the last packet's */
	uint64_t mixed; /* when one that is not bulk last came behind what stood, ns */
	unsigned int waiting; /* packets that were read and wait for their turn */
	uint64_t full; /* sockets that hold packets of it until they have room, a bit each */
	bool starved; /* there was no room to read it to */
};

/* The way from the TUN to the wire. One thread at a time is in it. */
struct encap_side {
	struct fp_ctx *ctx;
	struct fib_reader reader;
	bool registered; /* as a reader */
	uint64_t now; /* at the begin of the batch, ns */
	uint64_t bulk_ms; /* when a super-packet was read last */
	bool reads_ahead; /* where flows are mixed */
	struct backlog backlog;
	struct sender sender;
	struct fp_counters counters;
};

int encap_open(struct encap_side *side, struct fp_ctx *ctx, const struct fp_io *io, int epoll_fd,
	       uint64_t key);
void encap_close(struct encap_side *side);
void encap_flush_full(struct encap_side *side);
int encap_turn(struct encap_side *side, struct tun_queue *queue);
bool encap_drain(struct encap_side *side, uint64_t deadline);
void encap_give_up(struct encap_side *side);

/* Whether a packet that was read ahead can be sent. */
static inline bool encap_can_send_waiting(const struct encap_side *side)
{
	return side->backlog.count &&
	       !sender_is_full(&side->sender, backlog_first(&side->backlog)->flow);
}

/* Full sockets were flushed: a queue waits for those that are not through with it. */
static inline void encap_go_on(const struct encap_side *side, struct tun_queue *queue)
{
	queue->full &= side->sender.full;
	queue->starved = false;
}

/* Whether a queue is not to be read, as sockets are full. */
static inline bool encap_must_wait(const struct encap_side *side, const struct tun_queue *queue)
{
	return (queue->full & side->sender.full) || queue->starved ||
	       (queue->waiting && !encap_can_send_waiting(side));
}

#endif
