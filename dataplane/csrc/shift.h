/* SPDX-License-Identifier: Apache-2.0 */
#ifndef PYFLANNEL_SHIFT_H
#define PYFLANNEL_SHIFT_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#define NICE_MIN (-20)
#define NICE_STEPS 3 /* twice the share of a process at the daemon's own nice value */
#define BOOSTED_NICE_STEPS 8 /* six times the share */

struct fp_worker;
struct lane;

/* A thread at work in a lane. */
struct shift {
	struct fp_worker *worker;
	struct lane *lane;
	pthread_t thread;
	uint64_t now; /* when its last turn ended; ns */
	uint64_t last; /* when it moved packets; ns */
	uint64_t idle; /* ns in waits, since it began */
	uint64_t boost_ms; /* when it last had what it is well raised for */
	bool is_boosted; /* it is well raised */
	_Atomic uint64_t turned_ms; /* when its present turn began */
};

int shift_start(struct shift *shift, struct fp_worker *worker, struct lane *lane, const char *name);

#endif
