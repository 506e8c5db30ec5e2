/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DOC: Which packets pass
 *
 * Packets of both directions are untrusted. On receive each rejection is one `if` with one drop
 * reason, in the order of enum fp_drop; the first six equal the kernel's vxlan_rcv(), the others
 * are the source checks that flannel lacks.
 */
#include "verdict.h"

#include "ecn.h"

/* The peer that `--peer-source` lets send from @source with @mac, or NULL. */
static const struct fib_entry *configured_sender(const struct fp_ctx *ctx,
						 const struct inet_address *source,
						 const uint8_t mac[ETH_ALEN], bool *known)
{
	for (size_t i = 0; i < ctx->config.peer_sources; i++) {
		const struct fp_peer_source *allowed = &ctx->config.peer_source[i];
		struct inet_address prefix = inet_from_octets(allowed->source);
		struct inet_address subnet = inet_from_octets(allowed->subnet);
		const struct fib_entry *peer;

		if (!inet_in(source, &prefix, allowed->source_len))
			continue;
		peer = fib_exact(ctx->fib, &subnet, allowed->subnet_len);
		if (!peer)
			continue;
		*known = true;
		if (memcmp(peer->mac, mac, ETH_ALEN) == 0 ||
		    (peer->has_previous_mac && memcmp(peer->previous_mac, mac, ETH_ALEN) == 0))
			return peer;
	}
	return NULL;
}

/* Find who sent a frame. Return: -1, or the drop reason */
static int find_sender(const struct fp_ctx *ctx, struct sender_cache *cache,
		       const struct inet_address *outer_source, const uint8_t mac[ETH_ALEN],
		       const struct fib_entry **sender)
{
	bool known = false;

	if (cache->sender && inet_equal(&cache->outer_source, outer_source) &&
	    memcmp(cache->mac, mac, ETH_ALEN) == 0) {
		*sender = cache->sender;
		return -1;
	}
	*sender = fib_sender(ctx->fib, outer_source, mac);
	if (!*sender)
		*sender = configured_sender(ctx, outer_source, mac, &known);
	if (*sender) {
		cache->sender = *sender;
		cache->outer_source = *outer_source;
		memcpy(cache->mac, mac, ETH_ALEN);
		return -1;
	}
	return known || fib_source(ctx->fib, outer_source) ? FP_DROP_VTEP_MAC
							   : FP_DROP_UNKNOWN_VTEP;
}

/* May @sender send from @source? Inside the network only from its own subnet. */
static bool source_allowed(const struct fp_ctx *ctx, struct sender_cache *cache,
			   const struct fib_entry *sender, const struct inet_address *source)
{
	const struct fib_entry *owner;

	if (cache->owner && inet_equal(&cache->inner_source, source))
		return cache->owner == sender;
	if (flow_bad_source(source))
		return false;
	if (!inet_in(source, &ctx->network, ctx->config.network_len))
		return true;
	owner = fib_lookup(ctx->fib, source);
	cache->owner = owner;
	cache->inner_source = *source;
	return owner && owner == sender;
}

/* Return: whether @reason drops; in mode `log` it is only noted */
static bool spoof_drops(const struct fp_ctx *ctx, int reason, struct decap *out)
{
	if (ctx->config.anti_spoofing == FP_SPOOF_ENFORCE) {
		out->drop = reason;
		return true;
	}
	if (out->spoofed < 0)
		out->spoofed = reason;
	return false;
}

/**
 * decap_datagram() - Check a VXLAN datagram and find the inner packet in it
 * @ctx:          Context, its FIB entered
 * @cache:        Zeroed when the FIB was entered
 * @datagram:     UDP payload; the inner ECN field may be rewritten
 * @length:       Bytes of it
 * @outer_source: Who sent it, as the outer IP header says
 * @outer_tos:    Outer TOS or traffic class
 * @out:          The verdict
 */
void decap_datagram(const struct fp_ctx *ctx, struct sender_cache *cache, uint8_t *datagram,
		    size_t length, const struct inet_address *outer_source, uint8_t outer_tos,
		    struct decap *out)
{
	const struct vxlan_push *push = (const struct vxlan_push *)datagram;
	struct flow *flow = &out->flow;
	uint16_t ethertype;
	int reason, ecn;

	/* Not all of it: that would take a quarter of this function's time. */
	out->drop = out->spoofed = -1;
	out->packet = NULL;
	out->sender = NULL;
	out->flow.source = (struct inet_address) { { 0 } };
	if (length < sizeof(*push)) {
		out->drop = FP_DROP_SHORT;
		return;
	}
	if (!(push->vxlan.flags & VXLAN_FLAG_VNI)) {
		out->drop = FP_DROP_NO_VNI_FLAG;
		return;
	}
	if (vxlan_reserved_set(&push->vxlan) && !ctx->config.ignore_reserved_bits) {
		out->drop = FP_DROP_RESERVED_BITS;
		return;
	}
	if (vxlan_vni(&push->vxlan) != ctx->config.vni) {
		out->drop = FP_DROP_WRONG_VNI;
		return;
	}
	memcpy(out->mac, push->eth.source, ETH_ALEN);
	reason = find_sender(ctx, cache, outer_source, out->mac, &out->sender);
	if (reason >= 0 && ctx->config.anti_spoofing != FP_SPOOF_OFF &&
	    spoof_drops(ctx, reason, out))
		return;
	if (memcmp(push->eth.source, ctx->config.mac, ETH_ALEN) == 0) {
		out->drop = FP_DROP_LOOP;
		return;
	}
	if (memcmp(push->eth.destination, ctx->config.mac, ETH_ALEN) != 0) {
		out->drop = FP_DROP_NOT_OUR_MAC;
		return;
	}
	ethertype = get_be16(push->eth.type);
	if (!(ethertype == ETHERTYPE_IPV4 && ctx->config.inner_ipv4) &&
	    !(ethertype == ETHERTYPE_IPV6 && ctx->config.inner_ipv6)) {
		out->drop = FP_DROP_ETHERTYPE;
		return;
	}
	out->packet = datagram + sizeof(*push);
	if (!flow_parse(out->packet, length - sizeof(*push), ethertype, flow)) {
		out->drop = FP_DROP_INNER_MALFORMED;
		return;
	}
	if (ctx->config.anti_spoofing != FP_SPOOF_OFF &&
	    !source_allowed(ctx, cache, out->sender, &flow->source) &&
	    spoof_drops(ctx, FP_DROP_INNER_SOURCE, out))
		return;
	ecn = ecn_pop(outer_tos & ECN_MASK, flow->ecn);
	if (ecn == ECN_DROP) {
		out->drop = FP_DROP_ECN;
		return;
	}
	if (ecn != flow->ecn)
		flow_set_ecn(out->packet, ethertype, (uint8_t)ecn);
}

/**
 * encap_packet() - Check an inner packet and find where it goes
 * @ctx:    Context, its FIB entered
 * @packet: From the first byte of the IP header; not changed
 * @length: Bytes of it
 * @out:    The verdict; its peer holds the 22 bytes to push
 */
void encap_packet(const struct fp_ctx *ctx, const uint8_t *packet, size_t length, struct encap *out)
{
	unsigned int version = length ? packet[0] >> 4 : 0;
	bool carried;

	*out = (struct encap) { .drop = -1 };
	if (version != 4 && version != 6) {
		out->drop = FP_DROP_ENCAP_MALFORMED;
		return;
	}
	carried = version == 4 ? ctx->config.inner_ipv4 : ctx->config.inner_ipv6;
	if (!flow_parse(packet, length, version == 4 ? ETHERTYPE_IPV4 : ETHERTYPE_IPV6,
			&out->flow)) {
		out->drop = carried ? FP_DROP_ENCAP_MALFORMED : FP_DROP_ENCAP_FAMILY;
		return;
	}
	if (flow_is_multicast(&out->flow.destination)) {
		out->drop = FP_DROP_ENCAP_MULTICAST;
		return;
	}
	if (!carried) {
		out->drop = FP_DROP_ENCAP_FAMILY;
		return;
	}
	out->peer = fib_lookup(ctx->fib, &out->flow.destination);
	if (!out->peer) {
		out->drop = FP_DROP_NO_ROUTE;
		return;
	}
	out->outer_tos = ecn_push(out->flow.ecn);
}
