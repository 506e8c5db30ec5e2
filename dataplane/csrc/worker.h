/* SPDX-License-Identifier: Apache-2.0 */
#ifndef PYFLANNEL_WORKER_H
#define PYFLANNEL_WORKER_H

#include "lane.h"
#include "shift.h"

#define BATCHES_PER_TURN 4

/* What each lane has, beside one for all. */
enum { FIRST, BULK_ENCAP, BULK_DECAP, LANES };

struct fp_worker {
	struct fp_ctx *ctx;
	struct fp_worker *next;
	int stop_fd; /* readable once threads are to end */
	int error_fd; /* readable once a thread has ended with an error */
	_Atomic int error;
	_Atomic int schedule_error;
	int schedule;
	int nice; /* of the daemon */
	uint64_t poll_ns;
	int threads; /* that it is to have */
	unsigned int started;
	struct shift shift[LANES];
	struct lane lane[LANES];
	unsigned int sources;
	struct source source[SOURCES_MAX];
	struct tun_queue queue[TUN_QUEUES_MAX];
	struct receive_socket socket[RECEIVE_SOCKETS_MAX];
};

/* Whether sources change lanes. */
static inline bool worker_is_adaptive(const struct fp_worker *worker)
{
	return worker->threads == LANES;
}

void worker_add_counters(const struct fp_worker *worker, struct fp_counters *into);
size_t worker_take_suspects(struct fp_worker *worker, struct fp_suspect *into, size_t capacity);
struct fp_worker *worker_next(const struct fp_worker *worker);

#endif
