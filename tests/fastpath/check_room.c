/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How much a send socket may have on its way: twice as much after everything was out too early,
 * half as much after much was left for a while, and what it has in between.
 *
 * The wire is a pair of datagram sockets, in which a packet is on its way until it is received.
 */
#define _GNU_SOURCE
#include "check.h"

#include <sys/socket.h>
#include <unistd.h>

#include "room.h"

#define MANY 1000

static int buffer_of(int fd)
{
	int bytes;
	socklen_t size = sizeof(bytes);

	HOLDS(getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, &size) == 0);
	return bytes;
}

static void adapt_often(struct room *room, int fd, bool is_idle)
{
	for (int i = 0; i < MANY; i++)
		room_adapt(room, fd, is_idle, false);
}

void check_room(void)
{
	static const uint8_t packet[16384];
	static uint8_t received[sizeof(packet)];
	struct room room;
	int wire[2], least, more;

	HOLDS(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, wire) == 0);
	room_open(&room, wire[0]);
	least = buffer_of(wire[0]);
	HOLDS(room_left(wire[0]) == 0);
	/* Others have something on its way, this socket little. */
	adapt_often(&room, wire[0], false);
	HOLDS(buffer_of(wire[0]) == least);
	room_adapt(&room, wire[0], true, false);
	more = buffer_of(wire[0]);
	HOLDS(more == 2 * least);
	/* Half of it would have done all the time, but the least is never less. */
	while (send(wire[0], packet, sizeof(packet), 0) > 0)
		;
	HOLDS(room_left(wire[0]) > (size_t)more / 2);
	room_adapt(&room, wire[0], false, false);
	HOLDS(buffer_of(wire[0]) == more);
	adapt_often(&room, wire[0], false);
	HOLDS(buffer_of(wire[0]) == least);
	/* It stays full, but something leaves; then nothing does. */
	for (int i = 0; i < 2; i++) {
		room_adapt(&room, wire[0], false, true);
		HOLDS(recv(wire[1], received, sizeof(received), 0) > 0);
	}
	room_adapt(&room, wire[0], false, true);
	room_adapt(&room, wire[0], false, false);
	room_adapt(&room, wire[0], false, true);
	HOLDS(buffer_of(wire[0]) == least);
	room_adapt(&room, wire[0], false, true);
	HOLDS(buffer_of(wire[0]) == 8 * least);
	/* There is an end to it, also without the right to go beyond the host's own. */
	adapt_often(&room, wire[0], true);
	more = buffer_of(wire[0]);
	room_adapt(&room, wire[0], true, false);
	HOLDS(buffer_of(wire[0]) == more && more > least);
	close(wire[0]);
	close(wire[1]);
}
