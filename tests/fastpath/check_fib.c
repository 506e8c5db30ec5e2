/* SPDX-License-Identifier: Apache-2.0 */
/* The FIB against a list, with a reader that keeps an entry over changes: it
 * must stay until it leaves. */
#include "check.h"

/* How far a lookup walks is to be seen only from within. */
#include "fib.c"

#define LISTED 300
#define ROUNDS 20000
#define SPREAD 10000

struct listed {
	struct inet_address subnet;
	unsigned int length;
	uint8_t mac[ETH_ALEN];
	bool there;
};

static struct listed list[LISTED];

static const struct listed *best_of(const struct inet_address *address)
{
	const struct listed *best = NULL;

	for (int i = 0; i < LISTED; i++) {
		if (list[i].there && inet_in(address, &list[i].subnet, list[i].length) &&
		    (!best || list[i].length > best->length))
			best = &list[i];
	}
	return best;
}

static void change(struct fib *fib, struct listed *listed)
{
	struct fib_entry entry = {
		.subnet = listed->subnet,
		.subnet_length = (uint8_t)listed->length,
		.underlay = inet_from_ipv4((const uint8_t[]) { 192, 0, 2, 1 }),
		.has_previous_mac = random_below(2),
		.previous_mac = { 2, (uint8_t)random_below(4) },
	};

	if (random_below(2)) {
		for (int i = 0; i < ETH_ALEN; i++)
			listed->mac[i] = (uint8_t)random_below(256);
		memcpy(entry.mac, listed->mac, ETH_ALEN);
		HOLDS(fib_replace(fib, &entry) == 0);
		listed->there = true;
	} else {
		HOLDS((fib_delete(fib, &listed->subnet, listed->length) == 0) == listed->there);
		listed->there = false;
	}
}

/* Lookups cost the same whatever the number of routes: their slots are spread.
 */
static void check_spread(bool ipv6, unsigned int length)
{
	struct fib *fib = fib_new();
	struct table *table;
	size_t steps = 0;

	HOLDS(fib);
	for (unsigned int i = 0; i < SPREAD; i++) {
		struct fib_entry entry = { .subnet_length = (uint8_t)length };
		const uint8_t octets[] = { 10, 0, 0, 0 };
		unsigned int shift = 128 - length;

		entry.underlay = entry.subnet = inet_from_ipv4(octets);
		if (ipv6)
			entry.subnet = (struct inet_address) { { 0x20, 0x01, 0x0d, 0xb8 } };
		for (unsigned int bit = 0; bit < 14; bit++) {
			if (i >> bit & 1)
				entry.subnet.octet[15 - (bit + shift) / 8] |=
					(uint8_t)(1 << (bit + shift) % 8);
		}
		entry.underlay.octet[14] = entry.mac[4] = (uint8_t)(i >> 8);
		entry.underlay.octet[15] = entry.mac[5] = (uint8_t)i;
		HOLDS(fib_replace(fib, &entry) == 0);
	}
	for (enum index index = ROUTES; index < INDEXES; index++) {
		table = atomic_load(&fib->table[index]);
		for (size_t i = 0; i <= table->mask; i++) {
			const struct fib_entry *entry = atomic_load(&table->slot[i]);
			uint64_t hash[2];

			if (entry && entry != &tombstone) {
				entry_hashes(index, entry, hash);
				steps += (i - hash[0]) & table->mask;
			}
		}
		HOLDS(table->live == SPREAD && steps < SPREAD);
		steps = 0;
	}
	fib_free(fib);
}

void check_fib(void)
{
	static const uint8_t lengths[] = { 116, 120, 120, 120, 122, 128 };
	struct fib *fib = fib_new();
	struct fib_reader reader;
	size_t count = 0;

	check_spread(false, INET_MAPPED_BITS + 24);
	check_spread(false, INET_MAPPED_BITS + 28);
	check_spread(true, 64);
	HOLDS(fib);
	fib_reader_add(fib, &reader);
	for (int i = 0; i < LISTED; i++) {
		const uint8_t octets[] = { 10, (uint8_t)(i / 128), (uint8_t)(2 * i), 0 };

		list[i].length = lengths[random_below(sizeof(lengths))];
		list[i].subnet = inet_mask(inet_from_ipv4(octets), list[i].length);
		for (int j = 0; j < i; j++) {
			if (list[j].length == list[i].length &&
			    inet_equal(&list[j].subnet, &list[i].subnet))
				list[i].subnet.octet[12] = (uint8_t)(20 + i % 200);
		}
	}
	for (int round = 0; round < ROUNDS; round++) {
		struct listed *listed = &list[random_below(LISTED)];
		const struct fib_entry *entry;
		const struct listed *best;
		uint8_t mac[ETH_ALEN];

		fib_enter(fib, &reader);
		entry = fib_lookup(fib, &listed->subnet);
		best = best_of(&listed->subnet);
		HOLDS(!entry == !best);
		if (entry) {
			HOLDS(inet_equal(&entry->subnet, &best->subnet) &&
			      memcmp(entry->mac, best->mac, ETH_ALEN) == 0);
			HOLDS(fib_sender(fib, &entry->underlay, entry->mac));
			memcpy(mac, entry->mac, ETH_ALEN);
		}
		change(fib, &list[entry ? (size_t)(best - list) : random_below(LISTED)]);
		if (entry)
			HOLDS(memcmp(mac, entry->mac, ETH_ALEN) == 0 && entry->traffic->drops == 0);
		fib_leave(&reader);
	}
	for (int i = 0; i < LISTED; i++)
		count += list[i].there;
	HOLDS(fib_count(fib) == count);
	fib_reader_remove(fib, &reader);
	fib_free(fib);
}
