/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One VNI of one daemon: what the packet checks and the I/O share.
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

#endif
