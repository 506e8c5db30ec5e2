// Sockets in named network namespaces, for tools that hold both ends of a connection.

#ifndef BENCH_NETNS_H
#define BENCH_NETNS_H

#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

/**
 * fail() - Say what failed and end the program
 * @what:	the call
 */
static inline void __attribute__((noreturn)) fail(const char *what)
{
	perror(what);
	exit(1);
}

/**
 * enter_netns() - Go into a network namespace
 * @name:	its name under /run/netns, NULL: stay
 */
static inline void enter_netns(const char *name)
{
	char path[256];
	int fd;

	if (!name)
		return;
	snprintf(path, sizeof(path), "/run/netns/%s", name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || setns(fd, CLONE_NEWNET))
		fail(path);
	close(fd);
}

/**
 * socket_in_netns() - Make a socket that belongs to a network namespace
 * @name:	the namespace, which the calling thread enters
 * @family:	address family
 * @type:	socket type
 *
 * Return: the descriptor
 */
static inline int socket_in_netns(const char *name, int family, int type)
{
	int fd;

	enter_netns(name);
	fd = socket(family, type | SOCK_CLOEXEC, 0);
	if (fd < 0)
		fail("socket");
	return fd;
}

/**
 * force_buffers() - Ask for large socket buffers, beyond the administrator's limit
 * @fd:		the socket
 * @bytes:	for each direction
 */
static inline void force_buffers(int fd, int bytes)
{
	if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof(bytes)) ||
	    setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof(bytes)))
		fail("SO_RCVBUFFORCE");
}

#endif
