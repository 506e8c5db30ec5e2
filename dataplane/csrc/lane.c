/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DOC: What one thread has in its hands
 *
 * A lane has an epoll set, the buffers of both directions, and those sources (TUN queues and
 * receive sockets) whose packets it moves. A source is in one lane, and only the thread of that
 * lane gives it to another, between two turns, when nothing is left of what was read from it. So no
 * flow is reordered when its source changes hands.
 *
 * Of several ready queues the one that was served longest ago is next. A queue whose flows send
 * seldom so never waits for more than one batch of each other.
 *
 * A lane has a source once that is in its epoll set: who sees it ready owns it, and who finds it
 * among its own can give it away.
 */
#define _GNU_SOURCE
#include "lane.h"

#include <errno.h>
#include <sys/epoll.h>
#include <unistd.h>

static int watch(const struct lane *lane, int operation, const struct source *source,
		 uint32_t events)
{
	struct epoll_event event = { .events = events, .data.u64 = source->number };
	int fd = source->queue ? source->queue->fd : source->socket->fd;

	return epoll_ctl(lane->epoll_fd, operation, fd, &event) ? errno : 0;
}

/**
 * lane_add() - Give a source that is in no lane to @lane
 *
 * Return: 0, or an errno
 */
int lane_add(struct lane *lane, struct source *source)
{
	int err = watch(lane, EPOLL_CTL_ADD, source, EPOLLIN);

	if (!err) {
		lane->held++;
		lane->has[source->number] = true;
	}
	return err;
}

/**
 * lane_move() - Give a source of @from, whose thread calls, to @to
 *
 * A TUN queue stays while a packet of it waits, for a full socket or for others.
 *
 * Return: 0, or an errno
 */
int lane_move(struct lane *from, struct lane *to, struct source *source)
{
	int err;

	if (source->queue &&
	    (source->queue->waiting || encap_must_wait(&from->encap, source->queue)))
		return 0;
	err = watch(from, EPOLL_CTL_DEL, source, 0);
	if (err)
		return err;
	if (source->queue)
		source->queue->full = 0;
	from->has[source->number] = false;
	from->held--;
	source->packets = 0;
	return lane_add(to, source);
}

/* A queue that is not to be read must not keep the epoll set ready. */
static void mute(struct lane *lane, struct source *source)
{
	lane->muted[source->number] = true;
	watch(lane, EPOLL_CTL_MOD, source, 0);
}

/*
 * Full sockets may have room again: send what they hold, and read what waited for that. A queue
 * does not wait for a socket that is full again of others: its next packets stand in line behind
 * those.
 */
static void go_on(struct lane *lane)
{
	encap_flush_full(&lane->encap);
	for (unsigned int i = 0; i < lane->sources; i++) {
		struct source *source = &lane->source[i];

		if (!source->queue || !lane->has[i])
			continue;
		encap_go_on(&lane->encap, source->queue);
		if (!lane->muted[i] || encap_must_wait(&lane->encap, source->queue))
			continue;
		watch(lane, EPOLL_CTL_MOD, source, EPOLLIN);
		lane->muted[i] = false;
	}
}

/* A source is ready. Return: 0, or -EBADFD when the TUN device is gone */
static int note_ready(struct lane *lane, struct source *source, uint32_t events)
{
	if (source->socket) {
		lane->socket[lane->sockets++] = source;
		return 0;
	}
	/* tun_chr_poll() reports an error only when the device is gone. */
	if (events & EPOLLERR)
		return -EBADFD;
	if (encap_must_wait(&lane->encap, source->queue))
		mute(lane, source);
	else if (!lane->queue || source->queue->served < lane->queue->queue->served)
		lane->queue = source;
	return 0;
}

/**
 * lane_wait() - Wait until a turn has work
 * @lane:       Lane that no other thread is in
 * @timeout_ms: As for epoll_wait()
 *
 * Return: how much was ready, 0 for nothing, or -EBADFD when the TUN device is gone
 */
int lane_wait(struct lane *lane, int timeout_ms)
{
	struct epoll_event event[EVENTS];
	bool waits = encap_can_send_waiting(&lane->encap);
	int count = epoll_wait(lane->epoll_fd, event, EVENTS, waits ? 0 : timeout_ms);
	bool has_room = false;

	lane->queue = NULL;
	lane->sockets = 0;
	for (int i = 0; i < count; i++) {
		uint64_t key = event[i].data.u64;
		int err = 0;

		if (key == KEY_STOP)
			lane->stopped = true;
		else if (key == KEY_SEND)
			has_room = true;
		else
			err = note_ready(lane, &lane->source[key], event[i].events);
		if (err)
			return err;
	}
	if (has_room)
		go_on(lane);
	return (count < 0 ? 0 : count) + waits;
}

/**
 * lane_turn() - Move a batch of each socket and of the queue that lane_wait() found, and of what
 * waits, without blocking
 * @lane:    Lane that no other thread is in
 * @batches: At most so many of a receive socket that is alone
 *
 * Return: packets moved, or -EBADFD when the TUN device is gone
 */
int lane_turn(struct lane *lane, unsigned int batches)
{
	int total = 0, moved;

	for (unsigned int i = 0; i < lane->sockets; i++) {
		struct source *source = lane->socket[i];

		moved = decap_turn(&lane->decap, source->socket,
				   lane->sockets == 1 && !lane->queue ? batches : 1);
		source->packets += (size_t)moved;
		total += moved;
	}
	if (!lane->queue && !encap_can_send_waiting(&lane->encap))
		return total;
	moved = encap_turn(&lane->encap, lane->queue ? lane->queue->queue : NULL);
	if (moved < 0)
		return moved;
	if (lane->queue)
		lane->queue->packets += (size_t)moved;
	return total + moved;
}

/**
 * lane_open() - Make a lane without sources; on failure lane_close() is still to be called
 * @lane:    Zeroed but for an epoll_fd of -1
 * @ctx:     Context, which must outlive the lane
 * @io:      Descriptors to send and write to, and their offloads
 * @source:  All sources of the worker
 * @sources: How many
 *
 * Return: 0, or an errno
 */
int lane_open(struct lane *lane, struct fp_ctx *ctx, const struct fp_io *io, struct source *source,
	      unsigned int sources)
{
	int err;

	lane->source = source;
	lane->sources = sources;
	lane->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (lane->epoll_fd < 0)
		return errno;
	err = encap_open(&lane->encap, ctx, io, lane->epoll_fd, KEY_SEND);
	return err ? err : decap_open(&lane->decap, ctx, io);
}

/** lane_close() - Free what lane_open() made, also when it failed */
void lane_close(struct lane *lane)
{
	encap_close(&lane->encap);
	decap_close(&lane->decap);
	if (lane->epoll_fd >= 0)
		close(lane->epoll_fd);
}
