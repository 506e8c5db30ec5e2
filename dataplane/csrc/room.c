/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DOC: A short queue in front of a slow link
 *
 * What a socket has sent stands in the queue of the network device until that is through with it,
 * and whatever else leaves by the device waits for it. So a socket gets as much room as keeps the
 * device busy and no more: what does not fit stays in the TUN queues, where each flow waits for
 * itself. The rule is that of the kernel's byte queue limits: where all was out before a full
 * socket was looked at again, the device had nothing to do meanwhile, and twice the room is needed;
 * where much was left for a while, half of it will do. It is never so little that a fast link wakes
 * us for each few packets: a millisecond's worth, as the kernel gives its own TCP senders, of which
 * half is out when we are woken.
 *
 * Not all that is left stands in a device that will send it. While the kernel asks for the MAC of a
 * host that is down, up to net.ipv4.neigh.default.unres_qlen_bytes of packets to it wait for three
 * seconds; a tunnel or a hung device has such queues, too. So a full socket of which nothing leaves
 * for a while gets much more room: what is stuck in it must not keep all else from being read.
 */
#define _GNU_SOURCE
#include "room.h"

#include <linux/sockios.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

/* As SO_SNDBUF takes them. The kernel counts twice that, with what a packet costs besides. */
#define ROOM_MIN (32 * 1024)
#define ROOM_MAX (8 * 1024 * 1024)
/* For so long half must have been enough. */
#define AMPLE_NS (50 * 1000 * 1000)
#define BRIEF_NS (500 * 1000)
/* From the least room to twice what may wait for one host that is down. */
#define STUCK_FACTOR 8

static void set(int fd, int bytes)
{
	/* Without CAP_NET_ADMIN net.core.wmem_max bounds it. */
	if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof(bytes)))
		setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
}

/** room_open() - Give a socket the least room */
void room_open(struct room *room, int fd)
{
	*room = (struct room) { 0 };
	set(fd, ROOM_MIN);
}

/** room_left() - Bytes of a socket that the device is not through with, as the kernel counts them
 */
size_t room_left(int fd)
{
	int left;

	return ioctl(fd, SIOCOUTQ, &left) ? 0 : (size_t)left;
}

/**
 * room_adapt() - A socket that was full may have room again, and nothing was sent since
 * @room:    Its room
 * @fd:      Socket
 * @is_idle: Whether nothing of any socket is left
 * @full_ns: How long ago it was full
 */
void room_adapt(struct room *room, int fd, bool is_idle, uint64_t full_ns)
{
	size_t left = room_left(fd);
	bool is_late = full_ns >= ROOM_LATE_NS;
	bool is_stuck = is_late && left && left == room->late_left;
	socklen_t size = sizeof(int);
	bool has_room;
	int all, more;

	room->late_left = is_late ? left : 0;
	if (getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &all, &size))
		return;
	has_room = left < (size_t)all / 2; /* as the kernel sees it */
	if (is_idle || is_stuck || (has_room && full_ns < BRIEF_NS)) {
		more = all / 2 * (is_stuck ? STUCK_FACTOR : 2);
		room->ample_ns = 0;
		if (all / 2 < ROOM_MAX)
			set(fd, more < ROOM_MAX ? more : ROOM_MAX);
	} else if (has_room && left > (size_t)all / 4 && full_ns >= 2 * BRIEF_NS) {
		room->ample_ns += full_ns;
		if (room->ample_ns < AMPLE_NS)
			return;
		room->ample_ns = 0;
		if (all / 4 >= ROOM_MIN)
			set(fd, all / 4);
	}
}
