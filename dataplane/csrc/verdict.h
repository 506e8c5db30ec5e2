/* SPDX-License-Identifier: Apache-2.0 */
#ifndef PYFLANNEL_VERDICT_H
#define PYFLANNEL_VERDICT_H

#include "context.h"

/* What decapsulation made of a datagram. */
struct decap {
	int drop; /* enum fp_drop, or -1: pass the packet on */
	int spoofed; /* enum fp_drop that mode `log` lets pass, or -1 */
	uint8_t *packet;
	const struct fib_entry *sender; /* NULL when unknown and let pass */
	struct flow flow; /* of the inner packet, once that was parsed; before, no source */
	uint8_t mac[ETH_ALEN]; /* once the frame was seen to have one */
};

/* The last answers of the FIB about senders; empty at the begin of each FIB section. */
struct sender_cache {
	const struct fib_entry *sender; /* of @outer_source and @mac; NULL: no answer yet */
	const struct fib_entry *owner; /* of @inner_source; NULL: no answer yet */
	struct inet_address outer_source;
	struct inet_address inner_source;
	uint8_t mac[ETH_ALEN];
};

/* What encapsulation made of a packet. */
struct encap {
	int drop;
	struct flow flow;
	uint8_t outer_tos;
	const struct fib_entry *peer;
};

void decap_datagram(const struct fp_ctx *ctx, struct sender_cache *cache, uint8_t *datagram,
		    size_t length, const struct inet_address *outer_source, uint8_t outer_tos,
		    struct decap *out);
void encap_packet(const struct fp_ctx *ctx, const uint8_t *packet, size_t length,
		  struct encap *out);

#endif
