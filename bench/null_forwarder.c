// The floor of an I/O design: moves packets between a TUN and one fixed peer, and nothing else.
//
// DOC: Theory of Operation
//
// A forwarder in userspace pays for its system calls and the copies in them, and for its own code.
// This one has no code to speak of: no lookup, no encapsulation, no checksum of a payload, no check
// of what arrives. What it reaches is what a forwarder with the same calls can reach at best. It is
// no product: it trusts its peer, carries IPv4 only, and its wire format is its own (as long as
// Ethernet + VXLAN, so that frames have the sizes of the real one).
//
// Encapsulation reads super-packets from the TUN (vnet header, TSO) and sends their segments with
// UDP_SEGMENT, many to a message. Segments carry the whole inner header with sequence and length
// set, and a tag that names the super-packet and the place in it. Decapsulation receives with
// UDP_GRO, joins neighbours of one super-packet by their tags and writes each with one writev; its
// checksum is declared partial, which the receiving kernel does not verify.
//
// Designs differ in how the segments come together (--design) and who does it (--threads):
// gather	the payload stays where it was read, headers lie in an arena, iovecs name both
// flat		header and payload are copied into one buffer, a message is one iovec
// gaps		readv leaves gaps for the headers of a guessed segment size, a message is one iovec
// threads 1	one poll for both directions; threads 2: one thread for each direction
// queue N	packets that the TUN holds

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <linux/virtio_net.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <netinet/udp.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

#include "tun.h"

#ifndef UDP_GRO
#define UDP_GRO 104
#endif
#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif

enum {
	TAG_BYTES = 22, // Ethernet + VXLAN
	MAX_HEADER = 120,
	MAX_SEGMENTS = 64, // in one message, as kernels before 6.9 allow
	MAX_DATAGRAM = 65507,
	SLOT = 80 << 10, // a super-packet with gaps
	READS = 64, // packets in one turn of encapsulation
	READ_BYTES = 256 << 10,
	ARENA = READ_BYTES / 256 + READS, // segments in one turn
	MESSAGES = ARENA,
	RECEIVES = 16,
	GROUP = MAX_SEGMENTS * 2,
	SOCKET_BUFFER = 8 << 20,
};

enum design { GATHER, FLAT, GAPS };

struct tag {
	uint32_t super;
	uint16_t index;
	uint16_t gso_size;
	uint16_t csum_start, csum_offset;
	uint8_t flags, gso_type;
};

_Static_assert(sizeof(struct tag) <= TAG_BYTES, "the tag fits where Ethernet and VXLAN would be");

struct message {
	struct iovec *vectors;
	size_t vector_count, bytes, segments, segment;
	bool closed;
	union {
		struct cmsghdr align;
		uint8_t bytes[CMSG_SPACE(sizeof(uint16_t))];
	} control;
};

struct encap {
	int tun, wire;
	enum design design;
	uint32_t super;
	size_t header, mss; // of the last super-packet: the guess for gaps
	uint8_t *slots, *flat;
	size_t flat_used;
	uint8_t headers[ARENA][TAG_BYTES + MAX_HEADER];
	struct iovec vectors[2 * ARENA];
	struct message messages[MESSAGES];
	struct mmsghdr mmsg[MESSAGES];
	size_t header_count, vector_count, message_count;
};

struct group {
	struct tag first;
	uint16_t next; // index of the segment that follows
	size_t count, bytes;
	uint8_t *packet;
	struct iovec vectors[GROUP];
};

struct decap {
	int tun, wire;
	uint8_t *slots;
	struct group group;
};

/**
 * add_segment() - Append a datagram to the messages of this turn
 * @e:		encapsulation
 * @vectors:	its parts
 * @count:	how many
 * @bytes:	its length
 */
static void add_segment(struct encap *e, const struct iovec *vectors, size_t count, size_t bytes)
{
	struct message *last = e->message_count ? &e->messages[e->message_count - 1] : NULL;

	if (!last || last->closed || bytes > last->segment || last->segments == MAX_SEGMENTS ||
	    last->bytes + bytes > MAX_DATAGRAM) {
		last = &e->messages[e->message_count++];
		last->vectors = &e->vectors[e->vector_count];
		last->vector_count = last->bytes = last->segments = 0;
		last->segment = bytes;
	}
	last->closed = bytes < last->segment; // only the last segment may be shorter
	last->bytes += bytes;
	last->segments++;
	for (size_t i = 0; i < count; i++) {
		struct iovec *end = last->vectors + last->vector_count - 1;

		if (last->vector_count &&
		    (uint8_t *)end->iov_base + end->iov_len == (uint8_t *)vectors[i].iov_base) {
			end->iov_len += vectors[i].iov_len;
			continue;
		}
		e->vectors[e->vector_count++] = vectors[i];
		last->vector_count++;
	}
}

/**
 * send_messages() - Send what this turn collected
 * @e:		encapsulation
 *
 * What the kernel refuses is dropped, as a wire would.
 */
static void send_messages(struct encap *e)
{
	size_t sent = 0;

	for (size_t i = 0; i < e->message_count; i++) {
		struct message *message = &e->messages[i];
		struct msghdr *head = &e->mmsg[i].msg_hdr;

		*head = (struct msghdr) { .msg_iov = message->vectors,
					  .msg_iovlen = message->vector_count };
		if (message->segments > 1) {
			struct cmsghdr *control = &message->control.align;
			uint16_t size = (uint16_t)message->segment;

			control->cmsg_level = SOL_UDP;
			control->cmsg_type = UDP_SEGMENT;
			control->cmsg_len = CMSG_LEN(sizeof(size));
			memcpy(CMSG_DATA(control), &size, sizeof(size));
			head->msg_control = control;
			head->msg_controllen = sizeof(message->control);
		}
	}
	while (sent < e->message_count) {
		int done =
			sendmmsg(e->wire, e->mmsg + sent, (unsigned)(e->message_count - sent), 0);

		sent += done > 0 ? (size_t)done : 1;
	}
	e->message_count = e->vector_count = e->header_count = e->flat_used = 0;
}

static void set_header(uint8_t *start, const struct tag *tag, size_t header, size_t payload,
		       size_t offset, bool last)
{
	struct iphdr *ip = (struct iphdr *)(start + TAG_BYTES);
	struct tcphdr *tcp = (struct tcphdr *)(start + TAG_BYTES + tag->csum_start);

	memcpy(start, tag, sizeof(*tag));
	ip->tot_len = htons((uint16_t)(header + payload));
	tcp->seq = htonl(ntohl(tcp->seq) + (uint32_t)offset);
	if (!last)
		tcp->fin = tcp->psh = 0;
}

/**
 * segment() - Cut a TCP super-packet
 * @e:		encapsulation
 * @tag:	its tag, index 0
 * @packet:	the IP packet, behind TAG_BYTES of room; with gaps, its first segment
 * @header:	bytes of its headers
 * @payload:	bytes behind them
 * @gapped:	whether the payload was read with gaps
 */
static void segment(struct encap *e, struct tag *tag, uint8_t *packet, size_t header,
		    size_t payload, bool gapped)
{
	size_t mss = tag->gso_size, stride = TAG_BYTES + header + mss, offset = 0;
	uint8_t original[MAX_HEADER];

	memcpy(original, packet, header);
	for (; offset < payload; offset += mss, tag->index++) {
		size_t part = payload - offset < mss ? payload - offset : mss;
		uint8_t *start = gapped ? packet - TAG_BYTES + tag->index * stride
					: e->headers[e->header_count++];
		struct iovec vectors[2] = {
			{ start, TAG_BYTES + header },
			{ gapped ? start + TAG_BYTES + header : packet + header + offset, part }
		};

		if (e->design == FLAT) {
			start = e->flat + e->flat_used;
			memcpy(start + TAG_BYTES + header, vectors[1].iov_base, part);
			e->flat_used += TAG_BYTES + header + part;
			vectors[0].iov_base = start;
			vectors[1].iov_base = start + TAG_BYTES + header;
		}
		memcpy(start + TAG_BYTES, original, header);
		set_header(start, tag, header, part, offset, offset + part == payload);
		add_segment(e, vectors, 2, TAG_BYTES + header + part);
	}
}

/**
 * read_packet() - Read a packet from the TUN
 * @e:		encapsulation
 * @slot:	where to
 * @got:	bytes read, with the vnet header
 *
 * Return: whether the payload lies with gaps of the guessed sizes
 */
static bool read_packet(struct encap *e, uint8_t *slot, ssize_t *got)
{
	size_t stride = TAG_BYTES + e->header + e->mss, count = 1;
	uint8_t *end = slot + SLOT, *next;
	struct iovec vectors[MAX_SEGMENTS + 1];

	if (e->design != GAPS || !e->mss) {
		*got = read(e->tun, slot + TAG_BYTES - VNET_BYTES, SLOT - TAG_BYTES);
		return false;
	}
	vectors[0] =
		(struct iovec) { slot + TAG_BYTES - VNET_BYTES, VNET_BYTES + e->header + e->mss };
	for (next = slot + stride; next + stride <= end && count < MAX_SEGMENTS; next += stride)
		vectors[count++] = (struct iovec) { next + TAG_BYTES + e->header, e->mss };
	*got = readv(e->tun, vectors, (int)count);
	return *got > (ssize_t)(VNET_BYTES + e->header + e->mss);
}

/**
 * close_gaps() - Move a payload together that was read with gaps of wrong sizes
 * @e:		encapsulation
 * @packet:	the IP packet
 * @length:	its bytes
 */
static void close_gaps(const struct encap *e, uint8_t *packet, size_t length)
{
	size_t gap = TAG_BYTES + e->header, done = e->header + e->mss;

	for (size_t i = 1; done < length; i++, done += e->mss)
		memmove(packet + done, packet + done + i * gap, e->mss);
}

/**
 * encapsulate() - One turn: read packets until none is left or the budget is used, send them
 * @e:		encapsulation
 */
static void encapsulate(struct encap *e)
{
	size_t bytes = 0;

	for (size_t i = 0; i < READS && bytes < READ_BYTES - MAX_DATAGRAM; i++) {
		uint8_t *slot = e->slots + i * SLOT, *packet = slot + TAG_BYTES;
		struct virtio_net_hdr vnet;
		struct tag tag = { .super = e->super++ };
		size_t length, header;
		ssize_t got;
		bool gapped = read_packet(e, slot, &got);

		if (got <= VNET_BYTES)
			break;
		length = (size_t)got - VNET_BYTES;
		bytes += length;
		memcpy(&vnet, packet - VNET_BYTES, sizeof(vnet));
		tag.flags = vnet.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM;
		tag.csum_start = vnet.csum_start;
		tag.csum_offset = vnet.csum_offset;
		if (vnet.gso_type == VIRTIO_NET_HDR_GSO_NONE) {
			memcpy(slot, &tag, sizeof(tag));
			add_segment(e, &(struct iovec) { slot, TAG_BYTES + length }, 1,
				    TAG_BYTES + length);
			continue;
		}
		tag.gso_type = vnet.gso_type;
		tag.gso_size = vnet.gso_size;
		header = vnet.csum_start + 4u * ((struct tcphdr *)(packet + vnet.csum_start))->doff;
		if (gapped && (header != e->header || vnet.gso_size != e->mss)) {
			close_gaps(e, packet, length);
			gapped = false;
		}
		e->header = header;
		e->mss = vnet.gso_size;
		segment(e, &tag, packet, header, length - header, gapped);
	}
	send_messages(e);
}

static void set_length(uint8_t *packet, size_t length)
{
	struct iphdr *ip = (struct iphdr *)packet;
	uint32_t sum = 0;
	uint16_t word;

	ip->tot_len = htons((uint16_t)length);
	ip->check = 0;
	for (size_t i = 0; i < ip->ihl * 4u; i += 2) {
		memcpy(&word, packet + i, 2);
		sum += word;
	}
	sum = (sum & 0xffff) + (sum >> 16);
	ip->check = (uint16_t) ~(sum + (sum >> 16));
}

/**
 * flush() - Write the joined segments to the TUN as one packet
 * @d:		decapsulation
 */
static void flush(struct decap *d)
{
	struct group *group = &d->group;
	struct virtio_net_hdr vnet = { .flags = group->first.flags,
				       .csum_start = group->first.csum_start,
				       .csum_offset = group->first.csum_offset };

	if (!group->count)
		return;
	if (group->first.gso_size) {
		set_length(group->packet, group->bytes);
		if (group->count > 2) {
			vnet.gso_type = group->first.gso_type;
			vnet.gso_size = group->first.gso_size;
			vnet.hdr_len = (uint16_t)(group->vectors[1].iov_len - vnet.gso_size);
		}
	}
	group->vectors[0] = (struct iovec) { &vnet, VNET_BYTES };
	if (writev(d->tun, group->vectors, (int)group->count) < 0 && errno != EAGAIN)
		fail("writev");
	group->count = 0;
}

/**
 * join() - Take a datagram into the group it continues, or begin a new one
 * @d:		decapsulation
 * @datagram:	its bytes
 * @length:	how many
 */
static void join(struct decap *d, uint8_t *datagram, size_t length)
{
	struct group *group = &d->group;
	uint8_t *packet = datagram + TAG_BYTES;
	struct tag tag;
	size_t header;

	if (length <= TAG_BYTES + sizeof(struct iphdr))
		return;
	memcpy(&tag, datagram, sizeof(tag));
	length -= TAG_BYTES;
	if (group->count && tag.gso_size && tag.super == group->first.super &&
	    tag.index == group->next && group->count < GROUP) {
		struct tcphdr *tcp = (struct tcphdr *)(packet + tag.csum_start);
		struct tcphdr *first = (struct tcphdr *)(group->packet + tag.csum_start);

		header = tag.csum_start + 4u * tcp->doff;
		first->fin |= tcp->fin;
		first->psh |= tcp->psh;
		group->vectors[group->count++] =
			(struct iovec) { packet + header, length - header };
		group->bytes += length - header;
		group->next++;
		return;
	}
	flush(d);
	group->first = tag;
	group->next = (uint16_t)(tag.index + 1);
	group->packet = packet;
	group->bytes = length;
	group->vectors[1] = (struct iovec) { packet, length };
	group->count = 2; // the vnet header's vector is the first
}

/**
 * decapsulate() - One turn: receive what is there, write it to the TUN
 * @d:		decapsulation
 * @flags:	MSG_DONTWAIT, or MSG_WAITFORONE to sleep until something arrives
 */
static void decapsulate(struct decap *d, int flags)
{
	struct mmsghdr mmsg[RECEIVES];
	struct iovec vectors[RECEIVES];
	union {
		struct cmsghdr align;
		uint8_t bytes[CMSG_SPACE(sizeof(int))];
	} control[RECEIVES];
	int got;

	for (int i = 0; i < RECEIVES; i++) {
		vectors[i] = (struct iovec) { d->slots + i * SLOT, SLOT };
		mmsg[i].msg_hdr = (struct msghdr) { .msg_iov = &vectors[i],
						    .msg_iovlen = 1,
						    .msg_control = &control[i],
						    .msg_controllen = sizeof(control[i]) };
	}
	got = recvmmsg(d->wire, mmsg, RECEIVES, flags, NULL);
	for (int i = 0; i < got; i++) {
		struct cmsghdr *cmsg = CMSG_FIRSTHDR(&mmsg[i].msg_hdr);
		size_t length = mmsg[i].msg_len, size = length;
		int gro;

		if (cmsg && cmsg->cmsg_level == SOL_UDP && cmsg->cmsg_type == UDP_GRO) {
			memcpy(&gro, CMSG_DATA(cmsg), sizeof(gro));
			size = (size_t)gro;
		}
		for (size_t at = 0; at < length; at += size)
			join(d, d->slots + i * SLOT + at, length - at < size ? length - at : size);
	}
	flush(d);
}

static void *encapsulate_forever(void *argument)
{
	struct encap *e = argument;

	for (;;) {
		poll(&(struct pollfd) { e->tun, POLLIN, 0 }, 1, -1);
		encapsulate(e);
	}
	return NULL;
}

static int open_wire(const char *local, const char *peer, uint16_t port)
{
	struct sockaddr_in here = { .sin_family = AF_INET, .sin_port = htons(port) };
	struct sockaddr_in there = here;
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), on = 1, dont = IP_PMTUDISC_DONT;

	if (fd < 0)
		fail("socket");
	if (inet_pton(AF_INET, local, &here.sin_addr) != 1 ||
	    inet_pton(AF_INET, peer, &there.sin_addr) != 1) {
		fputs("null_forwarder: --local and --peer are IPv4 addresses\n", stderr);
		exit(2);
	}
	force_buffers(fd, SOCKET_BUFFER);
	if (setsockopt(fd, SOL_UDP, UDP_GRO, &on, sizeof(on)) ||
	    setsockopt(fd, IPPROTO_IP, IP_MTU_DISCOVER, &dont, sizeof(dont)))
		fail("setsockopt");
	if (bind(fd, (struct sockaddr *)&here, sizeof(here)) ||
	    connect(fd, (struct sockaddr *)&there, sizeof(there)))
		fail("bind, connect");
	return fd;
}

int main(int argc, char **argv)
{
	static const struct option names[] = {
		{ "local", 1, 0, 'l' },	       { "peer", 1, 0, 'p' },
		{ "design", 1, 0, 'd' },       { "threads", 1, 0, 'j' },
		{ "queue", 1, 0, 'q' },	       { "address", 1, 0, 'x' },
		{ "peer-address", 1, 0, 'x' }, { 0 },
	};
	static struct encap e;
	static struct decap d;
	static const char *const designs[] = { "gather", "flat", "gaps" };
	const char *local = "", *peer = "", *design = "gather";
	int name, threads = 2, queue = 5000;
	pthread_t thread;

	while ((name = getopt_long(argc, argv, "", names, NULL)) != -1) {
		switch (name) {
		case 'l':
			local = optarg;
			break;
		case 'p':
			peer = optarg;
			break;
		case 'd':
			design = optarg;
			break;
		case 'j':
			threads = atoi(optarg);
			break;
		case 'q':
			queue = atoi(optarg);
			break;
		case 'x': // given to every yardstick; this one does not look at addresses
			break;
		default:
			return 2;
		}
	}
	while (e.design <= GAPS && strcmp(design, designs[e.design]))
		e.design++;
	if (e.design > GAPS || threads < 1 || threads > 2) {
		fputs("null_forwarder: --design=gather|flat|gaps --threads=1|2\n", stderr);
		return 2;
	}
	d.tun = e.tun = open_tun("bench0", IFF_VNET_HDR, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO_ECN);
	set_queue("bench0", queue);
	d.wire = e.wire = open_wire(local, peer, 8472);
	e.slots = malloc((size_t)READS * SLOT);
	e.flat = malloc(2 * READ_BYTES);
	d.slots = malloc((size_t)RECEIVES * SLOT);
	if (!e.slots || !e.flat || !d.slots)
		fail("memory");
	if (threads == 2) {
		if (pthread_create(&thread, NULL, encapsulate_forever, &e))
			fail("pthread_create");
		for (;;)
			decapsulate(&d, MSG_WAITFORONE);
	}
	for (;;) {
		struct pollfd ready[2] = { { e.tun, POLLIN, 0 }, { d.wire, POLLIN, 0 } };

		poll(ready, 2, -1);
		if (ready[0].revents)
			encapsulate(&e);
		if (ready[1].revents)
			decapsulate(&d, MSG_DONTWAIT);
	}
}
