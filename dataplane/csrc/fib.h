/* SPDX-License-Identifier: Apache-2.0 */
#ifndef PYFLANNEL_FIB_H
#define PYFLANNEL_FIB_H

#include <stdatomic.h>

#include "vxlan.h"

/* Counters outlive a change of their route's next hop; relaxed, several workers add. */
struct fib_traffic {
	_Atomic uint64_t encap_packets, encap_bytes, decap_packets, decap_bytes, drops;
	_Atomic uint64_t heard_ms; /* when a packet came last, of CLOCK_MONOTONIC; 0: never */
	_Atomic unsigned int unsegmented; /* messages for which segmented sends are not tried */
};

/* Immutable once published: a change makes a new entry. */
struct fib_entry {
	struct inet_address subnet;
	uint8_t subnet_length;
	bool has_previous_mac;
	uint8_t mac[ETH_ALEN];
	uint8_t previous_mac[ETH_ALEN];
	uint16_t port;
	struct inet_address underlay;
	struct vxlan_push push;
	struct fib_traffic *traffic;
};

/* A reader's mark: 0 outside of a section, else the epoch in which the section began. */
struct fib_reader {
	_Atomic uint64_t epoch;
	struct fib_reader *next;
};

struct fib;

struct fib *fib_new(void);
void fib_free(struct fib *fib);

void fib_reader_add(struct fib *fib, struct fib_reader *reader);
void fib_reader_remove(struct fib *fib, struct fib_reader *reader);
void fib_enter(struct fib *fib, struct fib_reader *reader);
void fib_leave(struct fib_reader *reader);

int fib_replace(struct fib *fib, const struct fib_entry *entry);
int fib_delete(struct fib *fib, const struct inet_address *subnet, unsigned int length);
size_t fib_count(struct fib *fib);
void fib_each(struct fib *fib, void (*visit)(const struct fib_entry *entry, void *arg), void *arg);

const struct fib_entry *fib_lookup(const struct fib *fib, const struct inet_address *address);
const struct fib_entry *fib_exact(const struct fib *fib, const struct inet_address *subnet,
				  unsigned int length);
const struct fib_entry *fib_sender(const struct fib *fib, const struct inet_address *underlay,
				   const uint8_t mac[ETH_ALEN]);
const struct fib_entry *fib_source(const struct fib *fib, const struct inet_address *underlay);

#endif
