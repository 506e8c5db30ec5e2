/* SPDX-License-Identifier: Apache-2.0 */
/* The FIB against a list, with a reader that keeps an entry over changes: it must stay until it
 * leaves. */
#include "check.h"

#include "fib.h"

#define LISTED 300
#define ROUNDS 20000

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

void check_fib(void)
{
	static const uint8_t lengths[] = { 116, 120, 120, 120, 122, 128 };
	struct fib *fib = fib_new();
	struct fib_reader reader;
	size_t count = 0;

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
