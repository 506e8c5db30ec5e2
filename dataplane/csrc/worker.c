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
 * What its threads do is in csrc/shift.c.
 */
#define _GNU_SOURCE
#include "worker.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

/* For all that was read, at the speed of the network card. */
#define DRAIN_NS (1000 * 1000 * 1000ULL)

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
		encap_drain(&worker->lane[i].encap, deadline);
}

static void close_fd(int fd)
{
	if (fd >= 0)
		close(fd);
}

/* End the threads behind their present batch. */
static void end_threads(struct fp_worker *worker)
{
	if (worker->started)
		eventfd_write(worker->stop_fd, 1);
	while (worker->started)
		pthread_join(worker->shift[--worker->started].thread, NULL);
}

/**
 * fp_worker_free() - Send what a worker holds and free it; its counters stay with the context
 * @worker: Worker that the caller is in no turn of
 */
void fp_worker_free(struct fp_worker *worker)
{
	struct fp_ctx *ctx = worker->ctx;

	end_threads(worker);
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

/**
 * fp_worker_schedule_error() - Why a thread runs as any other
 *
 * Return: 0 when all run as wanted, or EPERM without CAP_SYS_NICE
 */
int fp_worker_schedule_error(const struct fp_worker *worker)
{
	return worker->schedule_error;
}

/* Let the stop signal end every wait. Return: 0, or an errno */
static int watch_stop(struct fp_worker *worker)
{
	struct epoll_event event = { .events = EPOLLIN, .data.u64 = KEY_STOP };

	for (int i = 0; i < LANES; i++) {
		if (epoll_ctl(worker->lane[i].epoll_fd, EPOLL_CTL_ADD, worker->stop_fd, &event))
			return errno;
	}
	return 0;
}

static int start_thread(struct fp_worker *worker, int lane, const char *name)
{
	int err = shift_start(&worker->shift[worker->started], worker, &worker->lane[lane], name);

	if (!err)
		worker->started++;
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
			worker->threads && (i != FIRST || !worker_is_adaptive(worker));
}

/**
 * fp_worker_start() - Let threads turn the lanes until the end; the caller does no turns any more
 * @worker:  Worker without threads
 * @threads: 1 for both directions, 2 for one each, 3 for both and two that have the bulk
 *
 * Signals are blocked in the threads.
 *
 * Return: 0, or an errno; then only fp_worker_free() may follow
 */
int fp_worker_start(struct fp_worker *worker, int threads)
{
	sigset_t all, before;
	int err;

	assert(worker->threads == 0 && threads >= 1 && threads <= LANES);
	worker->threads = threads;
	err = watch_stop(worker);
	choose_reading(worker);
	if (!err && threads == 2)
		err = move_sockets(worker);
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &before);
	if (!err)
		err = start_threads(worker);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return err;
}

/** fp_worker_threads() - How many threads move packets now; 0 when the caller's turns do */
int fp_worker_threads(const struct fp_worker *worker)
{
	if (!worker_is_adaptive(worker))
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
