/* SPDX-License-Identifier: Apache-2.0 */
#ifndef PYFLANNEL_GRO_H
#define PYFLANNEL_GRO_H

#include <sys/uio.h>

#include "flow.h"
#include "vnet.h"

#define GRO_PACKETS 256 /* packets held in all */
#define GRO_SEGMENTS 1024 /* segments of them */
#define GRO_SEGMENTS_PER_PACKET 64 /* above 128 a TUN refuses the write (EINVAL) */
#define GRO_BUCKETS 64 /* power of two */
#define GRO_HEADERS_MAX 128

struct fib_entry;

struct gro_segment {
	uint8_t *payload;
	size_t length;
	int next; /* or -1 */
};

/* A packet that is held, alone or with those that follow it in its flow. */
struct gro_packet {
	uint8_t *packet; /* the first one, from its IP header */
	size_t length; /* of the first one */
	size_t headers; /* of it: IP and transport header */
	size_t transport;
	size_t size; /* payload bytes of each segment but the last */
	size_t total; /* headers and all payloads */
	unsigned int segments;
	int first, last; /* the segments behind the first packet, -1 for none */
	int older; /* the packet held before it in its bucket, or -1 */
	uint32_t hash;
	uint32_t next_sequence; /* TCP */
	uint8_t flags; /* TCP, of all segments */
	bool open; /* may grow */
	bool fixed_id; /* all segments have one IPv4 id */
	bool verified; /* the first one's checksum was seen to be right */
	bool partial; /* its checksum field holds the pseudo header's sum */
	const struct fib_entry *sender;
};

struct gro {
	bool tcp; /* coalesce TCP */
	bool udp; /* coalesce UDP */
	unsigned int packets;
	unsigned int segments;
	int bucket[GRO_BUCKETS];
	struct gro_packet
		*newest; /* the one that the last packet is in, NULL when nothing is held */
	struct gro_packet packet[GRO_PACKETS];
	struct gro_segment segment[GRO_SEGMENTS];
};

/* The header of a super-packet, and what it said before. */
struct gro_edit {
	uint8_t before[GRO_HEADERS_MAX];
};

void gro_start(struct gro *gro);
bool gro_add(struct gro *gro, uint8_t *packet, const struct flow *flow, size_t hint,
	     const struct fib_entry *sender);
bool gro_continue(struct gro *gro, uint8_t *packet, size_t length);
unsigned int gro_finish(struct gro *gro, struct gro_packet *held, struct vnet_header *vnet,
			struct gro_edit *edit, struct iovec iov[GRO_SEGMENTS_PER_PACKET]);
void gro_undo(struct gro_packet *held, const struct gro_edit *edit);

#endif
