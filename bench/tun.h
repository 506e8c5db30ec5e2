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
 * open_tun() - Open a TUN or TAP device without packet information, non-blocking
 * @name:	its name; made if it does not exist
 * @flags:	IFF_TUN or IFF_TAP, with IFF_VNET_HDR or not
 * @offloads:	for TUNSETOFFLOAD, with IFF_VNET_HDR
 *
 * Return: the descriptor
 */
static inline int open_tun(const char *name, short flags, unsigned int offloads)
{
	struct ifreq request = { .ifr_flags = (short)(IFF_NO_PI | flags) };
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
 * ask_device() - Make an ioctl about a network device, or end the program
 * @name:	of the device
 * @request:	the ioctl
 * @about:	its argument; gets the name
 */
static inline void ask_device(const char *name, unsigned long request, struct ifreq *about)
{
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	snprintf(about->ifr_name, sizeof(about->ifr_name), "%s", name);
	if (fd < 0 || ioctl(fd, request, about))
		fail(name);
	close(fd);
}

/**
 * set_queue() - Set how many packets a device holds
 * @name:	its name
 * @packets:	how many
 */
static inline void set_queue(const char *name, int packets)
{
	ask_device(name, SIOCSIFTXQLEN, &(struct ifreq) { .ifr_qlen = packets });
}

#endif
