// A TUN device for the yardsticks; addresses, MTU and routes are set by who starts them.

#ifndef BENCH_TUN_H
#define BENCH_TUN_H

#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/sockios.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "netns.h"

enum { VNET_BYTES = 10 }; // struct virtio_net_hdr, the TUN's default

/**
 * open_tun() - Open a TUN device without packet information, non-blocking
 * @name:	its name; made if it does not exist
 * @flags:	IFF_VNET_HDR or 0
 * @offloads:	for TUNSETOFFLOAD, with IFF_VNET_HDR
 *
 * Return: the descriptor
 */
static inline int open_tun(const char *name, short flags, unsigned int offloads)
{
	struct ifreq request = { .ifr_flags = (short)(IFF_TUN | IFF_NO_PI | flags) };
	int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);

	if (fd < 0)
		fail("/dev/net/tun");
	snprintf(request.ifr_name, sizeof(request.ifr_name), "%s", name);
	if (ioctl(fd, TUNSETIFF, &request))
		fail("TUNSETIFF");
	if (flags & IFF_VNET_HDR && ioctl(fd, TUNSETOFFLOAD, offloads))
		fail("TUNSETOFFLOAD");
	return fd;
}

/**
 * set_queue() - Set how many packets a device holds
 * @name:	its name
 * @packets:	how many
 */
static inline void set_queue(const char *name, int packets)
{
	struct ifreq request = { .ifr_qlen = packets };
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	snprintf(request.ifr_name, sizeof(request.ifr_name), "%s", name);
	if (fd < 0 || ioctl(fd, SIOCSIFTXQLEN, &request))
		fail("SIOCSIFTXQLEN");
	close(fd);
}

#endif
