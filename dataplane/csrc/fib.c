/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DOC: Theory of Operation
 *
 * Three hash tables with open addressing hold pointers to immutable entries:
 *
 *   routes    (subnet, length)       longest prefix first, over the lengths in use
 *   senders   (underlay, VTEP MAC)   who sent this packet; also under the previous MAC
 *   sources   (underlay)             tells an unknown host from a known one with a wrong MAC
 *
 * flannel gives all subnets of a network one length, so a lookup is one probe, whatever the number
 * of routes. Slots are atomic pointers: readers take no lock and see either the old or the new
 * entry. Writers hold a mutex. What a writer unlinks it frees when every reader that was inside a
 * section at that time has left it (epoch-based reclamation).
 *
 * A probe ends at an empty slot; a deleted entry leaves a tombstone. A table in which entries and
 * tombstones fill half the slots is rebuilt aside and swapped.
 */
#include "fib.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

#define TABLE_SLOTS_MIN 64

struct table {
	size_t mask;
	size_t live;
	size_t used; /* live and tombstones */
	_Atomic(const struct fib_entry *) slot[];
};

enum index { ROUTES, SENDERS, SOURCES, INDEXES };

struct retired {
	void *memory;
	uint64_t epoch;
	struct retired *next;
};

struct fib {
	_Atomic(struct table *) table[INDEXES];
	_Atomic uint64_t lengths[2]; /* bit length-1: some route has this prefix length */
	size_t length_count[129];
	_Atomic uint64_t epoch;
	pthread_mutex_t writer;
	struct fib_reader *readers;
	struct retired *retired;
};

static const struct fib_entry tombstone;

static uint64_t hash_bytes(uint64_t seed, const uint8_t *bytes, size_t length)
{
	uint64_t value = seed * 0x9e3779b97f4a7c15ULL;

	for (size_t i = 0; i < length; i += 8) {
		uint64_t word = 0;

		memcpy(&word, bytes + i, length - i < 8 ? length - i : 8);
		value = (value ^ word) * 0xff51afd7ed558ccdULL;
		value ^= value >> 32;
	}
	/* The low bits choose the slot, and subnets differ in high ones of their last word. */
	value *= 0xc4ceb9fe1a85ec53ULL;
	return value ^ value >> 32;
}

static uint64_t route_hash(const struct inet_address *subnet, unsigned int length)
{
	return hash_bytes(length, subnet->octet, sizeof(subnet->octet));
}

static uint64_t source_hash(const struct inet_address *underlay)
{
	return hash_bytes(200, underlay->octet, sizeof(underlay->octet));
}

static uint64_t sender_hash(const struct inet_address *underlay, const uint8_t mac[ETH_ALEN])
{
	return hash_bytes(source_hash(underlay), mac, ETH_ALEN);
}

static struct table *table_new(size_t live)
{
	size_t slots = TABLE_SLOTS_MIN;
	struct table *table;

	while (slots < live * 4)
		slots *= 2;
	table = calloc(1, sizeof(*table) + slots * sizeof(table->slot[0]));
	if (table)
		table->mask = slots - 1;
	return table;
}

/* The table must have a free slot. */
static void table_insert(struct table *table, uint64_t hash, const struct fib_entry *entry)
{
	size_t i = hash & table->mask;

	while (atomic_load_explicit(&table->slot[i], memory_order_relaxed))
		i = (i + 1) & table->mask;
	atomic_store_explicit(&table->slot[i], entry, memory_order_release);
	table->live++;
	table->used++;
}

static void table_remove(struct table *table, uint64_t hash, const struct fib_entry *entry)
{
	size_t i = hash & table->mask;
	const struct fib_entry *found;

	while ((found = atomic_load_explicit(&table->slot[i], memory_order_relaxed)) != NULL) {
		if (found == entry) {
			atomic_store_explicit(&table->slot[i], &tombstone, memory_order_release);
			table->live--;
			return;
		}
		i = (i + 1) & table->mask;
	}
}

/* Both hashes of an entry in @index; the second is of its previous MAC, if it has one. */
static unsigned int entry_hashes(enum index index, const struct fib_entry *entry, uint64_t hash[2])
{
	switch (index) {
	case ROUTES:
		hash[0] = route_hash(&entry->subnet, entry->subnet_length);
		return 1;
	case SENDERS:
		hash[0] = sender_hash(&entry->underlay, entry->mac);
		hash[1] = sender_hash(&entry->underlay, entry->previous_mac);
		return entry->has_previous_mac ? 2 : 1;
	default:
		hash[0] = source_hash(&entry->underlay);
		return 1;
	}
}

static void index_entry(struct table *table, enum index index, const struct fib_entry *entry)
{
	uint64_t hash[2];
	unsigned int count = entry_hashes(index, entry, hash);

	for (unsigned int i = 0; i < count; i++)
		table_insert(table, hash[i], entry);
}

static void unindex_entry(struct table *table, enum index index, const struct fib_entry *entry)
{
	uint64_t hash[2];
	unsigned int count = entry_hashes(index, entry, hash);

	for (unsigned int i = 0; i < count; i++)
		table_remove(table, hash[i], entry);
}

static uint64_t oldest_reader(struct fib *fib)
{
	uint64_t oldest = UINT64_MAX;

	atomic_thread_fence(memory_order_seq_cst);
	for (struct fib_reader *reader = fib->readers; reader; reader = reader->next) {
		uint64_t epoch = atomic_load(&reader->epoch);

		if (epoch != 0 && epoch < oldest)
			oldest = epoch;
	}
	return oldest;
}

static void reclaim(struct fib *fib)
{
	uint64_t oldest = oldest_reader(fib);
	struct retired **link = &fib->retired;

	while (*link) {
		struct retired *retired = *link;

		if (retired->epoch <= oldest) {
			*link = retired->next;
			free(retired->memory);
			free(retired);
		} else {
			link = &retired->next;
		}
	}
}

/* Every reader that can still hold @memory entered in an epoch before the one made here. */
static void retire(struct fib *fib, void *memory, struct retired *retired)
{
	retired->memory = memory;
	retired->epoch = atomic_fetch_add(&fib->epoch, 1) + 1;
	retired->next = fib->retired;
	fib->retired = retired;
}

/* Make room for two more entries in @index, rebuilding its table if half of it is used. */
static int reserve(struct fib *fib, enum index index)
{
	struct table *old = atomic_load(&fib->table[index]);
	struct retired *retired;
	struct table *table, *routes;

	if ((old->used + 2) * 2 <= old->mask + 1)
		return 0;
	table = table_new(old->live + 2);
	retired = malloc(sizeof(*retired));
	if (!table || !retired) {
		free(table);
		free(retired);
		return ENOMEM;
	}
	routes = atomic_load(&fib->table[ROUTES]);
	for (size_t i = 0; i <= routes->mask; i++) {
		const struct fib_entry *entry = atomic_load(&routes->slot[i]);

		if (entry && entry != &tombstone)
			index_entry(table, index, entry);
	}
	atomic_store(&fib->table[index], table);
	retire(fib, old, retired);
	return 0;
}

static void count_length(struct fib *fib, unsigned int length, int change)
{
	_Atomic uint64_t *word = &fib->lengths[(length - 1) / 64];
	uint64_t bit = 1ULL << (length - 1) % 64;

	fib->length_count[length] += (size_t)change;
	if (fib->length_count[length])
		atomic_fetch_or(word, bit);
	else
		atomic_fetch_and(word, ~bit);
}

/** fib_new() - An empty table; NULL without memory */
struct fib *fib_new(void)
{
	struct fib *fib = calloc(1, sizeof(*fib));

	if (!fib)
		return NULL;
	atomic_store(&fib->epoch, 1);
	pthread_mutex_init(&fib->writer, NULL);
	for (int index = 0; index < INDEXES; index++) {
		struct table *table = table_new(0);

		if (!table) {
			fib_free(fib);
			return NULL;
		}
		atomic_store(&fib->table[index], table);
	}
	return fib;
}

/** fib_free() - Free the table; no reader and no writer may be left */
void fib_free(struct fib *fib)
{
	struct table *routes = atomic_load(&fib->table[ROUTES]);

	assert(!fib->readers);
	reclaim(fib);
	for (size_t i = 0; routes && i <= routes->mask; i++) {
		const struct fib_entry *entry = atomic_load(&routes->slot[i]);

		if (entry && entry != &tombstone) {
			free(entry->traffic);
			free((void *)entry);
		}
	}
	for (int index = 0; index < INDEXES; index++)
		free(atomic_load(&fib->table[index]));
	pthread_mutex_destroy(&fib->writer);
	free(fib);
}

/** fib_reader_add() - Register a reader, once, before its first fib_enter() */
void fib_reader_add(struct fib *fib, struct fib_reader *reader)
{
	pthread_mutex_lock(&fib->writer);
	atomic_store(&reader->epoch, 0);
	reader->next = fib->readers;
	fib->readers = reader;
	pthread_mutex_unlock(&fib->writer);
}

/** fib_reader_remove() - Forget a reader that is outside of a section */
void fib_reader_remove(struct fib *fib, struct fib_reader *reader)
{
	pthread_mutex_lock(&fib->writer);
	for (struct fib_reader **link = &fib->readers; *link; link = &(*link)->next) {
		if (*link == reader) {
			*link = reader->next;
			break;
		}
	}
	pthread_mutex_unlock(&fib->writer);
}

/** fib_enter() - Begin a section in which entries that were found stay valid */
void fib_enter(struct fib *fib, struct fib_reader *reader)
{
	atomic_store(&reader->epoch, atomic_load(&fib->epoch));
	/* The mark must be seen before any table is read, also where acquire is weaker than SC. */
	atomic_thread_fence(memory_order_seq_cst);
}

/** fib_leave() - End the section */
void fib_leave(struct fib_reader *reader)
{
	atomic_store_explicit(&reader->epoch, 0, memory_order_release);
}

/**
 * fib_replace() - Publish a route, in place of the one with the same subnet
 * @fib:   Table
 * @entry: Copied; its traffic pointer is ignored, counters go on from the replaced route
 *
 * Return: 0, EINVAL for bits behind the prefix or length 0, ENOMEM
 */
int fib_replace(struct fib *fib, const struct fib_entry *entry)
{
	struct fib_entry *fresh = malloc(sizeof(*fresh));
	struct retired *retired = malloc(sizeof(*retired));
	struct fib_traffic *traffic = calloc(1, sizeof(*traffic));
	const struct fib_entry *old;
	int err = 0;

	if (entry->subnet_length < 1 || entry->subnet_length > 128 ||
	    !inet_in(&entry->subnet, &entry->subnet, entry->subnet_length))
		err = EINVAL;
	else if (!fresh || !retired || !traffic)
		err = ENOMEM;
	if (err)
		goto out;

	pthread_mutex_lock(&fib->writer);
	for (int index = 0; index < INDEXES && !err; index++)
		err = reserve(fib, index);
	if (err)
		goto unlock;
	old = fib_exact(fib, &entry->subnet, entry->subnet_length);
	*fresh = *entry;
	fresh->traffic = old ? old->traffic : traffic;
	if (!old)
		traffic = NULL;

	count_length(fib, fresh->subnet_length, 1);
	/* The new entry is found before the old one is gone: no packet falls between them. */
	for (int index = SENDERS; index < INDEXES; index++)
		index_entry(atomic_load(&fib->table[index]), index, fresh);
	if (old) {
		struct table *routes = atomic_load(&fib->table[ROUTES]);
		size_t i = route_hash(&old->subnet, old->subnet_length) & routes->mask;

		while (atomic_load(&routes->slot[i]) != old)
			i = (i + 1) & routes->mask;
		atomic_store(&routes->slot[i], fresh);
		for (int index = SENDERS; index < INDEXES; index++)
			unindex_entry(atomic_load(&fib->table[index]), index, old);
		count_length(fib, old->subnet_length, -1);
		retire(fib, (void *)old, retired);
		retired = NULL;
	} else {
		index_entry(atomic_load(&fib->table[ROUTES]), ROUTES, fresh);
	}
	fresh = NULL;
	reclaim(fib);
unlock:
	pthread_mutex_unlock(&fib->writer);
out:
	free(fresh);
	free(retired);
	free(traffic);
	return err;
}

/**
 * fib_delete() - Remove the route of a subnet, and its counters
 *
 * Return: 0, ESRCH if there is none, ENOMEM
 */
int fib_delete(struct fib *fib, const struct inet_address *subnet, unsigned int length)
{
	struct retired *first = malloc(sizeof(*first));
	struct retired *second = malloc(sizeof(*second));
	const struct fib_entry *old;
	int err = 0;

	if (!first || !second) {
		err = ENOMEM;
		goto out;
	}
	pthread_mutex_lock(&fib->writer);
	old = length <= 128 ? fib_exact(fib, subnet, length) : NULL;
	if (old) {
		for (int index = 0; index < INDEXES; index++)
			unindex_entry(atomic_load(&fib->table[index]), index, old);
		count_length(fib, old->subnet_length, -1);
		retire(fib, old->traffic, first);
		retire(fib, (void *)old, second);
		first = second = NULL;
		reclaim(fib);
	} else {
		err = ESRCH;
	}
	pthread_mutex_unlock(&fib->writer);
out:
	free(first);
	free(second);
	return err;
}

/** fib_count() - Number of routes */
size_t fib_count(struct fib *fib)
{
	size_t count;

	pthread_mutex_lock(&fib->writer);
	count = atomic_load(&fib->table[ROUTES])->live;
	pthread_mutex_unlock(&fib->writer);
	return count;
}

/** fib_each() - Visit every route, with writers kept out */
void fib_each(struct fib *fib, void (*visit)(const struct fib_entry *entry, void *arg), void *arg)
{
	struct table *routes;

	pthread_mutex_lock(&fib->writer);
	routes = atomic_load(&fib->table[ROUTES]);
	for (size_t i = 0; i <= routes->mask; i++) {
		const struct fib_entry *entry = atomic_load(&routes->slot[i]);

		if (entry && entry != &tombstone)
			visit(entry, arg);
	}
	pthread_mutex_unlock(&fib->writer);
}

/** fib_exact() - The route of exactly this subnet, or NULL */
const struct fib_entry *fib_exact(const struct fib *fib, const struct inet_address *subnet,
				  unsigned int length)
{
	const struct table *table = atomic_load_explicit(&fib->table[ROUTES], memory_order_acquire);
	size_t i = route_hash(subnet, length) & table->mask;
	const struct fib_entry *entry;

	while ((entry = atomic_load_explicit(&table->slot[i], memory_order_acquire)) != NULL) {
		if (entry != &tombstone && entry->subnet_length == length &&
		    inet_equal(&entry->subnet, subnet))
			return entry;
		i = (i + 1) & table->mask;
	}
	return NULL;
}

/** fib_lookup() - The route with the longest prefix that holds @address, or NULL */
const struct fib_entry *fib_lookup(const struct fib *fib, const struct inet_address *address)
{
	/* An IPv4 address lies in no IPv6 subnet: its prefixes are longer than the mapped part. */
	unsigned int shortest = inet_is_ipv4(address) ? INET_MAPPED_BITS : 1;

	for (int word = 1; word >= 0; word--) {
		uint64_t bits = atomic_load_explicit(&fib->lengths[word], memory_order_acquire);

		while (bits) {
			unsigned int top = 63 - (unsigned int)__builtin_clzll(bits);
			unsigned int length = (unsigned int)word * 64 + top + 1;
			struct inet_address subnet;
			const struct fib_entry *entry;

			if (length < shortest)
				return NULL;
			subnet = inet_mask(*address, length);
			entry = fib_exact(fib, &subnet, length);
			if (entry)
				return entry;
			bits &= ~(1ULL << top);
		}
	}
	return NULL;
}

/** fib_sender() - The peer at @underlay whose current or previous VTEP MAC is @mac, or NULL */
const struct fib_entry *fib_sender(const struct fib *fib, const struct inet_address *underlay,
				   const uint8_t mac[ETH_ALEN])
{
	const struct table *table =
		atomic_load_explicit(&fib->table[SENDERS], memory_order_acquire);
	size_t i = sender_hash(underlay, mac) & table->mask;
	const struct fib_entry *entry;

	while ((entry = atomic_load_explicit(&table->slot[i], memory_order_acquire)) != NULL) {
		if (entry != &tombstone && inet_equal(&entry->underlay, underlay) &&
		    (memcmp(entry->mac, mac, ETH_ALEN) == 0 ||
		     (entry->has_previous_mac && memcmp(entry->previous_mac, mac, ETH_ALEN) == 0)))
			return entry;
		i = (i + 1) & table->mask;
	}
	return NULL;
}

/** fib_source() - Some peer at @underlay, or NULL */
const struct fib_entry *fib_source(const struct fib *fib, const struct inet_address *underlay)
{
	const struct table *table =
		atomic_load_explicit(&fib->table[SOURCES], memory_order_acquire);
	size_t i = source_hash(underlay) & table->mask;
	const struct fib_entry *entry;

	while ((entry = atomic_load_explicit(&table->slot[i], memory_order_acquire)) != NULL) {
		if (entry != &tombstone && inet_equal(&entry->underlay, underlay))
			return entry;
		i = (i + 1) & table->mask;
	}
	return NULL;
}
