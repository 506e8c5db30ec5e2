/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DOC: Who moves packets, and when
 *
 * A worker has two sides, TUN to wire (csrc/encap.c) and wire to TUN (csrc/decap.c). They are
 * turned in one of three ways:
 *
 *  - by the caller's event loop: fp_worker_fd() is readable when fp_worker_turn() has work;
 *  - by one thread for both, which saves wake-ups while there is little to do;
 *  - by two threads, one for each side, which is faster under load.
 *
 * Who turns the decap side has the receive socket in its epoll set, and it is in one set at a time.
 * So one thread at a time is in a side, and no flow is reordered when a side changes hands. In
 * adaptive mode the first thread hands the socket over when it has slept for less than an eighth of
 * WINDOW_NS, and the second hands it back when both together had less to do for LULL_NS than one
 * thread can do.
 *
 * A thread that is always sooner at a core than the load beside it works in small batches, which
 * one flow alone pays for and nobody gains from. So the second thread is well raised only while
 * several flows come in, and one of them may be waiting behind another's bulk.
 *
 * A thread that has had packets goes on polling for `poll_us` before it sleeps: the next packet
 * then costs no wake-up.
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

#include "decap.h"
#include "encap.h"

#define BATCHES_PER_TURN 4
#define NICE_MIN (-20)
#define NICE_STEPS 3 /* twice the share of a process at the daemon's own nice value */
#define MIXED_NICE_STEPS 8 /* six times the share */
#define MIXED_MS 100 /* flows are mixed for so long after a packet of another one */
#define WINDOW_NS (2 * 1000 * 1000)
#define LULL_NS (20 * 1000 * 1000)
#define LULL_MS 20
#define BEAT_MS 1000 /* a thread turns at least so often, to show that it can */
/* A full send buffer empties at the speed of the network card. */
#define DRAIN_MS 100

/* Keys of the second thread's epoll set. */
enum { KEY_RECEIVE, KEY_STOP };

/* A thread at work. */
struct shift {
	pthread_t thread;
	uint64_t last; /* when it moved packets; ns */
	_Atomic uint64_t turned_ms; /* when its present turn began */
	_Atomic uint64_t idle_ns; /* in waits that are over */
	_Atomic uint64_t waiting_since; /* ns; 0: it does not wait */
};

struct fp_worker {
	struct fp_ctx *ctx;
	struct fp_worker *next;
	int receive_set; /* epoll set of the second thread */
	int stop_fd; /* readable once threads are to end */
	int error_fd; /* readable once a thread has ended with an error */
	_Atomic int error;
	_Atomic int schedule_error;
	int schedule;
	int nice; /* of the daemon */
	uint64_t poll_ns;
	bool adaptive;
	_Atomic bool assisted; /* the second thread has the decap side */
	unsigned int threads;
	struct shift shift[2];
	struct encap_side encap;
	struct decap_side decap;
};

static int watch(int epoll_fd, int operation, int fd, uint64_t key)
{
	struct epoll_event event = { .events = EPOLLIN, .data.u64 = key };

	return epoll_ctl(epoll_fd, operation, fd, &event);
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
	worker->encap.epoll_fd = -1;
	worker->poll_ns = (uint64_t)io->poll_us * 1000;
	worker->schedule = io->schedule;
	worker->nice = getpriority(PRIO_PROCESS, 0);
	worker->receive_set = epoll_create1(EPOLL_CLOEXEC);
	worker->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	worker->error_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	pthread_mutex_lock(&ctx->lock);
	worker->next = ctx->workers;
	ctx->workers = worker;
	pthread_mutex_unlock(&ctx->lock);
	if (worker->receive_set < 0 || worker->stop_fd < 0 || worker->error_fd < 0) {
		err = errno;
		goto fail;
	}
	err = encap_open(&worker->encap, ctx, io);
	if (!err)
		err = decap_open(&worker->decap, ctx, io);
	if (!err && watch(worker->encap.epoll_fd, EPOLL_CTL_ADD, io->receive, ENCAP_KEY_RECEIVE))
		err = errno;
	if (err)
		goto fail;
	return worker;
fail:
	fp_worker_free(worker);
	errno = err;
	return NULL;
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

	assert(worker->threads == 0);
	if (worker->encap.sender.blocked)
		encap_drain(&worker->encap, DRAIN_MS);
	pthread_mutex_lock(&ctx->lock);
	for (struct fp_worker **link = &ctx->workers; *link; link = &(*link)->next) {
		if (*link == worker) {
			*link = worker->next;
			break;
		}
	}
	worker_add_counters(worker, &ctx->gone);
	pthread_mutex_unlock(&ctx->lock);
	encap_close(&worker->encap);
	decap_close(&worker->decap);
	close_fd(worker->receive_set);
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
	return worker->threads ? worker->error_fd : worker->encap.epoll_fd;
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

/* Do what was found to be ready. Return: packets read and messages received, or -EBADFD */
static int turn(struct fp_worker *worker, int ready)
{
	int received = ready & READY_RECEIVE ? decap_turn(&worker->decap, 1) : 0;
	int sent = encap_turn(&worker->encap);

	return sent < 0 ? sent : sent + received;
}

/**
 * fp_worker_turn() - Do what is ready in both directions, a bounded amount, without blocking
 * @worker: Worker without threads
 *
 * Return: packets read and messages received, or -EBADFD when the TUN device is gone
 */
int fp_worker_turn(struct fp_worker *worker)
{
	int total = 0;

	for (unsigned int i = 0; i < BATCHES_PER_TURN; i++) {
		int ready = encap_wait(&worker->encap, 0);
		int moved = ready < 0 ? ready : turn(worker, ready);

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

/* Run the calling thread (that is what 0 means on Linux) so many nice steps above the daemon. */
static int raise_by(const struct fp_worker *worker, int steps)
{
	int raised = worker->nice - steps;

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
		err = raise_by(worker, NICE_STEPS);
	if (err)
		worker->schedule_error = errno;
}

/* Raise the second thread, which calls, as what came in asks for. Return: whether that is mixed */
static bool reschedule(const struct fp_worker *worker, bool was_mixed)
{
	const struct decap_side *decap = &worker->decap;
	bool mixed = decap->received_ms - decap->mixed_ms < MIXED_MS;

	if (mixed != was_mixed && worker->schedule == FP_SCHEDULE_RAISED && !worker->schedule_error)
		raise_by(worker, mixed ? MIXED_NICE_STEPS : NICE_STEPS);
	return mixed;
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

/* The second thread's encap_wait(). */
static int receive_wait(const struct fp_worker *worker, int timeout_ms)
{
	struct epoll_event event[2];
	int count = epoll_wait(worker->receive_set, event, 2, timeout_ms);
	int ready = 0;

	for (int i = 0; i < count; i++)
		ready |= event[i].data.u64 == KEY_STOP ? READY_STOP : READY_RECEIVE;
	return ready;
}

/* Let a thread wait for work, awake at first if it had packets a moment ago. Return: READY_... */
static int rest(struct fp_worker *worker, unsigned int thread, int timeout_ms)
{
	struct shift *shift = &worker->shift[thread];
	uint64_t began = now_ns();
	uint64_t awake_until = shift->last + worker->poll_ns;
	int ready = 0;

	atomic_store_explicit(&shift->turned_ms, began / 1000000, memory_order_relaxed);
	atomic_store_explicit(&shift->waiting_since, began, memory_order_relaxed);
	while (!ready && worker->poll_ns && now_ns() < awake_until)
		ready = thread ? receive_wait(worker, 0) : encap_wait(&worker->encap, 0);
	if (!ready)
		ready = thread ? receive_wait(worker, timeout_ms)
			       : encap_wait(&worker->encap, timeout_ms);
	/* In this order, so that no wait counts twice for who reads both. */
	atomic_store_explicit(&shift->waiting_since, 0, memory_order_release);
	atomic_store_explicit(&shift->idle_ns, shift->idle_ns + now_ns() - began,
			      memory_order_release);
	return ready;
}

/* How long a thread has waited for work since it began. */
static uint64_t idle_ns(const struct shift *shift, uint64_t now)
{
	uint64_t idle = atomic_load_explicit(&shift->idle_ns, memory_order_acquire);
	uint64_t since = atomic_load_explicit(&shift->waiting_since, memory_order_acquire);

	return idle + (since && since < now ? now - since : 0);
}

/* Move the receive socket between the threads' epoll sets. Return: 0, or an errno */
static int move_receive(struct fp_worker *worker, int from_set, int to_set, uint64_t key)
{
	int receive = worker->decap.receive_fd;

	return watch(from_set, EPOLL_CTL_DEL, receive, 0) ||
			       watch(to_set, EPOLL_CTL_ADD, receive, key)
		       ? errno
		       : 0;
}

/*
 * Give the decap side to the second thread. Return: 0, or an errno
 *
 * The side counts as given once the socket has moved: the other thread gives it back when it sees
 * that, and the socket must be where it looks for it.
 */
static int hand_over(struct fp_worker *worker)
{
	int err = move_receive(worker, worker->encap.epoll_fd, worker->receive_set, KEY_RECEIVE);

	if (!err)
		worker->assisted = true;
	return err;
}

/* Give it back to the first, in the same order. */
static int hand_back(struct fp_worker *worker)
{
	int err = move_receive(worker, worker->receive_set, worker->encap.epoll_fd,
			       ENCAP_KEY_RECEIVE);

	if (!err)
		worker->assisted = false;
	return err;
}

/* The first thread: both sides, or the encap side while the second has the other. */
static void *run_first(void *arg)
{
	struct fp_worker *worker = arg;
	struct shift *shift = &worker->shift[0];
	uint64_t window = now_ns(), idle = shift->idle_ns;

	schedule(worker);
	for (;;) {
		int ready = rest(worker, 0, BEAT_MS);
		int moved = ready < 0 ? ready : turn(worker, ready);
		int err = moved < 0 ? -moved : 0;
		uint64_t now;

		if (!err && ready & READY_STOP)
			return NULL;
		now = now_ns();
		if (moved > 0)
			shift->last = now;
		if (now - window >= WINDOW_NS) {
			if (!err && worker->adaptive && !worker->assisted &&
			    shift->idle_ns - idle < (now - window) / 8)
				err = hand_over(worker);
			window = now;
			idle = shift->idle_ns;
		}
		if (err) {
			fail(worker, err);
			return NULL;
		}
	}
}

/* The second thread: the decap side, in adaptive mode while that pays. */
static void *run_second(void *arg)
{
	struct fp_worker *worker = arg;
	struct shift *shift = &worker->shift[1];
	uint64_t window = now_ns(), idle = 0;
	bool mixed = false;

	schedule(worker);
	for (;;) {
		bool called = worker->assisted;
		int ready = rest(worker, 1, called ? LULL_MS : BEAT_MS);
		int err = 0;
		uint64_t now, both;

		if (ready & READY_STOP)
			return NULL;
		if (ready & READY_RECEIVE) {
			decap_turn(&worker->decap, BATCHES_PER_TURN);
			mixed = reschedule(worker, mixed);
		}
		now = now_ns();
		if (ready)
			shift->last = now;
		if (!worker->adaptive || (called && now - window < LULL_NS))
			continue;
		both = idle_ns(&worker->shift[0], now) + shift->idle_ns;
		if (called && both - idle > (now - window) / 5 * 7)
			err = hand_back(worker);
		window = now;
		idle = both;
		if (err) {
			fail(worker, err);
			return NULL;
		}
	}
}

/* Let the stop signal end every wait, or take it back. */
static int watch_stop(struct fp_worker *worker, int operation)
{
	if (watch(worker->encap.epoll_fd, operation, worker->stop_fd, ENCAP_KEY_STOP) ||
	    watch(worker->receive_set, operation, worker->stop_fd, KEY_STOP))
		return errno;
	return 0;
}

static int start_thread(struct fp_worker *worker, void *(*run)(void *), const char *name)
{
	struct shift *shift = &worker->shift[worker->threads];
	int err;

	shift->turned_ms = now_ns() / 1000000;
	err = pthread_create(&shift->thread, NULL, run, worker);
	if (!err) {
		pthread_setname_np(shift->thread, name);
		worker->threads++;
	}
	return err;
}

/**
 * fp_worker_start() - Let threads turn the sides; the caller does no turns meanwhile
 * @worker:   Worker without threads
 * @threads:  1 for both sides, or 2
 * @adaptive: With 2: the second one only under load
 *
 * Signals are blocked in the threads.
 *
 * Return: 0, or an errno
 */
int fp_worker_start(struct fp_worker *worker, int threads, int adaptive)
{
	bool split = threads == 2 && !adaptive;
	sigset_t all, before;
	int err;

	assert(worker->threads == 0 && (threads == 1 || threads == 2));
	worker->adaptive = threads == 2 && adaptive;
	err = watch_stop(worker, EPOLL_CTL_ADD);
	if (!err && split)
		err = hand_over(worker);
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &before);
	if (!err)
		err = start_thread(worker, run_first, split ? "fp-encap" : "fp-both");
	if (!err && threads == 2)
		err = start_thread(worker, run_second, "fp-decap");
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (err)
		fp_worker_stop(worker);
	return err;
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
	while (worker->threads)
		pthread_join(worker->shift[--worker->threads].thread, NULL);
	eventfd_read(worker->stop_fd, &signals);
	watch_stop(worker, EPOLL_CTL_DEL);
	if (worker->assisted)
		hand_back(worker);
	return worker->error;
}

/** fp_worker_threads() - How many threads move packets now; 0 when the caller's turns do */
int fp_worker_threads(const struct fp_worker *worker)
{
	bool alone = worker->threads == 2 && worker->adaptive && !worker->assisted;

	return alone ? 1 : (int)worker->threads;
}

/** fp_worker_silence_ms() - How long ago the thread that hangs longest began its turn; 0 without */
uint64_t fp_worker_silence_ms(const struct fp_worker *worker)
{
	uint64_t now = now_ns() / 1000000, oldest = now;

	for (unsigned int i = 0; i < worker->threads; i++) {
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
	add_counters(&worker->encap.counters, into);
	add_counters(&worker->decap.counters, into);
}

/** worker_take_suspects() - Move up to @capacity samples out. Return: how many */
size_t worker_take_suspects(struct fp_worker *worker, struct fp_suspect *into, size_t capacity)
{
	return decap_take_suspects(&worker->decap, into, capacity);
}

/** worker_next() - The next worker of the same context, or NULL */
struct fp_worker *worker_next(const struct fp_worker *worker)
{
	return worker->next;
}
