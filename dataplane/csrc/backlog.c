/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DOC: An own queue in front of the wire
 *
 * A TUN disowns what it is given, so nothing holds a local sender back: its whole window,
 * megabytes, stands in its TUN queue, and a ping that comes into the same queue would wait for all
 * of it. So where flows are mixed the queue is read ahead, and what is bulk waits here, in the
 * order in which it was read, while the first few kilobytes of each flow in each turn go on at
 * once. A flow of which a packet waits has all later ones wait behind it, so none is reordered.
 *
 * The bytes stay where they were read to: the arena is a ring, and each packet lies in one piece.
 * While nothing waits every batch begins at its start, so that it stays in the cache. A page that
 * was never touched takes no memory; once touched it stays.
 */
#define _GNU_SOURCE
#include "backlog.h"

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#define ARENA_BYTES ((size_t)16 * 1024 * 1024)
/* What a flow may send past those that wait, in each turn. */
#define PASS_BYTES 4096

/**
 * backlog_open() - Make one; on failure backlog_close() is still to be called
 * @backlog: Zeroed
 *
 * Return: 0, or an errno
 */
int backlog_open(struct backlog *backlog)
{
	void *arena =
		mmap(NULL, ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (arena == MAP_FAILED)
		return ENOMEM;
	backlog->arena = arena;
	return 0;
}

/** backlog_close() - Free what backlog_open() made, also when it failed */
void backlog_close(struct backlog *backlog)
{
	if (backlog->arena)
		munmap(backlog->arena, ARENA_BYTES);
}

/** backlog_room() - Where the next packet is to be read to: PACKET_ROOM bytes, or NULL for none */
uint8_t *backlog_room(struct backlog *backlog)
{
	bool wrapped = backlog->tail < backlog->head;
	size_t end = wrapped ? backlog->head : ARENA_BYTES;

	if (backlog->count == BACKLOG_PACKETS)
		return NULL;
	/* A wrapped tail stays below the head: equal, they say that nothing is in use. */
	if (end - backlog->tail > PACKET_ROOM)
		return backlog->arena + backlog->tail;
	if (wrapped || backlog->head <= PACKET_ROOM)
		return NULL;
	backlog->tail = 0;
	return backlog->arena;
}

/** backlog_use() - Keep what was read to the last backlog_room(), up to @end */
void backlog_use(struct backlog *backlog, const uint8_t *end)
{
	backlog->tail = (size_t)(end - backlog->arena);
}

/** backlog_begin() - A turn begins, so each flow may overtake anew */
void backlog_begin(struct backlog *backlog)
{
	memset(backlog->passed, 0, sizeof(backlog->passed));
}

/**
 * backlog_must_wait() - Whether a packet that was read may not go on at once
 * @flow:      Its hash
 * @bytes:     Its length
 * @overtakes: Whether bulk waits here, so that others overtake it
 */
bool backlog_must_wait(struct backlog *backlog, uint32_t flow, size_t bytes, bool overtakes)
{
	unsigned int index = flow % BACKLOG_FLOWS;

	if (backlog->waits[index])
		return true;
	if (!overtakes)
		return false;
	backlog->passed[index] += bytes;
	return backlog->passed[index] > PASS_BYTES;
}

/** backlog_add() - Have a packet wait, for which backlog_use() was called */
void backlog_add(struct backlog *backlog, const struct waiting *packet)
{
	assert(backlog->count < BACKLOG_PACKETS);
	backlog->waiting[(backlog->first + backlog->count) % BACKLOG_PACKETS] = *packet;
	backlog->count++;
	backlog->waits[packet->flow % BACKLOG_FLOWS]++;
}

/** backlog_take() - Take out the packet that waits longest; its bytes stay in use */
struct waiting backlog_take(struct backlog *backlog)
{
	struct waiting packet = backlog->waiting[backlog->first];

	assert(backlog->count);
	backlog->first = (backlog->first + 1) % BACKLOG_PACKETS;
	backlog->count--;
	backlog->waits[packet.flow % BACKLOG_FLOWS]--;
	return packet;
}

/** backlog_release() - Only what waits is in use any more */
void backlog_release(struct backlog *backlog)
{
	if (backlog->count)
		backlog->head =
			(size_t)(backlog->waiting[backlog->first].datagram - backlog->arena);
	else
		backlog->head = backlog->tail = 0;
}
