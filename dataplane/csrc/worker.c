/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DOC: Who moves packets, and when
 *
 * A worker has two sides, TUN to wire (csrc/encap.c) and wire to TUN (csrc/decap.c), each with an
 * epoll set of its own. They are turned in one of three ways:
 *
 *  - by the caller's event loop: fp_worker_fd() is readable when fp_worker_turn() has work;
 *  - by one thread for both, which saves wake-ups while there is little to do;
 *  - by two threads, one for each side, which is faster under load.
 *
 * In adaptive mode the first thread calls the second in after it has been busy for BUSY_NS without
 * a pause, and the second gives its side back when it had less than LULL_PACKETS in LULL_NS. A side
 * changes hands between two batches, so at any time one thread is in it and no flow is reordered.
 *
 * A thread that has had packets goes on polling for `poll_us` before it sleeps: the next packet
 * then costs no wake-up.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "decap.h"
#include "encap.h"

#define BATCHES_PER_TURN 4
#define NICE_RAISED (-20)
#define SLICE_NS (100 * 1000)
#define BUSY_NS (1000 * 1000)
#define LULL_NS (20 * 1000 * 1000)
#define LULL_PACKETS 256
#define LULL_MS 20
#define BEAT_MS 1000 /* a thread turns at least so often, to show that it can */
/* A full send buffer empties at the speed of the network card. */
#define DRAIN_MS 100

/* Keys of the epoll set over both sides. */
enum { KEY_ENCAP, KEY_DECAP, KEY_STOP };

struct fp_worker {
	struct fp_ctx *ctx;
	struct fp_worker *next;
	int epoll_fd; /* both sides; what an event loop or a thread for both waits on */
	int stop_fd; /* readable once threads are to end */
	int error_fd; /* readable once a thread has ended with an error */
	_Atomic int error;
	_Atomic int schedule_error;
	int schedule;
	uint64_t poll_ns;
	bool adaptive;
	unsigned int threads;
	pthread_t thread[2];
	_Atomic uint64_t turned_ms[2]; /* when each thread began its present turn */
	_Atomic bool assisted; /* the second thread has the decap side */
	int assist_fd; /* readable: the second thread is called in */
	struct encap_side encap;
	struct decap_side decap;
};

static int watch(int epoll_fd, int operation, int fd, uint32_t events, uint64_t key)
{
	struct epoll_event event = { .events = events, .data.u64 = key };

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
	worker->encap.epoll_fd = worker->decap.epoll_fd = -1;
	worker->poll_ns = (uint64_t)io->poll_us * 1000;
	worker->schedule = io->schedule;
	worker->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	worker->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	worker->error_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	worker->assist_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	pthread_mutex_lock(&ctx->lock);
	worker->next = ctx->workers;
	ctx->workers = worker;
	pthread_mutex_unlock(&ctx->lock);
	if (worker->epoll_fd < 0 || worker->stop_fd < 0 || worker->error_fd < 0 ||
	    worker->assist_fd < 0) {
		err = errno;
		goto fail;
	}
	err = encap_open(&worker->encap, ctx, io);
	if (!err)
		err = decap_open(&worker->decap, ctx, io);
	if (err)
		goto fail;
	if (watch(worker->epoll_fd, EPOLL_CTL_ADD, worker->encap.epoll_fd, EPOLLIN, KEY_ENCAP) ||
	    watch(worker->epoll_fd, EPOLL_CTL_ADD, worker->decap.epoll_fd, EPOLLIN, KEY_DECAP)) {
		err = errno;
		goto fail;
	}
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
	if (worker->encap.blocked)
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
	close_fd(worker->epoll_fd);
	close_fd(worker->stop_fd);
	close_fd(worker->error_fd);
	close_fd(worker->assist_fd);
	free(worker);
}

/**
 * fp_worker_fd() - The descriptor for the caller's event loop
 *
 * Return: one that is readable when a turn has work, or with threads, when one has failed
 */
int fp_worker_fd(const struct fp_worker *worker)
{
	return worker->threads ? worker->error_fd : worker->epoll_fd;
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
 * Return: packets read and messages received, or -EBADFD when the TUN device is gone
 */
int fp_worker_turn(struct fp_worker *worker)
{
	int received = decap_turn(&worker->decap, BATCHES_PER_TURN);
	int sent = encap_turn(&worker->encap, BATCHES_PER_TURN);

	return sent < 0 ? sent : sent + received;
}

static void fail(struct fp_worker *worker, int err)
{
	worker->error = err;
	eventfd_write(worker->error_fd, 1);
}

/* linux/sched/types.h, which libc does not have everywhere. */
struct sched_attributes {
	uint32_t size;
	uint32_t policy;
	uint64_t flags;
	int32_t nice;
	uint32_t priority;
	uint64_t runtime; /* of SCHED_OTHER: the slice, from Linux 6.12 on */
	uint64_t deadline;
	uint64_t period;
};

/* Give the calling thread the schedule of @worker; without the right to it stays as it is. */
static void schedule(struct fp_worker *worker)
{
	struct sched_attributes raised = { .size = sizeof(raised),
					   .policy = SCHED_OTHER,
					   .nice = NICE_RAISED,
					   .runtime = SLICE_NS };
	struct sched_attributes realtime = { .size = sizeof(realtime),
					     .policy = SCHED_RR,
					     .priority = 1 };
	void *attributes = worker->schedule == FP_SCHEDULE_RAISED ? &raised : &realtime;

	if (worker->schedule != FP_SCHEDULE_NORMAL && syscall(SYS_sched_setattr, 0, attributes, 0))
		worker->schedule_error = errno;
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

/* Wait for @epoll_fd, after polling it if packets came a moment ago. Return: as epoll_wait() */
static int wait_for(const struct fp_worker *worker, int epoll_fd, uint64_t last, int timeout_ms,
		    struct epoll_event *event)
{
	int ready;

	do
		ready = epoll_wait(epoll_fd, event, 1, 0);
	while (ready == 0 && worker->poll_ns && now_ns() - last < worker->poll_ns);
	if (ready == 0)
		ready = epoll_wait(epoll_fd, event, 1, timeout_ms);
	return ready;
}

/* Hand the decap side to the second thread. */
static void call_assistant(struct fp_worker *worker)
{
	watch(worker->epoll_fd, EPOLL_CTL_MOD, worker->decap.epoll_fd, 0, KEY_DECAP);
	worker->assisted = true;
	eventfd_write(worker->assist_fd, 1);
}

static void beat(struct fp_worker *worker, unsigned int thread)
{
	atomic_store_explicit(&worker->turned_ms[thread], coarse_ms(), memory_order_relaxed);
}

static void *run_both(void *arg)
{
	struct fp_worker *worker = arg;
	uint64_t last = 0, busy_since = now_ns();

	schedule(worker);
	for (;;) {
		struct epoll_event event = { 0 };
		int moved = 0;

		beat(worker, 0);
		/* Nothing ready at once is the pause that ends a busy time. */
		if (epoll_wait(worker->epoll_fd, &event, 1, 0) == 0) {
			wait_for(worker, worker->epoll_fd, last, BEAT_MS, &event);
			busy_since = now_ns();
		}
		if (event.data.u64 == KEY_STOP)
			return NULL;
		if (!worker->assisted)
			moved = decap_turn(&worker->decap, 1);
		int sent = encap_turn(&worker->encap, 1);

		if (sent < 0) {
			fail(worker, -sent);
			return NULL;
		}
		if (sent + moved > 0 && (worker->poll_ns || worker->adaptive))
			last = now_ns();
		if (worker->adaptive && !worker->assisted && last > busy_since + BUSY_NS)
			call_assistant(worker);
	}
}

static void *run_encap(void *arg)
{
	struct fp_worker *worker = arg;
	uint64_t last = 0;

	schedule(worker);
	for (;;) {
		struct epoll_event event = { 0 };

		beat(worker, 0);
		if (wait_for(worker, worker->encap.epoll_fd, last, BEAT_MS, &event) > 0 &&
		    event.data.u64 == ENCAP_KEY_STOP)
			return NULL;
		int sent = encap_turn(&worker->encap, BATCHES_PER_TURN);

		if (sent < 0) {
			fail(worker, -sent);
			return NULL;
		}
		if (sent && worker->poll_ns)
			last = now_ns();
	}
}

static void *run_decap(void *arg)
{
	struct fp_worker *worker = arg;
	uint64_t last = 0;

	schedule(worker);
	for (;;) {
		struct epoll_event event = { 0 };

		beat(worker, 1);
		if (wait_for(worker, worker->decap.epoll_fd, last, BEAT_MS, &event) > 0 &&
		    event.data.u64 == DECAP_KEY_STOP)
			return NULL;
		if (decap_turn(&worker->decap, BATCHES_PER_TURN) && worker->poll_ns)
			last = now_ns();
	}
}

/* Serve the decap side until there is a lull. Return: whether to go on waiting for calls */
static bool assist(struct fp_worker *worker)
{
	uint64_t began = now_ns(), last = 0;
	uint64_t packets = worker->decap.counters.traffic.decap_packets;

	for (;;) {
		struct epoll_event event = { 0 };
		uint64_t now;

		beat(worker, 1);
		if (wait_for(worker, worker->decap.epoll_fd, last, LULL_MS, &event) > 0 &&
		    event.data.u64 == DECAP_KEY_STOP)
			return false;
		decap_turn(&worker->decap, BATCHES_PER_TURN);
		now = last = now_ns();
		if (now - began < LULL_NS)
			continue;
		if (worker->decap.counters.traffic.decap_packets - packets < LULL_PACKETS) {
			/* In this order: the first thread may call again as soon as it has it. */
			watch(worker->epoll_fd, EPOLL_CTL_MOD, worker->decap.epoll_fd, EPOLLIN,
			      KEY_DECAP);
			worker->assisted = false;
			return true;
		}
		began = now;
		packets = worker->decap.counters.traffic.decap_packets;
	}
}

static void *run_assistant(void *arg)
{
	struct fp_worker *worker = arg;
	int epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	struct epoll_event event;
	eventfd_t calls;

	if (epoll_fd < 0 || watch(epoll_fd, EPOLL_CTL_ADD, worker->assist_fd, EPOLLIN, KEY_DECAP) ||
	    watch(epoll_fd, EPOLL_CTL_ADD, worker->stop_fd, EPOLLIN, KEY_STOP)) {
		fail(worker, errno);
		close_fd(epoll_fd);
		return NULL;
	}
	schedule(worker);
	for (;;) {
		int ready;

		beat(worker, 1);
		ready = epoll_wait(epoll_fd, &event, 1, BEAT_MS);
		if (ready > 0 && event.data.u64 == KEY_STOP)
			break;
		if (eventfd_read(worker->assist_fd, &calls) == 0 && !assist(worker))
			break;
	}
	close(epoll_fd);
	return NULL;
}

/* Let the stop signal end every wait, or take it back. */
static int watch_stop(struct fp_worker *worker, int operation)
{
	if (watch(worker->epoll_fd, operation, worker->stop_fd, EPOLLIN, KEY_STOP) ||
	    watch(worker->encap.epoll_fd, operation, worker->stop_fd, EPOLLIN, ENCAP_KEY_STOP) ||
	    watch(worker->decap.epoll_fd, operation, worker->stop_fd, EPOLLIN, DECAP_KEY_STOP))
		return errno;
	return 0;
}

static int start_thread(struct fp_worker *worker, void *(*run)(void *), const char *name)
{
	int err = pthread_create(&worker->thread[worker->threads], NULL, run, worker);

	if (!err)
		pthread_setname_np(worker->thread[worker->threads++], name);
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
	if (err)
		return err;
	beat(worker, 0);
	beat(worker, 1);
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &before);
	err = start_thread(worker, split ? run_encap : run_both, split ? "fp-encap" : "fp-both");
	if (!err && threads == 2)
		err = start_thread(worker, split ? run_decap : run_assistant, "fp-decap");
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
		pthread_join(worker->thread[--worker->threads], NULL);
	eventfd_read(worker->stop_fd, &signals);
	watch_stop(worker, EPOLL_CTL_DEL);
	if (worker->assisted) {
		worker->assisted = false;
		watch(worker->epoll_fd, EPOLL_CTL_MOD, worker->decap.epoll_fd, EPOLLIN, KEY_DECAP);
	}
	return worker->error;
}

/** fp_worker_silence_ms() - How long ago the thread that hangs longest began its turn; 0 without */
uint64_t fp_worker_silence_ms(const struct fp_worker *worker)
{
	uint64_t now = coarse_ms(), oldest = now;

	for (unsigned int i = 0; i < worker->threads; i++) {
		uint64_t turned = worker->turned_ms[i];

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
