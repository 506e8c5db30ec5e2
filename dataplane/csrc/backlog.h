/* SPDX-License-Identifier: Apache-2.0 */
#ifndef PYFLANNEL_BACKLOG_H
#define PYFLANNEL_BACKLOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Bytes in one piece, for one packet with all that its segments need. */
#define PACKET_ROOM ((size_t)512 * 1024)
#define BACKLOG_PACKETS 2048
#define BACKLOG_FLOWS 256

/* A packet that was read ahead: datagrams, complete but for what encapsulation pushes. */
struct waiting {
	struct tun_queue *queue; /* that it came from */
	uint8_t *datagram;
	size_t datagrams;
	size_t total; /* bytes of all */
	size_t size; /* of each but the last */
	uint32_t flow; /* its hash */
};

/* The memory that packets are read to, and those in it that wait. */
struct backlog {
	uint8_t *arena;
	size_t head, tail; /* what is in use, [head, tail); it wraps when tail < head */
	unsigned int first, count; /* of @waiting, a ring */
	unsigned int waits[BACKLOG_FLOWS]; /* packets, by flow */
	size_t passed[BACKLOG_FLOWS]; /* bytes that did not wait, by flow */
	struct waiting waiting[BACKLOG_PACKETS];
};

int backlog_open(struct backlog *backlog);
void backlog_close(struct backlog *backlog);
uint8_t *backlog_room(struct backlog *backlog);
void backlog_use(struct backlog *backlog, const uint8_t *end);
void backlog_begin(struct backlog *backlog);
bool backlog_must_wait(struct backlog *backlog, uint32_t flow, size_t bytes, bool overtakes);
void backlog_add(struct backlog *backlog, const struct waiting *packet);
struct waiting backlog_take(struct backlog *backlog);
void backlog_release(struct backlog *backlog);

/* The packet that waits longest, if any does. */
static inline const struct waiting *backlog_first(const struct backlog *backlog)
{
	return &backlog->waiting[backlog->first];
}

#endif
