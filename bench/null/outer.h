// Frames of the underlay for designs that pass the kernel's UDP by.

#ifndef BENCH_NULL_OUTER_H
#define BENCH_NULL_OUTER_H

#include <linux/if_ether.h>
#include <netinet/ip.h>
#include <netinet/udp.h>

#include "null.h"

struct outer {
	struct ethhdr ethernet;
	struct iphdr ip;
	struct udphdr udp;
} __attribute__((packed));

_Static_assert(sizeof(struct outer) == ETH_HLEN + 20 + 8, "as they go to the wire");

int open_outer(struct outer *outer, const struct options *options, int udp);
void set_lengths(struct outer *outer, size_t payload);
uint16_t pseudo_sum(const struct outer *outer);

#endif
