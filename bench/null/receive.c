// Decapsulation by recvmmsg and writev.

#define _GNU_SOURCE
#include <netinet/udp.h>

#include "null.h"

#ifndef UDP_GRO
#define UDP_GRO 104
#endif

enum { RECEIVES = 16, SOCKET_BUFFER = 8 << 20 };

/**
 * open_unconnected() - Open a socket that anyone may send to
 * @options:	the addresses
 * @shared:	whether it is one of a group on its port
 *
 * Return: the descriptor
 */
int open_unconnected(const struct options *options, bool shared)
{
	int fd = open_udp(options->local, WIRE_PORT, shared), on = 1, dont = IP_PMTUDISC_DONT;

	force_buffers(fd, SOCKET_BUFFER);
	if (setsockopt(fd, SOL_UDP, UDP_GRO, &on, sizeof(on)) ||
	    setsockopt(fd, IPPROTO_IP, IP_MTU_DISCOVER, &dont, sizeof(dont)))
		fail("setsockopt");
	return fd;
}

/**
 * open_wire() - Open the socket to the peer
 * @options:	the addresses
 *
 * Return: the descriptor
 */
int open_wire(const struct options *options)
{
	struct sockaddr_in there = parse_address(options->peer, WIRE_PORT);
	int fd = open_unconnected(options, false);

	if (connect(fd, (struct sockaddr *)&there, sizeof(there)))
		fail("connect");
	return fd;
}

/**
 * gro_size() - Tell how long the datagrams in a received message are
 * @head:	the message
 * @length:	its bytes
 *
 * Return: bytes of each but the last
 */
size_t gro_size(struct msghdr *head, size_t length)
{
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(head);
	int size;

	if (!cmsg || cmsg->cmsg_level != SOL_UDP || cmsg->cmsg_type != UDP_GRO)
		return length;
	memcpy(&size, CMSG_DATA(cmsg), sizeof(size));
	return (size_t)size;
}

struct receiver {
	struct decap decap;
	struct group group;
	int wire;
	uint8_t *slots;
};

/**
 * decapsulate() - One turn: receive what is there, write it to the TUN
 * @receiver:	the receiver
 * @wait:	whether to sleep until something arrives
 */
static void decapsulate(void *receiver, bool wait)
{
	struct receiver *r = receiver;
	struct mmsghdr mmsg[RECEIVES];
	struct iovec vectors[RECEIVES];
	union {
		struct cmsghdr align;
		uint8_t bytes[CMSG_SPACE(sizeof(int))];
	} control[RECEIVES];
	int got;

	for (int i = 0; i < RECEIVES; i++) {
		vectors[i] = (struct iovec) { r->slots + i * SLOT, SLOT };
		mmsg[i].msg_hdr = (struct msghdr) { .msg_iov = &vectors[i],
						    .msg_iovlen = 1,
						    .msg_control = &control[i],
						    .msg_controllen = sizeof(control[i]) };
	}
	got = recvmmsg(r->wire, mmsg, RECEIVES, wait ? MSG_WAITFORONE : MSG_DONTWAIT, NULL);
	for (int i = 0; i < got; i++)
		join_message(&r->decap, r->slots + i * SLOT, mmsg[i].msg_len,
			     gro_size(&mmsg[i].msg_hdr, mmsg[i].msg_len));
	flush(&r->decap);
}

/**
 * forward_received() - Forward for ever, receiving by recvmmsg
 * @options:	the TUN and how many threads
 * @wire:	socket to receive from
 * @encapsulate: one turn of the other direction, which ends when nothing is left
 * @sender:	its argument
 */
void forward_received(const struct options *options, int wire, void (*encapsulate)(void *sender),
		      void *sender)
{
	static struct receiver r;

	r.wire = wire;
	r.slots = malloc((size_t)RECEIVES * SLOT);
	if (!r.slots)
		fail("memory");
	r.decap = (struct decap) { .group = &r.group, .write = write_now, .tun = options->tun };
	forward(options, &(struct sides) { wire, encapsulate, sender, decapsulate, &r });
}
