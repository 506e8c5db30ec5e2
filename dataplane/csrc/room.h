/* SPDX-License-Identifier: Apache-2.0 */
#ifndef PYFLANNEL_ROOM_H
#define PYFLANNEL_ROOM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* When a full socket is looked at if it has no room yet; what is left twice in a row is stuck. */
#define ROOM_LATE_NS (200 * 1000 * 1000)

/* How much a send socket may have on its way to the wire. */
struct room {
	uint64_t ample_ns; /* for which half would have done, since all was too little */
	size_t late_left; /* when it was late last; 0: it was not, the last time */
};

void room_open(struct room *room, int fd);
size_t room_left(int fd);
void room_adapt(struct room *room, int fd, bool is_idle, uint64_t full_ns);

#endif
