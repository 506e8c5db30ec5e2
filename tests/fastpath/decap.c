/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Invariant of decapsulation. Whatever datagram comes from wherever: nothing outside of it is read
 * or written, each rejection has one reason, and with anti-spoofing enforced a packet that passes
 *  - lies wholly inside of the datagram, behind the 22 bytes that were pushed, and is sound;
 *  - is of our VNI, to our MAC, from the address and MAC of a peer;
 *  - has an inner source of that peer's subnet, or one outside of the network;
 *  - is as it was sent but for the two ECN bits (and the IPv4 checksum over them).
 * And decap(encap(x)) = x for every x that a peer would encapsulate.
 *
 * Input: the peer that it comes from, the outer TOS, the datagram.
 */
#include "invariants.h"

#include "verdict.h"
#include "ecn.h"

#define PEERS 4
#define VNI 1
#define OUR_SUBNET 1

/* Node n has the subnets 10.5.n.0/24 and 2001:db8:0:n::/64, address 192.0.2.n, MAC 02:..:n. */
static struct inet_address subnet_of(uint8_t node, bool ipv6)
{
	struct inet_address address = inet_from_ipv4((const uint8_t[]) { 10, 5, node, 0 });

	if (ipv6)
		address = (struct inet_address) { { 0x20, 0x01, 0x0d, 0xb8, [7] = node } };
	return address;
}

static struct inet_address underlay_of(uint8_t node)
{
	return inet_from_ipv4((const uint8_t[]) { 192, 0, 2, node });
}

static struct fp_ctx *node_new(uint8_t node, bool ipv6)
{
	struct fp_config config = {
		.vni = VNI,
		.mac = { 2, 0, 0, 0, 0, node },
		.network_len = ipv6 ? 48 : INET_MAPPED_BITS + 16,
		.anti_spoofing = FP_SPOOF_ENFORCE,
		.inner_ipv4 = !ipv6,
		.inner_ipv6 = ipv6,
	};
	struct inet_address network = inet_mask(subnet_of(0, ipv6), config.network_len);
	struct fp_ctx *ctx;

	memcpy(config.network, &network, sizeof(network));
	ctx = fp_ctx_new(&config);
	HOLDS(ctx);
	for (uint8_t peer = 1; peer <= PEERS; peer++) {
		struct fp_route route = {
			.subnet_len = ipv6 ? 64 : INET_MAPPED_BITS + 24,
			.mac = { 2, 0, 0, 0, 0, peer },
			.port = 8472,
		};
		struct inet_address subnet = subnet_of(peer, ipv6), underlay = underlay_of(peer);

		memcpy(route.subnet, &subnet, sizeof(subnet));
		memcpy(route.underlay, &underlay, sizeof(underlay));
		if (peer != node)
			HOLDS(fp_route_replace(ctx, &route) == 0);
	}
	return ctx;
}

/* Our node and a peer's, in one family; made once. */
struct nodes {
	struct fp_ctx *ours, *theirs;
};

static const struct nodes *nodes(bool ipv6)
{
	static struct nodes made[2];

	if (!made[ipv6].ours)
		made[ipv6] = (struct nodes) { node_new(OUR_SUBNET, ipv6), node_new(2, ipv6) };
	return &made[ipv6];
}

static void passed_holds(const struct fp_ctx *ctx, uint8_t peer, uint8_t tos, const uint8_t *before,
			 const uint8_t *datagram, size_t length, const struct decap *out)
{
	const struct vxlan_push *push = (const struct vxlan_push *)datagram;
	struct inet_address subnet = subnet_of(peer, ctx->config.inner_ipv6);
	const struct flow *flow = &out->flow;
	struct flow again;
	bool ipv6 = ctx->config.inner_ipv6;
	uint8_t *restored = exactly(datagram, length);
	uint8_t *packet = restored + sizeof(*push);

	HOLDS(out->packet == datagram + sizeof(*push));
	HOLDS(flow->length <= length - sizeof(*push));
	HOLDS(peer > OUR_SUBNET && peer <= PEERS && out->sender);
	HOLDS(vxlan_vni(&push->vxlan) == VNI);
	HOLDS(memcmp(push->eth.destination, ctx->config.mac, ETH_ALEN) == 0);
	HOLDS(memcmp(push->eth.source, (const uint8_t[]) { 2, 0, 0, 0, 0, peer }, ETH_ALEN) == 0);
	HOLDS(get_be16(push->eth.type) == (ipv6 ? ETHERTYPE_IPV6 : ETHERTYPE_IPV4));
	HOLDS(inet_in(&flow->source, &subnet, ipv6 ? 64 : INET_MAPPED_BITS + 24) ||
	      !inet_in(&flow->source, &ctx->network, ctx->config.network_len));
	HOLDS(flow_parse(packet, flow->length, get_be16(push->eth.type), &again));
	HOLDS(again.ecn == ecn_pop(tos & ECN_MASK, flow->ecn));
	flow_set_ecn(packet, get_be16(push->eth.type), flow->ecn);
	if (!ipv6 && again.ecn != flow->ecn)
		memcpy(packet + offsetof(struct ipv4_header, checksum),
		       before + sizeof(*push) + offsetof(struct ipv4_header, checksum), 2);
	HOLDS(memcmp(restored, before, length) == 0);
	free(restored);
}

static void decap_one(bool ipv6, uint8_t peer, uint8_t tos, const uint8_t *input, size_t size)
{
	const struct fp_ctx *ctx = nodes(ipv6)->ours;
	struct inet_address source = underlay_of(peer);
	struct sender_cache cache = { 0 };
	int verdict[2];

	/* The second time the cache answers. */
	for (int i = 0; i < 2; i++) {
		uint8_t *datagram = exactly(input, size);
		struct decap out;

		decap_datagram(ctx, &cache, datagram, size, &source, tos, &out);
		HOLDS(out.drop >= -1 && out.drop <= FP_DROP_ECN && out.spoofed == -1);
		if (out.drop < 0)
			passed_holds(ctx, peer, tos, input, datagram, size, &out);
		else
			HOLDS(memcmp(datagram, input, size) == 0);
		verdict[i] = out.drop;
		free(datagram);
	}
	HOLDS(verdict[0] == verdict[1]);
}

/* The peer sends us the inner packet, if it is one that it would send us. */
static void round_trip_holds(bool ipv6, const uint8_t *input, size_t size)
{
	uint8_t *packet = exactly(input, size), *datagram;
	struct inet_address source = underlay_of(2), subnet = subnet_of(2, ipv6);
	struct sender_cache cache = { 0 };
	struct encap sent;
	struct decap got;

	encap_packet(nodes(ipv6)->theirs, packet, size, &sent);
	HOLDS(memcmp(packet, input, size) == 0);
	if (sent.drop < 0) {
		size = sent.flow.length;
		datagram = malloc(sizeof(sent.peer->push) + size);
		HOLDS(datagram);
		memcpy(datagram, &sent.peer->push, sizeof(sent.peer->push));
		memcpy(datagram + sizeof(sent.peer->push), packet, size);
		decap_datagram(nodes(ipv6)->ours, &cache, datagram, sizeof(sent.peer->push) + size,
			       &source, sent.outer_tos, &got);
		if (sent.peer->mac[5] != OUR_SUBNET)
			HOLDS(got.drop == FP_DROP_NOT_OUR_MAC);
		else if (inet_in(&sent.flow.source, &subnet, ipv6 ? 64 : INET_MAPPED_BITS + 24))
			HOLDS(got.drop < 0 && got.flow.length == size &&
			      memcmp(got.packet, packet, size) == 0);
		else
			HOLDS(got.drop < 0 || got.drop == FP_DROP_INNER_SOURCE);
		free(datagram);
	}
	free(packet);
}

void decap_holds(const uint8_t *input, size_t size)
{
	if (size < 2)
		return;
	for (int ipv6 = 0; ipv6 < 2; ipv6++) {
		decap_one(ipv6, input[0], input[1], input + 2, size - 2);
		if (size >= 2 + sizeof(struct vxlan_push))
			round_trip_holds(ipv6, input + 2 + sizeof(struct vxlan_push),
					 size - 2 - sizeof(struct vxlan_push));
	}
}
