// Decapsulation by recvmmsg and writev, and who waits for what.

#define _GNU_SOURCE
#include <netinet/udp.h>
#include <poll.h>
#include <pthread.h>

#include "null.h"

#ifndef UDP_GRO
#define UDP_GRO 104
#endif

enum { RECEIVES = 16, SOCKET_BUFFER = 8 << 20 };

/**
 * open_wire() - Open the socket to the peer
 * @options:	the addresses
 *
 * Return: the descriptor
 */
int open_wire(const struct options *options)
{
	struct sockaddr_in there = parse_address(options->peer, WIRE_PORT);
	int fd = open_udp(options->local, WIRE_PORT), on = 1, dont = IP_PMTUDISC_DONT;

	force_buffers(fd, SOCKET_BUFFER);
	if (setsockopt(fd, SOL_UDP, UDP_GRO, &on, sizeof(on)) ||
	    setsockopt(fd, IPPROTO_IP, IP_MTU_DISCOVER, &dont, sizeof(dont)))
		fail("setsockopt");
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
	int tun, wire;
	uint8_t *slots;
};

static void write_group(struct decap *d)
{
	struct receiver *r = d->context;

	write_now(r->tun, d->group);
}

/**
 * decapsulate() - One turn: receive what is there, write it to the TUN
 * @r:		the receiver
 * @flags:	MSG_DONTWAIT, or MSG_WAITFORONE to sleep until something arrives
 */
static void decapsulate(struct receiver *r, int flags)
{
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
	got = recvmmsg(r->wire, mmsg, RECEIVES, flags, NULL);
	for (int i = 0; i < got; i++)
		join_message(&r->decap, r->slots + i * SLOT, mmsg[i].msg_len,
			     gro_size(&mmsg[i].msg_hdr, mmsg[i].msg_len));
	flush(&r->decap);
}

struct waiting {
	int tun;
	void (*encapsulate)(void *sender);
	void *sender;
};

static void *encapsulate_forever(void *waiting)
{
	struct waiting *w = waiting;

	for (;;) {
		poll(&(struct pollfd) { w->tun, POLLIN, 0 }, 1, -1);
		w->encapsulate(w->sender);
	}
	return NULL;
}

/**
 * forward() - Forward in both directions for ever
 * @options:	the TUN and how many threads
 * @wire:	socket to receive from
 * @encapsulate: one turn of the other direction, which ends when nothing is left
 * @sender:	its argument
 */
void forward(const struct options *options, int wire, void (*encapsulate)(void *sender),
	     void *sender)
{
	static struct receiver r;
	struct waiting w = { options->tun, encapsulate, sender };
	pthread_t thread;

	r.tun = options->tun;
	r.wire = wire;
	r.slots = malloc((size_t)RECEIVES * SLOT);
	r.decap = (struct decap) { &r.group, write_group, &r };
	if (!r.slots)
		fail("memory");
	if (options->threads == 2) {
		if (pthread_create(&thread, NULL, encapsulate_forever, &w))
			fail("pthread_create");
		for (;;)
			decapsulate(&r, MSG_WAITFORONE);
	}
	for (;;) {
		struct pollfd ready[2] = { { w.tun, POLLIN, 0 }, { wire, POLLIN, 0 } };

		poll(ready, 2, -1);
		if (ready[0].revents)
			encapsulate(sender);
		if (ready[1].revents)
			decapsulate(&r, MSG_DONTWAIT);
	}
}
