/* SPDX-License-Identifier: Apache-2.0 */
/* Packets built by hand, and inputs of the invariants made of them: sound ones, and a little off.
 */
#include "check.h"

#include "vnet.h"

static uint64_t state;

void random_seed(uint64_t seed)
{
	state = seed * 2 + 1;
}

/* xorshift64*; the low bits of the product are weak, so the high half is used. */
uint32_t random_below(uint32_t limit)
{
	state ^= state >> 12;
	state ^= state << 25;
	state ^= state >> 27;
	return (uint32_t)((state * 0x2545f4914f6cdd1dULL) >> 32) % limit;
}

static bool one_in(uint32_t chances)
{
	return random_below(chances) == 0;
}

/* Node 10.5.@node.0/24 of the network 10.5.0.0/16. */
struct fp_config config_of(uint8_t node, int anti_spoofing)
{
	return (struct fp_config) {
		.vni = 1,
		.mac = { 2, 0, 0, 0, 0, node },
		.network = { [10] = 0xff, [11] = 0xff, [12] = 10, [13] = 5 },
		.network_len = INET_MAPPED_BITS + 16,
		.anti_spoofing = anti_spoofing,
		.inner_ipv4 = 1,
	};
}

/* The way to such a node, which listens on a port of this host. */
struct fp_route route_of(uint8_t node, uint16_t port)
{
	return (struct fp_route) {
		.subnet = { [10] = 0xff, [11] = 0xff, [12] = 10, 5, node, 0 },
		.subnet_len = INET_MAPPED_BITS + 24,
		.mac = { 2, 0, 0, 0, 0, node },
		.underlay = { [10] = 0xff, [11] = 0xff, [12] = 127, 0, 0, 1 },
		.port = port,
	};
}

/* Word by word, big endian, folded; odd bytes count as high ones. */
uint16_t naive_sum(const uint8_t *bytes, size_t length, uint32_t sum)
{
	for (size_t i = 0; i < length; i++) {
		sum += i % 2 ? bytes[i] : (uint32_t)bytes[i] << 8;
		sum = (sum & 0xffff) + (sum >> 16);
	}
	return (uint16_t)((sum & 0xffff) + (sum >> 16));
}

static size_t put16(uint8_t *at, size_t value)
{
	at[0] = (uint8_t)(value >> 8);
	at[1] = (uint8_t)value;
	return 2;
}

static size_t ip_length(const struct spec *spec)
{
	return spec->ipv6 ? 40 : 20 + 4 * spec->ip_options;
}

size_t headers_of(const struct spec *spec)
{
	return ip_length(spec) + (spec->udp ? 8 : 20 + 4 * spec->tcp_options);
}

static void put_ip(const struct spec *spec, uint8_t *packet, size_t total)
{
	size_t header = ip_length(spec);

	memset(packet, 0, header);
	if (spec->ipv6) {
		packet[0] = (uint8_t)(0x60 | spec->tos >> 4);
		packet[1] = (uint8_t)(spec->tos << 4);
		put16(packet + 4, total - 40);
		packet[6] = spec->udp ? PROTOCOL_UDP : PROTOCOL_TCP;
		packet[7] = 63;
		memcpy(packet + 8, "\x20\x01\x0d\xb8", 4);
		memcpy(packet + 24, "\x20\x01\x0d\xb8", 4);
		packet[15] = spec->source_node;
		packet[31] = spec->destination_node;
		packet[23] = packet[39] = 7;
		return;
	}
	packet[0] = (uint8_t)(0x45 + spec->ip_options);
	packet[1] = spec->tos;
	put16(packet + 2, total);
	put16(packet + 4, spec->id);
	put16(packet + 6, spec->fragment);
	packet[8] = 63;
	packet[9] = spec->udp ? PROTOCOL_UDP : PROTOCOL_TCP;
	memcpy(packet + 12, (const uint8_t[]) { 10, 5, spec->source_node, 7 }, 4);
	memcpy(packet + 16, (const uint8_t[]) { 10, 5, spec->destination_node, 7 }, 4);
	memset(packet + 20, 1, header - 20);
	put16(packet + 10, (uint16_t)~naive_sum(packet, header, 0));
}

size_t build(const struct spec *spec, uint8_t *packet)
{
	size_t start = ip_length(spec), total = headers_of(spec) + spec->payload;
	uint8_t *transport = packet + start;
	size_t field = spec->udp ? 6 : 16;
	uint32_t sum = (uint32_t)(total - start) + (spec->udp ? PROTOCOL_UDP : PROTOCOL_TCP);
	uint16_t pseudo;

	put_ip(spec, packet, total);
	memset(transport, 0, total - start);
	put16(transport, spec->source_port);
	put16(transport + 2, 80);
	if (spec->udp) {
		put16(transport + 4, total - start);
	} else {
		put16(transport + 4, spec->sequence >> 16);
		put16(transport + 6, spec->sequence & 0xffff);
		transport[12] = (uint8_t)((5 + spec->tcp_options) << 4);
		transport[13] = spec->flags;
		put16(transport + 14, spec->window);
		put16(transport + 18, spec->urgent);
		memset(transport + 20, 1, 4 * spec->tcp_options);
	}
	for (size_t i = 0; i < spec->payload; i++)
		packet[total - spec->payload + i] = (uint8_t)(spec->fill + 7 * i + (i >> 8));
	pseudo = naive_sum(spec->ipv6 ? packet + 8 : packet + 12, spec->ipv6 ? 32 : 8, sum);
	if (spec->partial) {
		put16(transport + field, pseudo);
	} else {
		uint16_t whole = (uint16_t)~naive_sum(transport, total - start, pseudo);

		put16(transport + field, spec->udp && !whole ? 0xffff : whole);
	}
	return total;
}

static struct spec any_spec(void)
{
	static const uint8_t flags[] = { TCP_ACK,	    TCP_ACK,	       TCP_ACK | TCP_PSH,
					 TCP_ACK | TCP_FIN, TCP_ACK | TCP_CWR, TCP_ACK | TCP_ECE,
					 TCP_SYN,	    TCP_RST,	       TCP_ACK | TCP_URG };

	return (struct spec) {
		.ipv6 = one_in(2),
		.udp = one_in(3),
		.source_node = 2,
		.destination_node = 1,
		.source_port = (uint16_t)random_below(4),
		.tos = (uint8_t)random_below(256),
		.flags = flags[random_below(sizeof(flags))],
		.id = (uint16_t)random_below(65536),
		.fragment = one_in(2) ? IPV4_DONT_FRAGMENT : 0,
		.window = 100,
		.sequence = one_in(3) ? 0xffffff00 : 1000,
		.ip_options = one_in(8) ? random_below(11) : 0,
		.tcp_options = one_in(2) ? 3 : random_below(11),
		.payload = one_in(20) ? random_below(9000) : random_below(300),
		.fill = (uint8_t)random_below(256),
	};
}

static void spoil(uint8_t *bytes, size_t length)
{
	while (length && one_in(6))
		bytes[random_below((uint32_t)length)] ^= (uint8_t)(1u << random_below(8));
}

void make_segment_input(struct input *input)
{
	struct spec spec = any_spec();
	struct vnet_header vnet = {
		.flags = VNET_NEEDS_CHECKSUM,
		.gso_type = spec.udp	? VNET_GSO_UDP
			    : spec.ipv6 ? VNET_GSO_TCPV6
					: VNET_GSO_TCPV4,
		.header_length = (uint16_t)headers_of(&spec),
		.gso_size = (uint16_t)(1 + random_below(one_in(2) ? 50 : 1500)),
		.checksum_start = (uint16_t)ip_length(&spec),
		.checksum_offset = spec.udp ? 6 : 16,
	};

	spec.partial = true;
	if (one_in(4))
		vnet.gso_type = VNET_GSO_NONE;
	memcpy(input->bytes, &vnet, sizeof(vnet));
	spoil(input->bytes, sizeof(vnet));
	input->bytes[sizeof(vnet)] = one_in(2) ? 22 : (uint8_t)random_below(256);
	input->size = sizeof(vnet) + 1;
	input->size += build(&spec, input->bytes + input->size);
	spoil(input->bytes + sizeof(vnet) + 1, 60);
}

void make_coalesce_input(struct input *input)
{
	struct spec flow[3];
	size_t size = 1 + random_below(40);
	unsigned int count = 1 + random_below(60);

	for (int i = 0; i < 3; i++) {
		flow[i] = any_spec();
		flow[i].flags = TCP_ACK;
		flow[i].ip_options = 0;
		flow[i].payload = size;
	}
	input->bytes[0] = (uint8_t)(one_in(4) ? random_below(4) : 3);
	put16(input->bytes + 1, one_in(2) ? 0 : size);
	input->size = 3;
	while (count--) {
		struct spec *next = &flow[random_below(3)];
		struct spec spec = *next, other = any_spec();
		uint8_t *at = input->bytes + input->size;

		if (one_in(8))
			spec.flags = other.flags;
		if (one_in(15))
			spec.ip_options = 1;
		if (one_in(15))
			spec.payload += random_below(3) - (size_t)1;
		if (one_in(15))
			spec.fragment |= (uint16_t)random_below(0x4000);
		if (one_in(15))
			spec.tcp_options = other.tcp_options;
		if (one_in(20))
			spec.urgent = 9;
		if (one_in(20))
			spec.window = 9;
		spec.partial = one_in(20);
		put16(at, build(&spec, at + 2));
		spoil(at + 2, one_in(4) ? (size_t)at[0] << 8 | at[1] : 0);
		input->size += 2 + ((size_t)at[0] << 8 | at[1]);
		next->sequence += (uint32_t)spec.payload;
		next->id = (uint16_t)(next->id + (one_in(20) ? 0 : 1));
	}
}

void make_decap_input(struct input *input)
{
	struct spec spec = any_spec();
	const uint8_t pushed[] = { 8, 0, 0, 0, 0, 0, 1, 0, 2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2 };

	spec.source_node = (uint8_t)(one_in(8) ? random_below(6) : 2);
	spec.destination_node = (uint8_t)(one_in(8) ? random_below(6) : 1);
	input->bytes[0] = (uint8_t)(one_in(8) ? random_below(6) : 2);
	input->bytes[1] = (uint8_t)random_below(4);
	memcpy(input->bytes + 2, pushed, sizeof(pushed));
	put16(input->bytes + 22, spec.ipv6 ? ETHERTYPE_IPV6 : ETHERTYPE_IPV4);
	spoil(input->bytes + 2, 22);
	input->size = 24;
	input->size += build(&spec, input->bytes + input->size);
	if (one_in(6))
		spoil(input->bytes + 24, 60);
	if (one_in(10))
		input->size -= random_below((uint32_t)input->size);
}
