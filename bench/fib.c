/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a FIB lookup costs by number of routes, and whether changes of routes hold lookups up.
 *
 *   fib [seconds per measurement]
 *
 * Prints one JSON object per line. A reader looks up addresses in random order, in sections of
 * SECTION lookups as a batch of packets has, first alone and then beside a thread that replaces,
 * deletes and adds routes without a pause. `lookup_ns` is the reader's CPU time. A stall would show
 * in `blocked`, how often the reader had to wait for something, or in `longest_us`, the longest
 * section by the clock; in that is also the time for which the scheduler gave the core to others,
 * so the line without changes tells what the machine does by itself.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <time.h>

#include "fib.h"

#define SECTION 64
#define ADDRESSES (1 << 16)
#define ROUTES_MAX 10000

static struct inet_address address[ADDRESSES];
static struct fib *fib;
static unsigned int routes;
static _Atomic bool done;
static _Atomic unsigned long changes;

static uint64_t now_ns(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* Subnet number @i of 10.0.0.0/8, a /24. */
static struct inet_address subnet(unsigned int i, uint8_t host)
{
	return inet_from_ipv4((const uint8_t[]) { 10, (uint8_t)(i >> 8), (uint8_t)i, host });
}

static void replace(unsigned int i)
{
	struct fib_entry entry = {
		.subnet = subnet(i, 0),
		.subnet_length = INET_MAPPED_BITS + 24,
		.mac = { 2, 0, 0, 0, (uint8_t)(i >> 8), (uint8_t)i },
		.underlay = inet_from_ipv4(
			(const uint8_t[]) { 192, 168, (uint8_t)(i >> 8), (uint8_t)i }),
	};

	if (fib_replace(fib, &entry)) {
		fputs("no memory\n", stderr);
		exit(1);
	}
}

static void *change(void *arg)
{
	unsigned int seed = 1;

	(void)arg;
	while (!done) {
		unsigned int i = (unsigned int)rand_r(&seed) % routes;
		struct inet_address gone = subnet(i, 0);

		if (changes % 2)
			fib_delete(fib, &gone, INET_MAPPED_BITS + 24);
		replace(i);
		changes++;
	}
	return NULL;
}

static void measure(double seconds, const char *beside)
{
	static struct fib_reader reader;
	uint64_t cpu = now_ns(CLOCK_THREAD_CPUTIME_ID), begin = now_ns(CLOCK_MONOTONIC);
	uint64_t last = begin, longest = 0, lookups = 0;
	unsigned long before = changes, found = 0;
	struct rusage first, then;
	size_t at = 0;

	fib_reader_add(fib, &reader);
	getrusage(RUSAGE_THREAD, &first);
	while (last - begin < (uint64_t)(seconds * 1e9)) {
		uint64_t now;

		fib_enter(fib, &reader);
		for (int i = 0; i < SECTION; i++)
			found += fib_lookup(fib, &address[at++ % ADDRESSES]) != NULL;
		fib_leave(&reader);
		now = now_ns(CLOCK_MONOTONIC);
		if (now - last > longest)
			longest = now - last;
		last = now;
		lookups += SECTION;
	}
	getrusage(RUSAGE_THREAD, &then);
	cpu = now_ns(CLOCK_THREAD_CPUTIME_ID) - cpu;
	fib_reader_remove(fib, &reader);
	printf("{\"routes\": %u, \"changes\": \"%s\", \"lookup_ns\": %.1f, \"blocked\": %ld, "
	       "\"longest_us\": %.1f, "
	       "\"changes_per_second\": %.0f, \"found\": %.4f}\n",
	       routes, beside, (double)cpu / (double)lookups, then.ru_nvcsw - first.ru_nvcsw,
	       (double)longest / 1e3, (double)(changes - before) / seconds,
	       (double)found / (double)lookups);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	static const unsigned int sizes[] = { 1, 10, 100, 1000, ROUTES_MAX };
	double seconds = argc > 1 ? atof(argv[1]) : 1;

	fib = fib_new();
	if (!fib)
		return 1;
	for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++) {
		unsigned int seed = 2;
		pthread_t thread;

		while (routes < sizes[s])
			replace(routes++);
		for (int i = 0; i < ADDRESSES; i++)
			address[i] = subnet((unsigned int)rand_r(&seed) % routes, (uint8_t)i);
		measure(seconds, "without");
		done = false;
		if (pthread_create(&thread, NULL, change, NULL))
			return 1;
		measure(seconds, "with");
		done = true;
		pthread_join(thread, NULL);
	}
	fib_free(fib);
	return 0;
}
