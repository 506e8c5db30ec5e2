/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DOC: A thread at work in a lane
 *
 * The first thread gives away the source with most packets when it has slept for less than half of
 * WINDOW_NS; the others give back what had few in CALM_NS.
 *
 * A thread that is always sooner at a core than the load beside it works in small batches. That
 * costs many small packets most, and one flow alone gains nothing from it. So the first thread is
 * well raised only while it has several flows and little of each, as a ping beside bulk may be one
 * of them; the others only while they carry super-packets, which move faster so (bench/README.md).
 *
 * A thread that has had packets goes on polling for `poll_us` before it sleeps: the next packet
 * then costs no wake-up. Before each look whoever else wants the core has it, unless the thread is
 * realtime.
 */
#define _GNU_SOURCE
#include "shift.h"

#include <errno.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/resource.h>

#include "worker.h"

#define BOOST_MS 100 /* a thread stays well raised for so long */
#define WINDOW_NS (2 * 1000 * 1000)
#define LIGHT_PACKETS 64 /* in a window; above, they are a load themselves */
#define CALM_NS (20 * 1000 * 1000)
#define CALM_MS 20
#define CALM_PACKETS 64
#define BEAT_MS 1000 /* a thread turns at least so often, to show that it can */

static void fail(struct fp_worker *worker, int err)
{
	worker->error = err;
	eventfd_write(worker->error_fd, 1);
}

/*
 * Run the calling thread (that is what 0 means on Linux) some nice steps above the daemon. Return:
 * 0, or -1 with errno set
 */
static int raise_thread(const struct fp_worker *worker, bool is_boosted)
{
	int raised = worker->nice - (is_boosted ? BOOSTED_NICE_STEPS : NICE_STEPS);

	return setpriority(PRIO_PROCESS, 0, raised < NICE_MIN ? NICE_MIN : raised);
}

/* Give the calling thread the schedule of @worker; without the right to it stays as it is. */
static void schedule(struct fp_worker *worker)
{
	struct sched_param realtime = { .sched_priority = 1 };
	int err = 0;

	if (worker->schedule == FP_SCHEDULE_REALTIME)
		err = sched_setscheduler(0, SCHED_RR, &realtime);
	else if (worker->schedule == FP_SCHEDULE_RAISED)
		err = raise_thread(worker, false);
	if (err)
		worker->schedule_error = errno;
}

/* Raise the calling thread as what it has asks for. */
static void reschedule(struct shift *shift, uint64_t now_ms)
{
	const struct fp_worker *worker = shift->worker;
	bool is_boosted = shift->boost_ms && now_ms - shift->boost_ms < BOOST_MS;

	if (is_boosted == shift->is_boosted)
		return;
	shift->is_boosted = is_boosted;
	if (worker->schedule == FP_SCHEDULE_RAISED && !worker->schedule_error)
		raise_thread(worker, is_boosted);
}

/* Wait for work, awake at first if there were packets a moment ago. Return: as lane_wait() */
static int rest(struct shift *shift, int timeout_ms)
{
	uint64_t began = now_ns();
	uint64_t poll_ns = shift->worker->poll_ns;
	int ready = 0;

	atomic_store_explicit(&shift->turned_ms, began / 1000000, memory_order_relaxed);
	while (!ready && poll_ns && now_ns() < shift->last + poll_ns) {
		sched_yield();
		ready = lane_wait(shift->lane, 0);
	}
	if (!ready)
		ready = lane_wait(shift->lane, timeout_ms);
	shift->idle += now_ns() - began;
	return ready;
}

/* One turn of a thread. Return: 0, or an errno */
static int work(struct shift *shift, int timeout_ms)
{
	int ready = rest(shift, timeout_ms);
	int moved = ready < 0 ? ready : lane_turn(shift->lane, BATCHES_PER_TURN);

	shift->now = now_ns();
	if (moved > 0)
		shift->last = shift->now;
	return moved < 0 ? -moved : 0;
}

/* What the sources of the first lane have moved in a window. */
struct census {
	struct source *busiest; /* NULL: none has moved a packet */
	size_t most; /* packets of that one */
	unsigned int queues, sockets; /* that have moved any */
	size_t packets; /* of all */
};

/* Take it, and begin to count anew. */
static struct census take_census(struct fp_worker *worker)
{
	struct census census = { 0 };

	for (unsigned int i = 0; i < worker->sources; i++) {
		struct source *source = &worker->source[i];

		if (!worker->lane[FIRST].has[i] || !source->packets)
			continue;
		census.packets += source->packets;
		if (source->queue)
			census.queues++;
		else
			census.sockets++;
		if (source->packets > census.most) {
			census.most = source->packets;
			census.busiest = source;
		}
		source->packets = 0;
	}
	return census;
}

/* A window of the first lane has ended, and it was busy or not. Return: 0, or an errno */
static int end_window(struct shift *shift, bool is_busy)
{
	struct fp_worker *worker = shift->worker;
	struct census census = take_census(worker);
	uint64_t now_ms = shift->now / 1000000;

	if (census.packets < LIGHT_PACKETS && (census.queues > 1 || census.sockets > 1))
		shift->boost_ms = now_ms;
	reschedule(shift, now_ms);
	if (!is_busy || !census.busiest)
		return 0;
	return lane_move(shift->lane,
			 &worker->lane[census.busiest->queue ? BULK_ENCAP : BULK_DECAP],
			 census.busiest);
}

/* The thread of the first lane. */
static void *run_first(void *arg)
{
	struct shift *shift = arg;
	struct fp_worker *worker = shift->worker;
	uint64_t window = now_ns(), idle = 0;

	schedule(worker);
	for (;;) {
		int err = work(shift, BEAT_MS);
		uint64_t now = shift->now;

		if (!err && shift->lane->stopped)
			return NULL;
		if (!err && worker_is_adaptive(worker) && now - window >= WINDOW_NS) {
			err = end_window(shift, shift->idle - idle < (now - window) / 2);
			window = now;
			idle = shift->idle;
		}
		if (err) {
			fail(worker, err);
			return NULL;
		}
	}
}

/* Give back to the first lane what had few packets since the last call. Return: 0, or an errno */
static int give_back(struct fp_worker *worker, struct lane *lane)
{
	int err = 0;

	for (unsigned int i = 0; i < worker->sources && !err; i++) {
		struct source *source = &worker->source[i];
		bool is_calm;

		if (!lane->has[i])
			continue;
		is_calm = source->packets < CALM_PACKETS;
		source->packets = 0;
		if (is_calm)
			err = lane_move(lane, &worker->lane[FIRST], source);
	}
	return err;
}

/* The thread of another lane. */
static void *run_other(void *arg)
{
	struct shift *shift = arg;
	struct fp_worker *worker = shift->worker;
	struct lane *lane = shift->lane;
	uint64_t window = now_ns();

	schedule(worker);
	for (;;) {
		int err = work(shift, worker_is_adaptive(worker) && lane->held ? CALM_MS : BEAT_MS);
		uint64_t now = shift->now;

		if (!err && lane->stopped)
			return NULL;
		shift->boost_ms = lane->encap.bulk_ms > lane->decap.bulk_ms ? lane->encap.bulk_ms
									    : lane->decap.bulk_ms;
		reschedule(shift, now / 1000000);
		if (!err && worker_is_adaptive(worker) && now - window >= CALM_NS) {
			err = give_back(worker, lane);
			window = now;
		}
		if (err) {
			fail(worker, err);
			return NULL;
		}
	}
}

/**
 * shift_start() - Start a thread
 * @shift:  Its own
 * @worker: That it works for
 * @lane:   Of the worker, in which no other thread is
 * @name:   Of the thread, for the operator
 *
 * Return: 0, or an errno
 */
int shift_start(struct shift *shift, struct fp_worker *worker, struct lane *lane, const char *name)
{
	bool is_first = lane == &worker->lane[FIRST];
	int err;

	*shift = (struct shift) { .worker = worker, .lane = lane, .turned_ms = now_ns() / 1000000 };
	err = pthread_create(&shift->thread, NULL, is_first ? run_first : run_other, shift);
	if (!err)
		pthread_setname_np(shift->thread, name);
	return err;
}
