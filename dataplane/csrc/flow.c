/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DOC: Reads an inner IP packet that nobody vouches for.
 *
 * A packet that passes flow_parse() has a whole header with a right checksum and lies wholly inside
 * its buffer. The hash chooses the outer source port: equal for all packets of a flow, and for all
 * fragments of a packet, which is why fragments hash by addresses only.
 */
#include "flow.h"

#include "checksum.h"
#include "ecn.h"

static uint32_t mix(uint64_t value)
{
	value ^= value >> 33;
	value *= 0xff51afd7ed558ccdULL;
	value ^= value >> 33;
	value *= 0xc4ceb9fe1a85ec53ULL;
	return (uint32_t)(value >> 32);
}

static bool has_ports(uint8_t protocol)
{
	switch (protocol) {
	case PROTOCOL_TCP:
	case PROTOCOL_UDP:
	case PROTOCOL_DCCP:
	case PROTOCOL_SCTP:
	case PROTOCOL_UDPLITE:
		return true;
	default:
		return false;
	}
}

static uint32_t hash_of(const struct flow *flow, const uint8_t *transport, size_t length)
{
	uint8_t protocol = flow->fragment ? 0 : flow->protocol;
	uint64_t word[4];
	uint32_t ports = 0;

	memcpy(word, &flow->source, 16);
	memcpy(word + 2, &flow->destination, 16);
	if (has_ports(protocol) && length >= sizeof(ports))
		memcpy(&ports, transport, sizeof(ports));
	return mix(word[0] ^ (word[1] * 3) ^ (word[2] * 5) ^ (word[3] * 7) ^
		   (ports * 0x9e3779b97f4a7c15ULL) ^ protocol);
}

static bool parse_ipv4(const uint8_t *packet, size_t length, struct flow *flow)
{
	const struct ipv4_header *header = (const struct ipv4_header *)packet;
	size_t header_length, total;

	if (length < sizeof(*header) || header->version_ihl >> 4 != 4)
		return false;
	header_length = (size_t)(header->version_ihl & 0x0f) * 4;
	total = get_be16(header->total_length);
	if (header_length < sizeof(*header) || total < header_length || total > length)
		return false;
	if (checksum(packet, header_length) != 0)
		return false;
	flow->source = inet_from_ipv4(header->source);
	flow->destination = inet_from_ipv4(header->destination);
	flow->length = total;
	flow->ecn = header->tos & ECN_MASK;
	flow->header_length = header_length;
	flow->fragment = (get_be16(header->fragment) & IPV4_MORE_OR_OFFSET) != 0;
	flow->protocol = header->protocol;
	flow->hash = hash_of(flow, packet + header_length, total - header_length);
	return true;
}

static bool parse_ipv6(const uint8_t *packet, size_t length, struct flow *flow)
{
	const struct ipv6_header *header = (const struct ipv6_header *)packet;
	size_t payload;

	if (length < sizeof(*header) || header->version_class >> 4 != 6)
		return false;
	payload = get_be16(header->payload_length);
	if (payload > length - sizeof(*header))
		return false;
	memcpy(&flow->source, header->source, 16);
	memcpy(&flow->destination, header->destination, 16);
	/* Such an address stands for an IPv4 one and would find its route (RFC 4291, 2.5.5.2). */
	if (inet_is_ipv4(&flow->source) || inet_is_ipv4(&flow->destination))
		return false;
	flow->length = sizeof(*header) + payload;
	flow->ecn = header->class_label >> 4 & ECN_MASK;
	flow->header_length = sizeof(*header);
	/* Behind an extension header may be a fragment; its first one must hash as the others do.
	 */
	flow->fragment = !has_ports(header->next_header);
	flow->protocol = header->next_header;
	flow->hash = hash_of(flow, packet + sizeof(*header), payload);
	return true;
}

/**
 * flow_parse() - Check an inner header and read what forwarding needs of it
 * @packet:    From the first byte of the IP header
 * @length:    Bytes at @packet, padding included
 * @ethertype: ETHERTYPE_IPV4 or ETHERTYPE_IPV6
 * @flow:      Written when the header is sound
 *
 * Return: whether the header is sound
 */
bool flow_parse(const uint8_t *packet, size_t length, uint16_t ethertype, struct flow *flow)
{
	return ethertype == ETHERTYPE_IPV4 ? parse_ipv4(packet, length, flow)
					   : parse_ipv6(packet, length, flow);
}

/**
 * flow_set_ecn() - Write the ECN field of a packet that flow_parse() accepted
 * @packet:    From the first byte of the IP header
 * @ethertype: Its family
 * @ecn:       Codepoint
 */
void flow_set_ecn(uint8_t *packet, uint16_t ethertype, uint8_t ecn)
{
	if (ethertype == ETHERTYPE_IPV4) {
		struct ipv4_header *header = (struct ipv4_header *)packet;
		uint16_t before = (uint16_t)(header->version_ihl << 8 | header->tos);

		header->tos = (uint8_t)((header->tos & ~ECN_MASK) | ecn);
		header->checksum =
			checksum_replace(header->checksum, before,
					 (uint16_t)(header->version_ihl << 8 | header->tos));
	} else {
		struct ipv6_header *header = (struct ipv6_header *)packet;

		header->class_label =
			(uint8_t)((header->class_label & ~(ECN_MASK << 4)) | ecn << 4);
	}
}

/** flow_is_multicast() - Whether an address names more than one host (broadcast included) */
bool flow_is_multicast(const struct inet_address *address)
{
	if (inet_is_ipv4(address))
		return address->octet[12] >> 4 == 0xe ||
		       memcmp(address->octet + 12, "\xff\xff\xff\xff", 4) == 0;
	return address->octet[0] == 0xff;
}

/** flow_bad_source() - Whether no host may send from this address (RFC 1122, section 3.2.1.3) */
bool flow_bad_source(const struct inet_address *address)
{
	static const uint8_t loopback[16] = { [15] = 1 };

	if (flow_is_multicast(address))
		return true;
	if (inet_is_ipv4(address))
		return address->octet[12] == 127 || address->octet[12] == 0;
	return memcmp(address->octet, loopback, 16) == 0 ||
	       memcmp(address->octet, (const uint8_t[16]) { 0 }, 16) == 0;
}
