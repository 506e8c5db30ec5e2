/* SPDX-License-Identifier: Apache-2.0 */
#ifndef PYFLANNEL_ROOM_H
#define PYFLANNEL_ROOM_H

#include <stdbool.h>
#include <stddef.h>

/* How much a send socket may have on its way to the wire. */
struct room {
	unsigned int ample; /* times that half would have done, since all was too little */
};

void room_open(struct room *room, int fd);
size_t room_left(int fd);
void room_adapt(struct room *room, int fd, bool is_idle);

#endif
