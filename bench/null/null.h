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
// Encapsulation (segment.c) takes super-packets from the TUN (vnet header, TSO) and makes messages
// of their segments, as many to a message as UDP_SEGMENT takes. Segments carry the whole inner
// header with sequence and length set, and a tag that names the super-packet and the place in it.
// Decapsulation (join.c) takes what UDP_GRO brought, joins neighbours of one super-packet by their
// tags and has each written at once; its checksum is declared partial, which the receiving kernel
// does not verify.
//
// Who moves the bytes is a design of its own (--io, one file each):
// calls	readv and sendmmsg (calls.c), recvmmsg and writev (receive.c)
// unconnected	the same by a socket of a group that anyone may send to, each message addressed:
//		a node with more than one peer must
// zerocopy	as calls, sent with MSG_ZEROCOPY; takes `flat` or `gaps`
// uring	everything by io_uring, reads and receives as multishot (uring.c)
// uring-sqpoll	the same without system calls while a thread of the kernel watches the ring
// packet	out by a packet socket on the underlay, which takes GSO frames (packet.c)
// packet-ring	the same from a ring shared with the kernel: the TUN is read into it (packet.c)
// tunnel	out by a TAP that takes super-packets with their outer headers (tunnel.c)
// xdp		both ways by an AF_XDP socket, frame by frame without checksums (xdp.c)
//
// Common to them:
// --design	how segments come together: `gather` leaves the payload where it was read, and
//		iovecs name it and headers in an arena; `flat` copies both into one buffer; `gaps`
//		reads with room for the headers of a guessed segment size
// --threads	1: one waits for both directions; 2: one for each
// --queue	packets that the TUN holds

#ifndef BENCH_NULL_H
#define BENCH_NULL_H

#include <linux/virtio_net.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "tun.h"
#include "udp_socket.h"

enum {
	WIRE_PORT = 8472,
	TAG_BYTES = 22, // Ethernet + VXLAN
	MAX_HEADER = 120,
	MAX_SEGMENTS = 64, // in one message, as kernels before 6.9 allow
	MAX_DATAGRAM = 65507,
	SLOT = 80 << 10, // a super-packet with gaps
	READS = 64, // packets in one turn of encapsulation
	READ_BYTES = 256 << 10,
	ARENA = READ_BYTES / 256 + READS, // segments in one turn
	ANY_PLACE = UINT16_MAX, // index of a tag that all segments of a super-packet have
	GROUP = MAX_SEGMENTS * 2, // iovecs of one super-packet that is written
};

enum design { GATHER, FLAT, GAPS };

struct options {
	const char *local, *peer;
	enum design design;
	int threads;
	int tun;
};

struct tag {
	uint32_t super;
	uint16_t index;
	uint16_t gso_size;
	uint16_t csum_start, csum_offset;
	uint8_t flags, gso_type;
};

_Static_assert(sizeof(struct tag) <= TAG_BYTES, "the tag fits where Ethernet and VXLAN would be");

/**
 * tag_of() - Make the tag of a packet
 * @vnet:	of the packet
 * @super:	its number
 *
 * Return: the tag, index 0
 */
static inline struct tag tag_of(const struct virtio_net_hdr *vnet, uint32_t super)
{
	return (struct tag) { .super = super,
			      .gso_size = vnet->gso_size,
			      .csum_start = vnet->csum_start,
			      .csum_offset = vnet->csum_offset,
			      .flags = vnet->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM,
			      .gso_type = vnet->gso_type };
}

struct message {
	struct iovec *vectors;
	size_t vector_count, bytes, segments, segment;
	bool closed;
};

struct encap {
	int tun;
	enum design design;
	size_t max_message; // bytes
	size_t room; // bytes of a slot
	size_t stride; // with gaps, from one segment to the next; 0: no more than they need
	uint32_t super;
	size_t header, mss; // of the last super-packet: the guess for gaps
	size_t bytes; // read in this turn
	uint8_t *flat;
	size_t flat_used;
	uint8_t headers[ARENA][TAG_BYTES + MAX_HEADER];
	struct iovec vectors[2 * ARENA];
	struct message messages[ARENA];
	size_t header_count, vector_count, message_count;
};

struct group {
	struct virtio_net_hdr vnet;
	struct tag first;
	uint16_t next; // index of the segment that follows
	size_t count, bytes;
	uint8_t *packet;
	struct iovec vectors[GROUP];
};

struct decap {
	struct group *group; // being joined
	void (*write)(struct decap *d); // writes it and leaves an empty one
	int tun; // for write_now()
	void *context; // for another
};

struct sides {
	int wire; // to wait for what decapsulate() takes
	void (*encapsulate)(void *sender); // one turn, without waiting
	void *sender;
	void (*decapsulate)(void *receiver, bool wait); // one turn
	void *receiver;
};

void encap_init(struct encap *e, const struct options *options);
ssize_t read_packet(struct encap *e, uint8_t *slot, bool *gapped);
void take_packet(struct encap *e, uint8_t *slot, size_t got, bool gapped);
void read_packets(struct encap *e, uint8_t *slots, size_t stride, size_t count);
void gather_messages(struct encap *e, uint8_t *to);
void start_turn(struct encap *e);

/**
 * is_full() - Tell whether a turn of encapsulation has no room for another packet
 * @e:		encapsulation
 *
 * Return: whether its messages must be sent first
 */
static inline bool is_full(const struct encap *e)
{
	return e->bytes >= READ_BYTES - MAX_DATAGRAM;
}

void join_message(struct decap *d, uint8_t *bytes, size_t length, size_t datagram);
void flush(struct decap *d);
void write_now(struct decap *d);

int open_unconnected(const struct options *options, bool shared);
int open_wire(const struct options *options);
void forward(const struct options *options, const struct sides *sides);
void forward_received(const struct options *options, int wire, void (*encapsulate)(void *sender),
		      void *sender);
size_t set_segment_size(struct msghdr *head, void *control, size_t segment);
size_t gro_size(struct msghdr *head, size_t length);

void run_calls(const struct options *options);
void run_unconnected(const struct options *options);
void run_zerocopy(const struct options *options);
void run_uring(const struct options *options);
void run_uring_sqpoll(const struct options *options);
void run_packet(const struct options *options);
void run_packet_ring(const struct options *options);
void run_tunnel(const struct options *options);
void run_xdp(const struct options *options);

#endif
