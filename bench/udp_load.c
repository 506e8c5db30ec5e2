// UDP generator and sink in one process: sends from one network namespace, receives in another.
//
// DOC: Theory of Operation
//
// Sockets stay in the namespace in which they were made, so one process can hold both ends and
// compare what was sent with what arrived without a protocol of its own. Each sender thread owns
// some flows (a flow is a source port) and sends batches with sendmmsg at a paced rate; one thread
// receives. Every packet names its trial, flow and sequence number, so loss, reordering within a
// flow and duplicates are counted exactly; with --check the rest of the packet is a pattern that
// follows from these three, and every byte is compared. With --segment a batch is one send that
// the kernel cuts (UDP_SEGMENT), so that a TUN may hand it over uncut.
//
// Without --rate the highest rate with less than 1 % loss is searched: first as fast as the
// senders can, then by bisection of the rate's logarithm. A rate fails when it fails twice, because
// one hiccup of a virtual CPU is no property of what is measured.
//
// What has not arrived is lost once nothing has arrived for --settle ms. If it comes later, to the
// next trial or to another process that has the port then, it is counted there as late.
//
// Prints one JSON object.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>

#include "netns.h"

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif

enum {
	BATCH = 16,
	CATCH_UP = 256, // packets a late sender may send at once
	MAX_FLOWS = 64,
	MAX_SIZE = 65507,
	PATTERN = 1 << 17,
	RECEIVE_BATCH = 64,
	SEARCH_STEPS = 7,
	SETTLE_MS = 50, // unless told
	SOCKET_BUFFER = 8 << 20,
	WINDOW = 1 << 16, // sequence numbers in which a duplicate is recognised
};

static const uint32_t MAGIC = 0x70667564;

struct header {
	uint32_t magic;
	uint16_t trial;
	uint16_t flow;
	uint64_t sequence;
};

_Static_assert(sizeof(struct header) == 16, "no padding");

struct options {
	const char *from, *to, *address;
	int port, flows, threads;
	int low, high; // payload bytes
	double rate; // packets per second, 0: search
	double seconds;
	uint64_t count; // packets, 0: by seconds
	int settle_ms; // of silence, until what has not arrived is lost
	bool check, segment;
};

struct counts {
	_Atomic uint64_t received, reordered, duplicated, corrupt, late;
};

struct flow {
	int fd;
	uint64_t sent; // by its sender
	uint64_t highest; // by the sink: highest sequence number + 1
	uint8_t seen[WINDOW / 8];
};

struct load {
	struct options options;
	struct flow *flows;
	struct counts counts;
	int sink;
	_Atomic uint16_t trial;
	_Atomic uint64_t sent, refused;
	_Atomic uint64_t send_ns; // of the slowest sender
	double rate; // of the running trial, 0: unpaced
	double seconds;
	uint8_t *pattern;
};

struct sender {
	struct load *load;
	int number;
};

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

static void sleep_ns(uint64_t ns)
{
	struct timespec pause = { (time_t)(ns / 1000000000ull), (long)(ns % 1000000000ull) };

	clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
}

static uint64_t mix(uint64_t value)
{
	value = (value ^ (value >> 33)) * 0xff51afd7ed558ccdull;
	value = (value ^ (value >> 33)) * 0xc4ceb9fe1a85ec53ull;
	return value ^ (value >> 33);
}

/**
 * packet_hash() - What size and pattern of a packet follow from
 * @head:	its header
 */
static uint64_t packet_hash(const struct header *head)
{
	return mix(head->sequence << 20 ^ (uint64_t)head->trial << 8 ^ head->flow);
}

static size_t packet_size(const struct options *options, uint64_t hash)
{
	return (size_t)options->low + hash % (uint64_t)(options->high - options->low + 1);
}

static const uint8_t *packet_pattern(const struct load *load, uint64_t hash)
{
	return load->pattern + (hash >> 32) % (PATTERN - MAX_SIZE);
}

/**
 * receive_one() - Count a packet
 * @load:	the load
 * @packet:	its bytes, untrusted
 * @length:	how many
 */
static void receive_one(struct load *load, const uint8_t *packet, size_t length)
{
	struct header head;
	struct flow *flow;
	uint64_t hash;

	if (length < sizeof(head)) {
		load->counts.corrupt++;
		return;
	}
	memcpy(&head, packet, sizeof(head));
	if (head.magic != MAGIC || head.flow >= load->options.flows) {
		load->counts.corrupt++;
		return;
	}
	if (head.trial != load->trial) { // of an earlier trial, maybe another process's
		load->counts.late++;
		return;
	}
	hash = packet_hash(&head);
	if (load->options.check &&
	    (length != packet_size(&load->options, hash) ||
	     memcmp(packet + sizeof(head), packet_pattern(load, hash), length - sizeof(head)))) {
		load->counts.corrupt++;
		return;
	}

	flow = &load->flows[head.flow];
	for (; flow->highest <= head.sequence; flow->highest++)
		flow->seen[flow->highest % WINDOW / 8] &= (uint8_t) ~(1u << flow->highest % 8);
	if (flow->seen[head.sequence % WINDOW / 8] & 1u << head.sequence % 8) {
		load->counts.duplicated++;
		return;
	}
	if (head.sequence + 1 < flow->highest)
		load->counts.reordered++;
	flow->seen[head.sequence % WINDOW / 8] |= (uint8_t)(1u << head.sequence % 8);
	atomic_fetch_add_explicit(&load->counts.received, 1, memory_order_relaxed);
}

static void *receive(void *argument)
{
	struct load *load = argument;
	size_t room = (size_t)load->options.high + 1; // one more shows a packet that grew
	uint8_t *buffers = malloc(RECEIVE_BATCH * room);
	struct mmsghdr messages[RECEIVE_BATCH] = { 0 };
	struct iovec vectors[RECEIVE_BATCH];

	if (!buffers)
		fail("memory");
	for (int i = 0; i < RECEIVE_BATCH; i++) {
		vectors[i] = (struct iovec) { buffers + (size_t)i * room, room };
		messages[i].msg_hdr = (struct msghdr) { .msg_iov = &vectors[i], .msg_iovlen = 1 };
	}
	for (;;) {
		int got = recvmmsg(load->sink, messages, RECEIVE_BATCH, MSG_WAITFORONE, NULL);

		if (got < 0 && errno != EINTR)
			fail("recvmmsg");
		for (int i = 0; i < got; i++)
			receive_one(load, vectors[i].iov_base, messages[i].msg_len);
	}
	return NULL;
}

/**
 * fill() - Make the next packets of a flow
 * @load:	the load
 * @number:	the flow's number
 * @heads:	headers, one per packet
 * @vectors:	two per packet: header, pattern
 */
static void fill(struct load *load, int number, struct header *heads, struct iovec *vectors)
{
	struct flow *flow = &load->flows[number];

	for (int i = 0; i < BATCH; i++) {
		uint64_t hash;
		size_t size;

		heads[i] = (struct header) { MAGIC, load->trial, (uint16_t)number,
					     flow->sent + (uint64_t)i };
		hash = packet_hash(&heads[i]);
		size = packet_size(&load->options, hash);
		vectors[2 * i] = (struct iovec) { &heads[i], sizeof(heads[i]) };
		vectors[2 * i + 1] = (struct iovec) { (void *)packet_pattern(load, hash),
						      size - sizeof(heads[i]) };
	}
}

/**
 * pace() - Wait until the next batch is due
 * @rate:	packets per second
 * @start:	when sending began; moved when the sender is hopelessly late
 * @done:	packets sent since then
 */
static void pace(double rate, uint64_t *start, uint64_t done)
{
	uint64_t due = *start + (uint64_t)((double)(done + BATCH) / rate * 1e9), now = now_ns();
	uint64_t late = (uint64_t)(CATCH_UP / rate * 1e9);

	if (now < due)
		sleep_ns(due - now);
	else if (now - due > late)
		*start += now - due - late;
}

/**
 * send_segmented() - Send a batch as one datagram for the kernel to cut
 * @fd:		a socket with UDP_SEGMENT set
 * @vectors:	two per packet
 *
 * Return: packets sent, or -1
 */
static int send_segmented(int fd, struct iovec *vectors)
{
	struct msghdr message = { .msg_iov = vectors, .msg_iovlen = 2 * BATCH };

	return sendmsg(fd, &message, 0) < 0 ? -1 : BATCH;
}

static void *send_flows(void *argument)
{
	struct sender *sender = argument;
	struct load *load = sender->load;
	const struct options *options = &load->options;
	struct header heads[BATCH];
	struct iovec vectors[2 * BATCH];
	struct mmsghdr messages[BATCH] = { 0 };
	uint64_t began = now_ns(), start = began, end = began + (uint64_t)(load->seconds * 1e9);
	uint64_t done = 0, share = options->count / (uint64_t)options->threads;

	prctl(PR_SET_TIMERSLACK, 1);
	for (int i = 0; i < BATCH; i++)
		messages[i].msg_hdr =
			(struct msghdr) { .msg_iov = &vectors[2 * i], .msg_iovlen = 2 };
	for (int number = sender->number; options->count ? done < share : now_ns() < end;) {
		int sent;

		if (load->rate > 0)
			pace(load->rate / options->threads, &start, done);
		fill(load, number, heads, vectors);
		sent = options->segment ? send_segmented(load->flows[number].fd, vectors)
					: sendmmsg(load->flows[number].fd, messages, BATCH, 0);
		if (sent <= 0) {
			load->refused++;
			if (errno != ENOBUFS && errno != EAGAIN && errno != ECONNREFUSED)
				fail("sendmmsg");
			continue;
		}
		load->flows[number].sent += (uint64_t)sent;
		done += (uint64_t)sent;
		number += options->threads;
		if (number >= options->flows)
			number = sender->number;
	}
	began = now_ns() - began;
	if (began > load->send_ns)
		load->send_ns = began;
	load->sent += done;
	return NULL;
}

/**
 * settle() - Wait until what was sent has arrived, or nothing more arrives
 * @load:	the load
 */
static void settle(struct load *load)
{
	uint64_t last = 0;

	/* Slept milliseconds are counted: while the machine stalls, nothing can arrive. */
	for (int silent = 0; silent < load->options.settle_ms; silent++) {
		uint64_t received = load->counts.received;

		if (received == load->sent)
			return;
		if (received != last)
			silent = 0;
		last = received;
		sleep_ns(1000000);
	}
}

/**
 * run_trial() - Send for a while and count
 * @load:	the load
 * @rate:	packets per second, 0: as fast as possible
 * @seconds:	how long
 *
 * Return: the share that was lost
 */
static double run_trial(struct load *load, double rate, double seconds)
{
	pthread_t threads[MAX_FLOWS];
	struct sender senders[MAX_FLOWS];

	load->rate = rate;
	load->seconds = seconds;
	load->sent = load->refused = load->send_ns = 0;
	load->counts.received = 0; // the faults are those of all trials
	for (int i = 0; i < load->options.flows; i++)
		load->flows[i].sent = load->flows[i].highest = 0;
	load->trial++;
	for (int i = 0; i < load->options.threads; i++) {
		senders[i] = (struct sender) { load, i };
		if (pthread_create(&threads[i], NULL, send_flows, &senders[i]))
			fail("pthread_create");
	}
	for (int i = 0; i < load->options.threads; i++)
		pthread_join(threads[i], NULL);
	settle(load);
	return load->sent ? 1.0 - (double)load->counts.received / (double)load->sent : 1.0;
}

static double delivered(const struct load *load)
{
	return (double)load->counts.received / ((double)load->send_ns / 1e9);
}

/**
 * search() - Find the highest rate with less than 1 % loss
 * @load:	the load
 *
 * Return: packets per second delivered at that rate
 */
static double search(struct load *load)
{
	const double limit = 0.01, trial = load->options.seconds / (SEARCH_STEPS + 1);
	double high, low, best = 0;

	if (run_trial(load, 0, trial) < limit)
		return delivered(load);
	high = (double)load->sent / ((double)load->send_ns / 1e9);
	low = delivered(load) / 4;
	if (low < 100)
		low = 100;
	for (int step = 0; step < SEARCH_STEPS; step++) {
		double rate = sqrt(low * high);

		if (run_trial(load, rate, trial) < limit || run_trial(load, rate, trial) < limit) {
			low = rate;
			best = delivered(load);
		} else {
			high = rate;
		}
	}
	return best;
}

static void open_sockets(struct load *load)
{
	const struct options *options = &load->options;
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(options->port) };

	load->sink = socket_in_netns(options->to, AF_INET, SOCK_DGRAM);
	force_buffers(load->sink, SOCKET_BUFFER);
	if (bind(load->sink, (struct sockaddr *)&address, sizeof(address)))
		fail("bind");
	if (inet_pton(AF_INET, options->address, &address.sin_addr) != 1) {
		fprintf(stderr, "udp_load: %s is not an IPv4 address\n", options->address);
		exit(2);
	}
	load->flows = calloc((size_t)options->flows, sizeof(*load->flows));
	if (!load->flows)
		fail("memory");
	for (int i = 0; i < options->flows; i++) {
		int fd = socket_in_netns(options->from, AF_INET, SOCK_DGRAM);

		force_buffers(fd, SOCKET_BUFFER);
		if (connect(fd, (struct sockaddr *)&address, sizeof(address)))
			fail("connect");
		if (options->segment &&
		    setsockopt(fd, SOL_UDP, UDP_SEGMENT, &options->low, sizeof(options->low)))
			fail("UDP_SEGMENT");
		load->flows[i].fd = fd;
	}
}

static void usage(void)
{
	fputs("usage: udp_load --from NETNS --to NETNS --address A [--port P] [--size N[-M]]\n"
	      "                [--flows N] [--threads N] [--seconds S] [--rate PPS] [--count N]\n"
	      "                [--settle MS] [--check] [--segment]\n",
	      stderr);
	exit(2);
}

static void parse(int argc, char **argv, struct options *options)
{
	static const struct option names[] = {
		{ "from", 1, 0, 'f' },	  { "to", 1, 0, 't' },
		{ "address", 1, 0, 'a' }, { "port", 1, 0, 'p' },
		{ "size", 1, 0, 's' },	  { "flows", 1, 0, 'n' },
		{ "threads", 1, 0, 'j' }, { "seconds", 1, 0, 'd' },
		{ "rate", 1, 0, 'r' },	  { "count", 1, 0, 'c' },
		{ "settle", 1, 0, 'w' },  { "check", 0, 0, 'k' },
		{ "segment", 0, 0, 'g' }, { 0 },
	};
	char *end;
	int name;

	while ((name = getopt_long(argc, argv, "", names, NULL)) != -1) {
		switch (name) {
		case 'f':
			options->from = optarg;
			break;
		case 't':
			options->to = optarg;
			break;
		case 'a':
			options->address = optarg;
			break;
		case 'p':
			options->port = atoi(optarg);
			break;
		case 's':
			options->low = options->high = (int)strtol(optarg, &end, 10);
			if (*end == '-')
				options->high = atoi(end + 1);
			break;
		case 'n':
			options->flows = atoi(optarg);
			break;
		case 'j':
			options->threads = atoi(optarg);
			break;
		case 'd':
			options->seconds = atof(optarg);
			break;
		case 'r':
			options->rate = atof(optarg);
			break;
		case 'c':
			options->count = strtoull(optarg, NULL, 10);
			break;
		case 'w':
			options->settle_ms = atoi(optarg);
			break;
		case 'k':
			options->check = true;
			break;
		case 'g':
			options->segment = true;
			break;
		default:
			usage();
		}
	}
	if (!options->from || !options->to || !options->address || options->flows < 1 ||
	    options->flows > MAX_FLOWS || options->threads < 1 ||
	    options->threads > options->flows || options->settle_ms < 1 ||
	    options->low < (int)sizeof(struct header) || options->high < options->low ||
	    options->high > MAX_SIZE ||
	    (options->segment &&
	     (options->low != options->high || options->low * BATCH > MAX_SIZE)))
		usage();
}

int main(int argc, char **argv)
{
	struct load load = { .options = { .port = 9,
					  .flows = 1,
					  .threads = 1,
					  .seconds = 3,
					  .settle_ms = SETTLE_MS },
			     // Not one that a process before used: its packets may still come.
			     .trial = (uint16_t)(now_ns() >> 20) };
	uint64_t random = 1;
	pthread_t receiver;
	double rate;

	load.options.low = load.options.high = 64;
	parse(argc, argv, &load.options);
	load.pattern = malloc(PATTERN);
	if (!load.pattern)
		fail("memory");
	for (int i = 0; i < PATTERN; i++)
		load.pattern[i] = (uint8_t)(random = mix(random + (uint64_t)i));
	open_sockets(&load);
	if (pthread_create(&receiver, NULL, receive, &load))
		fail("pthread_create");

	if (load.options.rate > 0 || load.options.count) {
		run_trial(&load, load.options.rate, load.options.seconds);
		rate = delivered(&load);
	} else {
		rate = search(&load);
	}
	printf("{\"rate\": %.0f, \"sent\": %lu, \"received\": %lu, \"reordered\": %lu, "
	       "\"duplicated\": %lu, \"corrupt\": %lu, \"late\": %lu, \"refused\": %lu, "
	       "\"seconds\": %.3f}\n",
	       rate, load.sent, load.counts.received, load.counts.reordered, load.counts.duplicated,
	       load.counts.corrupt, load.counts.late, load.refused, (double)load.send_ns / 1e9);
	return 0;
}
