/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Wire formats of the inner and outer headers, and their fields in host order.
 */
#ifndef PYFLANNEL_INET_H
#define PYFLANNEL_INET_H

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* A field in network order: bytes, so that it has no alignment and cannot be read by accident. */
typedef struct {
	uint8_t octet[2];
} be16;
typedef struct {
	uint8_t octet[4];
} be32;

static inline uint16_t get_be16(be16 field)
{
	return (uint16_t)(field.octet[0] << 8 | field.octet[1]);
}

static inline be16 put_be16(uint16_t value)
{
	return (be16) { { (uint8_t)(value >> 8), (uint8_t)value } };
}

static inline uint32_t get_be32(be32 field)
{
	return (uint32_t)field.octet[0] << 24 | (uint32_t)field.octet[1] << 16 |
	       (uint32_t)field.octet[2] << 8 | field.octet[3];
}

static inline be32 put_be32(uint32_t value)
{
	return (be32) { { (uint8_t)(value >> 24), (uint8_t)(value >> 16), (uint8_t)(value >> 8),
			  (uint8_t)value } };
}

#define ETH_ALEN 6
#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86dd

struct eth_header {
	uint8_t destination[ETH_ALEN];
	uint8_t source[ETH_ALEN];
	be16 type;
};
static_assert(sizeof(struct eth_header) == 14, "Ethernet II header");

#define IPV4_DONT_FRAGMENT 0x4000
#define IPV4_MORE_OR_OFFSET 0x3fff

enum protocol {
	PROTOCOL_TCP = 6,
	PROTOCOL_UDP = 17,
	PROTOCOL_DCCP = 33,
	PROTOCOL_SCTP = 132,
	PROTOCOL_UDPLITE = 136,
};

/* RFC 791, section 3.1 */
struct ipv4_header {
	uint8_t version_ihl;
	uint8_t tos;
	be16 total_length;
	be16 id;
	be16 fragment;
	uint8_t ttl;
	uint8_t protocol;
	be16 checksum;
	uint8_t source[4];
	uint8_t destination[4];
};
static_assert(sizeof(struct ipv4_header) == 20, "IPv4 header without options");

/* RFC 8200, section 3 */
struct ipv6_header {
	uint8_t version_class;
	uint8_t class_label;
	be16 label;
	be16 payload_length;
	uint8_t next_header;
	uint8_t hop_limit;
	uint8_t source[16];
	uint8_t destination[16];
};
static_assert(sizeof(struct ipv6_header) == 40, "IPv6 header");

/* Bytes of a packet, as its header says: both length fields lie in the first 20 of them. */
static inline size_t ip_total_length(const uint8_t *packet, bool is_ipv4)
{
	return is_ipv4 ? get_be16(((const struct ipv4_header *)packet)->total_length)
		       : sizeof(struct ipv6_header) +
				 get_be16(((const struct ipv6_header *)packet)->payload_length);
}

enum tcp_flag {
	TCP_FIN = 0x01,
	TCP_SYN = 0x02,
	TCP_RST = 0x04,
	TCP_PSH = 0x08,
	TCP_ACK = 0x10,
	TCP_URG = 0x20,
	TCP_ECE = 0x40,
	TCP_CWR = 0x80,
};

/* RFC 9293, section 3.1 */
struct tcp_header {
	be16 source;
	be16 destination;
	be32 sequence;
	be32 acknowledgement;
	uint8_t offset_reserved;
	uint8_t flags;
	be16 window;
	be16 checksum;
	be16 urgent;
};
static_assert(sizeof(struct tcp_header) == 20, "TCP header without options");

static inline size_t tcp_header_length(const struct tcp_header *header)
{
	return (size_t)(header->offset_reserved >> 4) * 4;
}

/* RFC 768 */
struct udp_header {
	be16 source;
	be16 destination;
	be16 length;
	be16 checksum;
};
static_assert(sizeof(struct udp_header) == 8, "UDP header");

/* An address of either family: IPv6, or IPv4 as ::ffff:a.b.c.d. */
struct inet_address {
	uint8_t octet[16];
};

#define INET_MAPPED_BITS 96

static inline struct inet_address inet_from_ipv4(const uint8_t octets[4])
{
	struct inet_address address = { { [10] = 0xff, [11] = 0xff } };

	memcpy(address.octet + 12, octets, 4);
	return address;
}

static inline struct inet_address inet_from_octets(const uint8_t octets[16])
{
	struct inet_address address;

	memcpy(&address, octets, sizeof(address));
	return address;
}

static inline bool inet_is_ipv4(const struct inet_address *address)
{
	static const uint8_t mapped[12] = { [10] = 0xff, [11] = 0xff };

	return memcmp(address->octet, mapped, sizeof(mapped)) == 0;
}

static inline bool inet_equal(const struct inet_address *a, const struct inet_address *b)
{
	return memcmp(a, b, sizeof(*a)) == 0;
}

/* Clear every bit behind the first @length bits. */
static inline struct inet_address inet_mask(struct inet_address address, unsigned int length)
{
	for (unsigned int i = 0; i < sizeof(address.octet); i++) {
		unsigned int kept = length > 8 * i ? length - 8 * i : 0;

		if (kept < 8)
			address.octet[i] &= (uint8_t)(0xff00 >> kept);
	}
	return address;
}

static inline bool inet_in(const struct inet_address *address, const struct inet_address *prefix,
			   unsigned int length)
{
	struct inet_address masked = inet_mask(*address, length);

	return inet_equal(&masked, prefix);
}

#endif
