/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DOC: Who moves packets, and when
 *
 * A worker has three lanes (csrc/lane.c). Its sources, TUN queues and receive sockets, are in the
 * first, and that is turned
 *
 *  - by the caller's event loop: fp_worker_fd() is readable when fp_worker_turn() has work;
 *  - or by a thread of its own.
 *
 * With two threads the second has all receive sockets for good, in the third lane. With three, the
 * sources that carry the bulk are given away while they do: TUN queues to the second lane, receive
 * sockets to the third, a thread each. What is left in the first is little, so its thread has used
 * less than its share of the cores and runs as soon as a packet comes: a ping waits for no bulk
 * transfer, unless both are in one queue or socket. While there is little to do at all, one thread
 * does it, which saves wake-ups.
 *
 * The first thread gives away the source with most packets when it has slept for less than half of
 * WINDOW_NS; the others give back what had few in CALM_NS.
 *
 * A thread that is always sooner at a core than the load beside it works in small batches, which
 * one flow alone pays for and nobody gains from. So two threads are well raised, and only while
 * several flows are mixed: the first one when it has several, and the one that receives bulk when
 * they come by one socket, as one of them may be waiting behind the other's bulk.
 *
 * A thread that has had packets goes on polling for `poll_us` before it sleeps: the next packet
 * then costs no wake-up. Before each look whoever else wants the core has it, unless the thread is
 * realtime.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

#include "lane.h"

#define BATCHES_PER_TURN 4
#define NICE_MIN (-20)
#define NICE_STEPS 3 /* twice the share of a process at the daemon's own nice value */
#define MIXED_NICE_STEPS 8 /* six times the share */
#define MIXED_MS 100 /* flows are mixed for so long after they were seen to be */
#define WINDOW_NS (2 * 1000 * 1000)
#define CALM_NS (20 * 1000 * 1000)
#define CALM_MS 20
#define CALM_PACKETS 64
#define BEAT_MS 1000 /* a thread turns at least so often, to show that it can */
/* For all that was read, at the speed of the network card. */
#define DRAIN_NS (1000 * 1000 * 1000ULL)

/* What each lane has, beside one for all. */
enum { FIRST, BULK_ENCAP, BULK_DECAP, LANES };

/* A thread at work in a lane. */
struct shift {
	struct fp_worker *worker;
	struct lane *lane;
	pthread_t thread;
	uint64_t now; /* when its last turn ended; ns */
	uint64_t last; /* when it moved packets; ns */
	uint64_t idle; /* ns in waits, since it began */
	uint64_t mixed_ms; /* when flows were last seen to be mixed */
	bool is_mixed; /* and it is raised for that */
	_Atomic uint64_t turned_ms; /* when its present turn began */
};

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

/* Put every source into the first lane. Return: 0, or an errno */
static int add_sources(struct fp_worker *worker, const struct fp_io *io)
{
	int err = 0;

	for (unsigned int i = 0; i < worker->sources && !err; i++) {
		struct source *source = &worker->source[i];

		source->number = i;
		if (i < io->tun_count) {
			source->queue = &worker->queue[i];
			source->queue->fd = io->tun[i];
		} else {
			source->socket = &worker->socket[i - io->tun_count];
			receive_socket_init(source->socket, io->receive[i - io->tun_count]);
		}
		err = lane_add(&worker->lane[FIRST], source);
	}
	return err;
}

static int open_lanes(struct fp_worker *worker, const struct fp_io *io)
{
	int err = 0;

	if (io->tun_count < 1 || io->tun_count > TUN_QUEUES_MAX || io->receive_count < 1 ||
	    io->receive_count > RECEIVE_SOCKETS_MAX)
		return EINVAL;
	worker->sources = (unsigned int)(io->tun_count + io->receive_count);
	for (int i = 0; i < LANES && !err; i++)
		err = lane_open(&worker->lane[i], worker->ctx, io, worker->source, worker->sources);
	return err ? err : add_sources(worker, io);
}

/**
 * fp_worker_new() - Make a worker; the descriptors stay the caller's
 * @ctx: Context, which must outlive the worker
 * @io:  Descriptors and their offloads; copied
 *
 * Return: the worker, or NULL with errno set
 */
struct fp_worker *fp_worker_new(struct fp_ctx *ctx, const struct fp_io *io)
{
	struct fp_worker *worker = calloc(1, sizeof(*worker));
	int err;

	if (!worker)
		return NULL;
	worker->ctx = ctx;
	worker->poll_ns = (uint64_t)io->poll_us * 1000;
	worker->schedule = io->schedule;
	worker->nice = getpriority(PRIO_PROCESS, 0);
	for (int i = 0; i < LANES; i++)
		worker->lane[i].epoll_fd = -1;
	worker->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	worker->error_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	pthread_mutex_lock(&ctx->lock);
	worker->next = ctx->workers;
	ctx->workers = worker;
	pthread_mutex_unlock(&ctx->lock);
	err = worker->stop_fd < 0 || worker->error_fd < 0 ? errno : open_lanes(worker, io);
	if (!err)
		return worker;
	fp_worker_free(worker);
	errno = err;
	return NULL;
}

/* Send all that was read, as far as there is room in time. */
static void drain_lanes(struct fp_worker *worker)
{
	uint64_t deadline = now_ns() + DRAIN_NS;

	for (int i = 0; i < LANES; i++)
		lane_drain(&worker->lane[i], deadline);
}

static void close_fd(int fd)
{
	if (fd >= 0)
		close(fd);
}

/**
 * fp_worker_free() - Send what a worker holds and free it; its counters stay with the context
 * @worker: Worker without threads, in no turn
 */
void fp_worker_free(struct fp_worker *worker)
{
	struct fp_ctx *ctx = worker->ctx;

	assert(worker->started == 0);
	drain_lanes(worker);
	for (int i = 0; i < LANES; i++)
		encap_give_up(&worker->lane[i].encap);
	pthread_mutex_lock(&ctx->lock);
	for (struct fp_worker **link = &ctx->workers; *link; link = &(*link)->next) {
		if (*link == worker) {
			*link = worker->next;
			break;
		}
	}
	worker_add_counters(worker, &ctx->gone);
	pthread_mutex_unlock(&ctx->lock);
	for (int i = 0; i < LANES; i++)
		lane_close(&worker->lane[i]);
	close_fd(worker->stop_fd);
	close_fd(worker->error_fd);
	free(worker);
}

/**
 * fp_worker_fd() - The descriptor for the caller's event loop
 *
 * Return: one that is readable when a turn has work, or with threads, when one has failed
 */
int fp_worker_fd(const struct fp_worker *worker)
{
	return worker->threads ? worker->error_fd : worker->lane[FIRST].epoll_fd;
}

/**
 * fp_worker_error() - Why a thread has ended
 *
 * Return: 0 while none has, or EBADFD when the TUN device is gone
 */
int fp_worker_error(const struct fp_worker *worker)
{
	return worker->error;
}

/**
 * fp_worker_turn() - Do what is ready in both directions, a bounded amount, without blocking
 * @worker: Worker without threads
 *
 * Return: packets moved, or -EBADFD when the TUN device is gone
 */
int fp_worker_turn(struct fp_worker *worker)
{
	struct lane *lane = &worker->lane[FIRST];
	int total = 0;

	for (unsigned int i = 0; i < BATCHES_PER_TURN; i++) {
		int ready = lane_wait(lane, 0);
		int moved = ready < 0 ? ready : lane_turn(lane, 1);

		if (moved < 0)
			return moved;
		if (!ready)
			break;
		total += moved;
	}
	return total;
}

static void fail(struct fp_worker *worker, int err)
{
	worker->error = err;
	eventfd_write(worker->error_fd, 1);
}

/*
 * Run the calling thread (that is what 0 means on Linux) some nice steps above the daemon. Return:
 * 0, or -1 with errno set
 */
static int raise_thread(const struct fp_worker *worker, bool is_mixed)
{
	int raised = worker->nice - (is_mixed ? MIXED_NICE_STEPS : NICE_STEPS);

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

/* Raise the calling thread as its flows ask for. */
static void reschedule(struct shift *shift, uint64_t now_ms)
{
	const struct fp_worker *worker = shift->worker;
	bool is_mixed = shift->mixed_ms && now_ms - shift->mixed_ms < MIXED_MS;

	if (is_mixed == shift->is_mixed)
		return;
	shift->is_mixed = is_mixed;
	if (worker->schedule == FP_SCHEDULE_RAISED && !worker->schedule_error)
		raise_thread(worker, is_mixed);
}

/**
 * fp_worker_schedule_error() - Why a thread runs as any other
 *
 * Return: 0 when all run as wanted, or EPERM without CAP_SYS_NICE
 */
int fp_worker_schedule_error(const struct fp_worker *worker)
{
	return worker->schedule_error;
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

/* Whether sources change lanes. */
static bool is_adaptive(const struct fp_worker *worker)
{
	return worker->threads == LANES;
}

/* What the sources of the first lane have moved in a window. */
struct census {
	struct source *busiest; /* NULL: none has moved a packet */
	size_t most; /* packets of that one */
	unsigned int queues, sockets; /* that have moved any */
};

/* Take it, and begin to count anew. */
static struct census take_census(struct fp_worker *worker)
{
	struct census census = { 0 };

	for (unsigned int i = 0; i < worker->sources; i++) {
		struct source *source = &worker->source[i];

		if (!worker->lane[FIRST].has[i] || !source->packets)
			continue;
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

	if (census.queues > 1 || census.sockets > 1)
		shift->mixed_ms = now_ms;
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
		if (!err && is_adaptive(worker) && now - window >= WINDOW_NS) {
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
		int err = work(shift, is_adaptive(worker) && lane->held ? CALM_MS : BEAT_MS);
		uint64_t now = shift->now;

		if (!err && lane->stopped)
			return NULL;
		shift->mixed_ms = lane->decap.mixed_ms;
		reschedule(shift, lane->decap.received_ms);
		if (!err && is_adaptive(worker) && now - window >= CALM_NS) {
			err = give_back(worker, lane);
			window = now;
		}
		if (err) {
			fail(worker, err);
			return NULL;
		}
	}
}

/* Let the stop signal end every wait, or take it back. Return: 0, or an errno */
static int watch_stop(struct fp_worker *worker, int operation)
{
	struct epoll_event event = { .events = EPOLLIN, .data.u64 = KEY_STOP };

	for (int i = 0; i < LANES; i++) {
		worker->lane[i].stopped = false;
		if (epoll_ctl(worker->lane[i].epoll_fd, operation, worker->stop_fd, &event))
			return errno;
	}
	return 0;
}

static int start_thread(struct fp_worker *worker, int lane, const char *name)
{
	struct shift *shift = &worker->shift[worker->started];
	int err;

	*shift = (struct shift) { .worker = worker, .lane = &worker->lane[lane] };
	shift->turned_ms = now_ns() / 1000000;
	err = pthread_create(&shift->thread, NULL, lane == FIRST ? run_first : run_other, shift);
	if (!err) {
		pthread_setname_np(shift->thread, name);
		worker->started++;
	}
	return err;
}

static int start_threads(struct fp_worker *worker)
{
	int err = start_thread(worker, FIRST, worker->threads == 2 ? "fp-encap" : "fp-first");

	if (!err && worker->threads == 3)
		err = start_thread(worker, BULK_ENCAP, "fp-encap");
	if (!err && worker->threads >= 2)
		err = start_thread(worker, BULK_DECAP, "fp-decap");
	return err;
}

/* Move every receive socket out of the first lane. Return: 0, or an errno */
static int move_sockets(struct fp_worker *worker)
{
	int err = 0;

	for (unsigned int i = 0; i < worker->sources && !err; i++) {
		if (worker->source[i].socket)
			err = lane_move(&worker->lane[FIRST], &worker->lane[BULK_DECAP],
					&worker->source[i]);
	}
	return err;
}

/*
 * Have lanes read ahead where threads turn them and bulk stays: what waits cannot change hands, and
 * the caller's event loop is not told that it waits.
 */
static void choose_reading(struct fp_worker *worker)
{
	for (int i = 0; i < LANES; i++)
		worker->lane[i].encap.reads_ahead =
			worker->threads && (i != FIRST || !is_adaptive(worker));
}

/**
 * fp_worker_start() - Let threads turn the lanes; the caller does no turns meanwhile
 * @worker:  Worker without threads
 * @threads: 1 for both directions, 2 for one each, 3 for both and two that have the bulk
 *
 * Signals are blocked in the threads.
 *
 * Return: 0, or an errno
 */
int fp_worker_start(struct fp_worker *worker, int threads)
{
	sigset_t all, before;
	int err;

	assert(worker->threads == 0 && threads >= 1 && threads <= LANES);
	worker->threads = threads;
	err = watch_stop(worker, EPOLL_CTL_ADD);
	choose_reading(worker);
	if (!err && threads == 2)
		err = move_sockets(worker);
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &before);
	if (!err)
		err = start_threads(worker);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (err)
		fp_worker_stop(worker);
	return err;
}

/* Have every source in the first lane again. */
static void gather_sources(struct fp_worker *worker)
{
	for (int i = FIRST + 1; i < LANES; i++) {
		struct lane *lane = &worker->lane[i];

		for (unsigned int s = 0; s < worker->sources; s++) {
			if (lane->has[s])
				lane_move(lane, &worker->lane[FIRST], &worker->source[s]);
		}
	}
}

/**
 * fp_worker_stop() - End the threads behind their present batch
 *
 * Return: 0, or the errno with which one had ended
 */
int fp_worker_stop(struct fp_worker *worker)
{
	eventfd_t signals;

	eventfd_write(worker->stop_fd, 1);
	while (worker->started)
		pthread_join(worker->shift[--worker->started].thread, NULL);
	worker->threads = 0;
	eventfd_read(worker->stop_fd, &signals);
	watch_stop(worker, EPOLL_CTL_DEL);
	choose_reading(worker);
	drain_lanes(worker);
	gather_sources(worker);
	return worker->error;
}

/** fp_worker_threads() - How many threads move packets now; 0 when the caller's turns do */
int fp_worker_threads(const struct fp_worker *worker)
{
	if (!is_adaptive(worker))
		return worker->threads;
	return 1 + (worker->lane[BULK_ENCAP].held > 0) + (worker->lane[BULK_DECAP].held > 0);
}

/** fp_worker_silence_ms() - How long ago the thread that hangs longest began its turn; 0 without */
uint64_t fp_worker_silence_ms(const struct fp_worker *worker)
{
	uint64_t now = now_ns() / 1000000, oldest = now;

	for (unsigned int i = 0; i < worker->started; i++) {
		uint64_t turned = worker->shift[i].turned_ms;

		if (turned < oldest)
			oldest = turned;
	}
	return now - oldest;
}

static void add_counters(const struct fp_counters *counters, struct fp_counters *into)
{
	const uint64_t *from = (const uint64_t *)counters;
	uint64_t *sum = (uint64_t *)into;

	static_assert(sizeof(*into) % sizeof(*sum) == 0, "fp_counters holds counters only");
	for (size_t i = 0; i < sizeof(*into) / sizeof(*sum); i++)
		sum[i] += __atomic_load_n(from + i, __ATOMIC_RELAXED);
}

/** worker_add_counters() - Add a worker's counters to @into */
void worker_add_counters(const struct fp_worker *worker, struct fp_counters *into)
{
	for (int i = 0; i < LANES; i++) {
		add_counters(&worker->lane[i].encap.counters, into);
		add_counters(&worker->lane[i].decap.counters, into);
	}
}

/** worker_take_suspects() - Move up to @capacity samples out. Return: how many */
size_t worker_take_suspects(struct fp_worker *worker, struct fp_suspect *into, size_t capacity)
{
	size_t taken = 0;

	for (int i = 0; i < LANES; i++)
		taken +=
			decap_take_suspects(&worker->lane[i].decap, into + taken, capacity - taken);
	return taken;
}

/** worker_next() - The next worker of the same context, or NULL */
struct fp_worker *worker_next(const struct fp_worker *worker)
{
	return worker->next;
}
