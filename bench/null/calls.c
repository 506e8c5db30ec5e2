// Encapsulation by readv and sendmmsg, with MSG_ZEROCOPY on request.

#define _GNU_SOURCE
#include <errno.h>
#include <netinet/udp.h>
#include <poll.h>
#include <linux/errqueue.h>

#include "null.h"

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif

struct sender {
	struct encap encap;
	int wire;
	struct sockaddr_in *peer; // that each message names, when the socket is not connected
	bool zerocopy;
	uint32_t sent, completed; // of MSG_ZEROCOPY
	uint8_t *slots;
	struct mmsghdr mmsg[ARENA];
	union {
		struct cmsghdr align;
		uint8_t bytes[CMSG_SPACE(sizeof(uint16_t))];
	} control[ARENA];
};

/**
 * set_segment_size() - Ask for a message to be cut into datagrams
 * @head:	the message
 * @control:	room for the control message
 * @segment:	bytes of a datagram
 *
 * Return: bytes of the control message
 */
size_t set_segment_size(struct msghdr *head, void *control, size_t segment)
{
	struct cmsghdr *cmsg = control;
	uint16_t size = (uint16_t)segment;

	cmsg->cmsg_level = SOL_UDP;
	cmsg->cmsg_type = UDP_SEGMENT;
	cmsg->cmsg_len = CMSG_LEN(sizeof(size));
	memcpy(CMSG_DATA(cmsg), &size, sizeof(size));
	head->msg_control = control;
	return head->msg_controllen = CMSG_SPACE(sizeof(size));
}

/**
 * reap() - Wait until every byte that was sent by MSG_ZEROCOPY may change
 * @s:		the sender
 */
static void reap(struct sender *s)
{
	while (s->completed != s->sent) {
		uint8_t control[128];
		struct msghdr head = { .msg_control = control, .msg_controllen = sizeof(control) };
		struct cmsghdr *cmsg;
		struct sock_extended_err error;

		if (recvmsg(s->wire, &head, MSG_ERRQUEUE | MSG_DONTWAIT) < 0) {
			poll(&(struct pollfd) { s->wire, 0, 0 }, 1, -1);
			continue;
		}
		cmsg = CMSG_FIRSTHDR(&head);
		if (!cmsg)
			continue;
		memcpy(&error, CMSG_DATA(cmsg), sizeof(error));
		if (error.ee_origin == SO_EE_ORIGIN_ZEROCOPY)
			s->completed += error.ee_data - error.ee_info + 1;
	}
}

/**
 * send_messages() - Send what this turn collected
 * @s:		the sender
 *
 * What the kernel refuses is dropped, as a wire would.
 */
static void send_messages(struct sender *s)
{
	struct encap *e = &s->encap;
	int flags = s->zerocopy ? MSG_ZEROCOPY : 0;
	size_t sent = 0;

	for (size_t i = 0; i < e->message_count; i++) {
		struct message *message = &e->messages[i];
		struct msghdr *head = &s->mmsg[i].msg_hdr;

		*head = (struct msghdr) { .msg_iov = message->vectors,
					  .msg_iovlen = message->vector_count,
					  .msg_name = s->peer,
					  .msg_namelen = s->peer ? sizeof(*s->peer) : 0 };
		if (message->segments > 1)
			set_segment_size(head, &s->control[i], message->segment);
	}
	while (sent < e->message_count) {
		int done = sendmmsg(s->wire, s->mmsg + sent, (unsigned)(e->message_count - sent),
				    flags);

		sent += done > 0 ? (size_t)done : 1;
		if (s->zerocopy && done > 0)
			s->sent += (uint32_t)done;
	}
	reap(s);
	start_turn(e);
}

/**
 * encapsulate() - One turn: read packets until none is left or the budget is used, send them
 * @sender:	the sender
 */
static void encapsulate(void *sender)
{
	struct sender *s = sender;

	read_packets(&s->encap, s->slots, SLOT, READS);
	send_messages(s);
}

static void run(const struct options *options, struct sender *s)
{
	encap_init(&s->encap, options);
	s->slots = malloc((size_t)READS * SLOT);
	if (!s->slots)
		fail("memory");
	forward_received(options, s->wire, encapsulate, s);
}

void run_calls(const struct options *options)
{
	static struct sender s;

	s.wire = open_wire(options);
	run(options, &s);
}

void run_unconnected(const struct options *options)
{
	static struct sockaddr_in peer;
	static struct sender s;

	peer = parse_address(options->peer, WIRE_PORT);
	s.wire = open_unconnected(options, true);
	s.peer = &peer;
	run(options, &s);
}

void run_zerocopy(const struct options *options)
{
	static struct sender s;
	int on = 1;

	s.wire = open_wire(options);
	s.zerocopy = true;
	if (setsockopt(s.wire, SOL_SOCKET, SO_ZEROCOPY, &on, sizeof(on)))
		fail("SO_ZEROCOPY");
	run(options, &s);
}
