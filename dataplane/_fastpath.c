/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DOC: Theory of Operation
 *
 * A context (struct fp_ctx) is one VNI of one daemon: its configuration and its FIB. Workers
 * (csrc/worker.c) move packets between TUN queues and the UDP sockets; each has its own buffers
 * and counters and shares nothing writable with another worker but the per-peer counters.
 *
 *	TUN -> read at headroom -> encap_packet() -> push 22 bytes in place -> sendmmsg per socket
 *	UDP -> recvmmsg -> decap_datagram() -> vnet header + inner packet -> writev to the TUN
 *
 * The two checks (csrc/verdict.c) do no I/O, so that they can be tested and fuzzed alone.
 * Encapsulation never changes the inner packet; decapsulation changes at most its ECN field.
 * Neither touches the TTL: the hosts on both ends route, and decrement it.
 *
 * This file is what Python calls: contexts, routes, and what is counted.
 */
#define _GNU_SOURCE
#include "_fastpath.h"

#include <errno.h>
#include <stdlib.h>

#include "verdict.h"
#include "worker.h"

static const char *const drop_names[] = {
	[FP_DROP_SHORT] = "short",
	[FP_DROP_NO_VNI_FLAG] = "no_vni_flag",
	[FP_DROP_RESERVED_BITS] = "reserved_bits",
	[FP_DROP_WRONG_VNI] = "wrong_vni",
	[FP_DROP_UNKNOWN_VTEP] = "unknown_vtep",
	[FP_DROP_VTEP_MAC] = "vtep_mac",
	[FP_DROP_LOOP] = "loop",
	[FP_DROP_NOT_OUR_MAC] = "not_our_mac",
	[FP_DROP_ETHERTYPE] = "ethertype",
	[FP_DROP_INNER_MALFORMED] = "inner_malformed",
	[FP_DROP_INNER_SOURCE] = "inner_source",
	[FP_DROP_ECN] = "ecn",
	[FP_DROP_TUN_DOWN] = "tun_down",
	[FP_DROP_TUN_WRITE] = "tun_write",
	[FP_DROP_ENCAP_MALFORMED] = "encap_malformed",
	[FP_DROP_ENCAP_FAMILY] = "encap_family",
	[FP_DROP_ENCAP_MULTICAST] = "encap_multicast",
	[FP_DROP_NO_ROUTE] = "no_route",
	[FP_DROP_SEND_UNREACHABLE] = "send_unreachable",
	[FP_DROP_SEND_DENIED] = "send_denied",
	[FP_DROP_SEND_SIZE] = "send_size",
	[FP_DROP_SEND_BUFFER] = "send_buffer",
	[FP_DROP_SEND_ERROR] = "send_error",
};
static_assert(sizeof(drop_names) / sizeof(drop_names[0]) == FP_DROP_REASONS,
	      "every drop reason has a name");

/**
 * fp_drop_name() - Name of a drop reason, as metrics show it
 *
 * Return: a static string, or NULL outside of the enum
 */
const char *fp_drop_name(int reason)
{
	return reason >= 0 && reason < FP_DROP_REASONS ? drop_names[reason] : NULL;
}

/**
 * fp_ctx_new() - Make a context with an empty FIB
 * @config: Copied, with the peer sources behind it
 *
 * Return: the context, or NULL without memory
 */
struct fp_ctx *fp_ctx_new(const struct fp_config *config)
{
	struct fp_ctx *ctx = calloc(1, sizeof(*ctx));
	size_t bytes = config->peer_sources * sizeof(*config->peer_source);
	struct fp_peer_source *sources = malloc(bytes + 1);

	if (ctx)
		ctx->fib = fib_new();
	if (!ctx || !sources || !ctx->fib) {
		if (ctx && ctx->fib)
			fib_free(ctx->fib);
		free(sources);
		free(ctx);
		return NULL;
	}
	ctx->config = *config;
	if (bytes)
		memcpy(sources, config->peer_source, bytes);
	ctx->config.peer_source = sources;
	ctx->network = inet_from_octets(config->network);
	pthread_mutex_init(&ctx->lock, NULL);
	fib_reader_add(ctx->fib, &ctx->caller);
	return ctx;
}

/** fp_ctx_free() - Free a context whose workers are freed */
void fp_ctx_free(struct fp_ctx *ctx)
{
	assert(!ctx->workers);
	fib_reader_remove(ctx->fib, &ctx->caller);
	fib_free(ctx->fib);
	pthread_mutex_destroy(&ctx->lock);
	free((void *)ctx->config.peer_source);
	free(ctx);
}

/**
 * fp_route_replace() - Publish a route while packets flow
 *
 * Return: 0, or EINVAL, ENOMEM
 */
int fp_route_replace(struct fp_ctx *ctx, const struct fp_route *route)
{
	struct fib_entry entry = {
		.subnet = inet_from_octets(route->subnet),
		.subnet_length = route->subnet_len,
		.has_previous_mac = route->has_previous_mac,
		.port = route->port,
		.underlay = inet_from_octets(route->underlay),
		.push.vxlan = vxlan_header_of(ctx->config.vni),
	};

	memcpy(entry.mac, route->mac, ETH_ALEN);
	memcpy(entry.previous_mac, route->previous_mac, ETH_ALEN);
	memcpy(entry.push.eth.destination, route->mac, ETH_ALEN);
	memcpy(entry.push.eth.source, ctx->config.mac, ETH_ALEN);
	entry.push.eth.type =
		put_be16(inet_is_ipv4(&entry.subnet) ? ETHERTYPE_IPV4 : ETHERTYPE_IPV6);
	return fib_replace(ctx->fib, &entry);
}

/**
 * fp_route_delete() - Remove a route while packets flow
 *
 * Return: 0, or ESRCH, ENOMEM
 */
int fp_route_delete(struct fp_ctx *ctx, const uint8_t *subnet, uint8_t subnet_len)
{
	struct inet_address prefix = inet_from_octets(subnet);

	return fib_delete(ctx->fib, &prefix, subnet_len);
}

static void route_of(const struct fib_entry *entry, struct fp_route *route)
{
	*route = (struct fp_route) {
		.subnet_len = entry->subnet_length,
		.has_previous_mac = entry->has_previous_mac,
		.port = entry->port,
	};
	memcpy(route->subnet, &entry->subnet, 16);
	memcpy(route->underlay, &entry->underlay, 16);
	memcpy(route->mac, entry->mac, ETH_ALEN);
	memcpy(route->previous_mac, entry->previous_mac, ETH_ALEN);
}

/* Sections of Python's own look-ups; the lock lets several threads share one reader. */
static void caller_enter(struct fp_ctx *ctx)
{
	pthread_mutex_lock(&ctx->lock);
	fib_enter(ctx->fib, &ctx->caller);
}

static void caller_leave(struct fp_ctx *ctx)
{
	fib_leave(&ctx->caller);
	pthread_mutex_unlock(&ctx->lock);
}

/**
 * fp_route_lookup() - The route that a packet to @address would take
 *
 * Return: 0 and @found written, or ESRCH
 */
int fp_route_lookup(struct fp_ctx *ctx, const uint8_t *address, struct fp_route *found)
{
	struct inet_address key = inet_from_octets(address);
	const struct fib_entry *entry;

	caller_enter(ctx);
	entry = fib_lookup(ctx->fib, &key);
	if (entry)
		route_of(entry, found);
	caller_leave(ctx);
	return entry ? 0 : ESRCH;
}

/** fp_route_count() - Number of routes */
size_t fp_route_count(struct fp_ctx *ctx)
{
	return fib_count(ctx->fib);
}

struct traffic_copy {
	struct fp_peer_traffic *into;
	size_t capacity;
	size_t count;
};

static void copy_traffic(const struct fib_entry *entry, void *arg)
{
	struct traffic_copy *copy = arg;
	struct fp_peer_traffic *into = copy->into + copy->count;

	if (copy->count == copy->capacity)
		return;
	copy->count++;
	memcpy(into->subnet, &entry->subnet, 16);
	into->subnet_len = entry->subnet_length;
	into->traffic = (struct fp_traffic) {
		.encap_packets = entry->traffic->encap_packets,
		.encap_bytes = entry->traffic->encap_bytes,
		.decap_packets = entry->traffic->decap_packets,
		.decap_bytes = entry->traffic->decap_bytes,
	};
	into->drops = entry->traffic->drops;
	into->heard_ms = entry->traffic->heard_ms;
}

/**
 * fp_peers_traffic() - Counters of up to @capacity peers
 *
 * Return: how many were written
 */
size_t fp_peers_traffic(struct fp_ctx *ctx, struct fp_peer_traffic *into, size_t capacity)
{
	struct traffic_copy copy = { into, capacity, 0 };

	fib_each(ctx->fib, copy_traffic, &copy);
	return copy.count;
}

/** fp_counters_read() - Sum of the counters of all workers, past ones included */
void fp_counters_read(struct fp_ctx *ctx, struct fp_counters *into)
{
	pthread_mutex_lock(&ctx->lock);
	*into = ctx->gone;
	for (struct fp_worker *worker = ctx->workers; worker; worker = worker_next(worker))
		worker_add_counters(worker, into);
	pthread_mutex_unlock(&ctx->lock);
}

/**
 * fp_suspects_take() - Packets that failed a source check since the last call
 *
 * Return: how many were written; floods are sampled, the counters are complete
 */
size_t fp_suspects_take(struct fp_ctx *ctx, struct fp_suspect *into, size_t capacity)
{
	size_t count = 0;

	pthread_mutex_lock(&ctx->lock);
	for (struct fp_worker *worker = ctx->workers; worker; worker = worker_next(worker))
		count += worker_take_suspects(worker, into + count, capacity - count);
	pthread_mutex_unlock(&ctx->lock);
	return count;
}

/**
 * fp_decap_check() - Decapsulate one datagram without I/O, for tests and diagnosis
 *
 * Return: -1 and the inner packet's place, or the drop reason
 */
int fp_decap_check(struct fp_ctx *ctx, uint8_t *datagram, size_t length,
		   const uint8_t *outer_source, uint8_t outer_tos, size_t *inner_offset,
		   size_t *inner_length)
{
	struct inet_address source = inet_from_octets(outer_source);
	struct sender_cache cache = { 0 };
	struct decap out;

	caller_enter(ctx);
	decap_datagram(ctx, &cache, datagram, length, &source, outer_tos, &out);
	caller_leave(ctx);
	if (out.drop < 0) {
		*inner_offset = (size_t)(out.packet - datagram);
		*inner_length = out.flow.length;
	}
	return out.drop;
}

/**
 * fp_encap_check() - Encapsulate one packet without I/O, for tests and diagnosis
 * @header: 22 bytes: what is pushed in front of the packet
 *
 * Return: -1 and all of the results, or the drop reason
 */
int fp_encap_check(struct fp_ctx *ctx, const uint8_t *packet, size_t length, uint8_t *header,
		   uint8_t *outer_tos, uint32_t *flow, struct fp_route *found)
{
	struct encap out;

	caller_enter(ctx);
	encap_packet(ctx, packet, length, &out);
	if (out.drop < 0) {
		memcpy(header, &out.peer->push, sizeof(out.peer->push));
		*outer_tos = out.outer_tos;
		*flow = out.flow.hash;
		route_of(out.peer, found);
	}
	caller_leave(ctx);
	return out.drop;
}
