// The yardsticks' UDP sockets.

#ifndef BENCH_UDP_SOCKET_H
#define BENCH_UDP_SOCKET_H

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "netns.h"

/**
 * parse_address() - Read an IPv4 address and a port, or end the program
 * @text:	the address
 * @port:	in host order
 *
 * Return: both
 */
static inline struct sockaddr_in parse_address(const char *text, uint16_t port)
{
	struct sockaddr_in parsed = { .sin_family = AF_INET, .sin_port = htons(port) };

	if (inet_pton(AF_INET, text, &parsed.sin_addr) != 1) {
		fprintf(stderr, "%s is not an IPv4 address\n", text);
		exit(2);
	}
	return parsed;
}

/**
 * open_udp() - Open a UDP socket
 * @local:	IPv4 address that it is bound to
 * @port:	in host order
 * @shared:	whether it is one of a group on that port (SO_REUSEPORT)
 *
 * Return: the descriptor
 */
static inline int open_udp(const char *local, uint16_t port, bool shared)
{
	struct sockaddr_in here = parse_address(local, port);
	int fd = socket_in_netns(NULL, AF_INET, SOCK_DGRAM), on = 1;

	if (shared && setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &on, sizeof(on)))
		fail("SO_REUSEPORT");
	if (bind(fd, (struct sockaddr *)&here, sizeof(here)))
		fail("bind");
	return fd;
}

#endif
