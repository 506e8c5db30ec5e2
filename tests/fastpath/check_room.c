/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How much a send socket may have on its way: twice as much after everything was out too early, or
 * half of it too soon, half as much after much was left for a while, and what it has in between.
 *
 * The wire is a pair of datagram sockets, in which a packet is on its way until it is received.
 */
#define _GNU_SOURCE
#include "check.h"

#include <sys/socket.h>
#include <unistd.h>

#include "room.h"

#define MANY 1000
/* How long a socket was full. */
#define BRIEF 100000
#define MIDDLING 700000
#define LONG 5000000
#define LATE ROOM_LATE_NS

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
		room_adapt(room, fd, is_idle, LONG);
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
	room_adapt(&room, wire[0], true, LONG);
	more = buffer_of(wire[0]);
	HOLDS(more == 2 * least);
	/* It is full: another socket has room again. */
	while (send(wire[0], packet, sizeof(packet), 0) > 0)
		;
	HOLDS(room_left(wire[0]) > (size_t)more / 2);
	room_adapt(&room, wire[0], false, BRIEF);
	adapt_often(&room, wire[0], false);
	HOLDS(buffer_of(wire[0]) == more);
	/* Half of it would have done all the time, but the least is never less. */
	while (room_left(wire[0]) >= (size_t)more / 2)
		HOLDS(recv(wire[1], received, sizeof(received), 0) > 0);
	HOLDS(room_left(wire[0]) > (size_t)more / 4);
	for (int i = 0; i < MANY; i++)
		room_adapt(&room, wire[0], false, MIDDLING);
	HOLDS(buffer_of(wire[0]) == more);
	room_adapt(&room, wire[0], false, LONG);
	HOLDS(buffer_of(wire[0]) == more);
	adapt_often(&room, wire[0], false);
	HOLDS(buffer_of(wire[0]) == least);
	/* Half of it was out in no time. */
	while (room_left(wire[0]) >= (size_t)least / 2)
		HOLDS(recv(wire[1], received, sizeof(received), 0) > 0);
	room_adapt(&room, wire[0], false, BRIEF);
	HOLDS(buffer_of(wire[0]) == more);
	while (send(wire[0], packet, sizeof(packet), 0) > 0)
		;
	while (room_left(wire[0]) >= (size_t)more / 2)
		HOLDS(recv(wire[1], received, sizeof(received), 0) > 0);
	adapt_often(&room, wire[0], false);
	HOLDS(buffer_of(wire[0]) == least);
	while (send(wire[0], packet, sizeof(packet), 0) > 0)
		;
	/* It stays full, but something leaves; then nothing does. */
	for (int i = 0; i < 2; i++) {
		room_adapt(&room, wire[0], false, LATE);
		HOLDS(recv(wire[1], received, sizeof(received), 0) > 0);
	}
	room_adapt(&room, wire[0], false, LATE);
	room_adapt(&room, wire[0], false, LONG);
	room_adapt(&room, wire[0], false, LATE);
	HOLDS(buffer_of(wire[0]) == least);
	room_adapt(&room, wire[0], false, LATE);
	HOLDS(buffer_of(wire[0]) == 8 * least);
	/* There is an end to it, also without the right to go beyond the host's own. */
	adapt_often(&room, wire[0], true);
	more = buffer_of(wire[0]);
	room_adapt(&room, wire[0], true, LONG);
	HOLDS(buffer_of(wire[0]) == more && more > least);
	close(wire[0]);
	close(wire[1]);
}
