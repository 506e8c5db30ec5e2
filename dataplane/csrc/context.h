/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the packet checks in _fastpath.c and the I/O in csrc/worker.c share.
 */
#ifndef PYFLANNEL_CONTEXT_H
#define PYFLANNEL_CONTEXT_H

#include <pthread.h>
#include <time.h>

#include "_fastpath.h"
#include "fib.h"
#include "flow.h"

#define CACHE_LINE 64 /* bytes, on most machines; a matter of speed only */

struct fp_ctx {
	struct fp_config config;
	struct inet_address network;
	struct fib *fib;
	struct fib_reader caller; /* Python's own look-ups */
	pthread_mutex_t lock; /* guards @caller, @workers and @gone */
	struct fp_worker *workers;
	struct fp_counters gone; /* counters of freed workers */
};

static inline uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* Single writer (the worker), read by anyone: relaxed is enough, no add is lost. */
static inline void count_up(uint64_t *counter, uint64_t by)
{
	__atomic_store_n(counter, *counter + by, __ATOMIC_RELAXED);
}

/* CLOCK_MONOTONIC to a few milliseconds, for as much as reading a variable. */
static inline uint64_t coarse_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
	return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static inline void traffic_add(_Atomic uint64_t *counter, uint64_t by)
{
	atomic_fetch_add_explicit(counter, by, memory_order_relaxed);
}

/* What decapsulation made of a datagram. */
struct decap {
	int drop; /* enum fp_drop, or -1: pass the packet on */
	int spoofed; /* enum fp_drop that mode `log` lets pass, or -1 */
	uint8_t *packet;
	const struct fib_entry *sender; /* NULL when unknown and let pass */
	struct flow flow; /* of the inner packet, once that was parsed; before, no source */
	uint8_t mac[ETH_ALEN]; /* once the frame was seen to have one */
};

/* The last answers of the FIB about senders; empty at the begin of each FIB section. */
struct sender_cache {
	const struct fib_entry *sender; /* of @outer_source and @mac; NULL: no answer yet */
	const struct fib_entry *owner; /* of @inner_source; NULL: no answer yet */
	struct inet_address outer_source;
	struct inet_address inner_source;
	uint8_t mac[ETH_ALEN];
};

/* What encapsulation made of a packet. */
struct encap {
	int drop;
	struct flow flow;
	uint8_t outer_tos;
	const struct fib_entry *peer;
};

void decap_datagram(const struct fp_ctx *ctx, struct sender_cache *cache, uint8_t *datagram,
		    size_t length, const struct inet_address *outer_source, uint8_t outer_tos,
		    struct decap *out);
void encap_packet(const struct fp_ctx *ctx, const uint8_t *packet, size_t length,
		  struct encap *out);

void worker_add_counters(const struct fp_worker *worker, struct fp_counters *into);
size_t worker_take_suspects(struct fp_worker *worker, struct fp_suspect *into, size_t capacity);
struct fp_worker *worker_next(const struct fp_worker *worker);

#endif
