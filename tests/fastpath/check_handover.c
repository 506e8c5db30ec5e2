/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A source changes hands between two threads: it must never be lost, be in both lanes, or reorder a
 * flow, and what carries little must come back to the first lane. Threads are raised while several
 * flows are mixed in what they have, or it is bulk, and poll for no longer than they are told to.
 */
#define _GNU_SOURCE
#include "check.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <netinet/in.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/uio.h>
#include <unistd.h>

/* Who has a source is to be seen only from within. */
#include "node.h"
#include "worker.h"

#define CHANGES 20000
#define CYCLES 10
#define MORE 1000 /* packets once a source has been given away */
#define PAYLOAD 32
#define LARGE 8000
#define SEGMENTS 50
#define BURST 1000
#define POLL_MS 500
#define LOOKS 10

struct host {
	struct fp_ctx *ctx;
	struct fp_worker *worker;
	int tun[2]; /* the test's end, the worker's end */
	int receive[2], send;
	struct sockaddr_in address[2]; /* of the receive sockets */
};

static void open_host(struct host *host, int schedule)
{
	struct fp_config config = config_of(1, FP_SPOOF_OFF);
	struct fp_io io = {
		.tun_count = 1, .receive_count = 2, .send_count = 1, .schedule = schedule
	};

	HOLDS(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, host->tun) == 0);
	for (int i = 0; i < 2; i++) {
		struct sockaddr_in *address = &host->address[i];
		socklen_t length = sizeof(*address);

		*address = (struct sockaddr_in) { .sin_family = AF_INET };
		address->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
		host->receive[i] = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
		HOLDS(bind(host->receive[i], (struct sockaddr *)address, length) == 0);
		HOLDS(getsockname(host->receive[i], (struct sockaddr *)address, &length) == 0);
	}
	host->send = socket(AF_INET, SOCK_DGRAM, 0);
	host->ctx = fp_ctx_new(&config);
	HOLDS(host->ctx);
	io.tun = &host->tun[1];
	io.tun_write = host->tun[1];
	io.receive = host->receive;
	io.send = &host->send;
	host->worker = fp_worker_new(host->ctx, &io);
	HOLDS(host->worker);
}

static void close_host(struct host *host)
{
	fp_worker_free(host->worker);
	fp_ctx_free(host->ctx);
	close(host->tun[0]);
	close(host->tun[1]);
	close(host->receive[0]);
	close(host->receive[1]);
	close(host->send);
}

/* Move a source from one lane to another as soon as it is there, many times. */
struct mover {
	struct fp_worker *worker;
	int from, to;
	unsigned int source;
};

static void *move_always(void *argument)
{
	struct mover *mover = argument;
	struct lane *from = &mover->worker->lane[mover->from];
	struct lane *to = &mover->worker->lane[mover->to];

	for (int changes = 0; changes < CHANGES;) {
		if (!from->has[mover->source]) {
			sched_yield();
			continue;
		}
		HOLDS(lane_move(from, to, &mover->worker->source[mover->source]) == 0);
		changes++;
	}
	return NULL;
}

/* Both threads change their minds at the worst moments, and a TUN queue and a socket are the same.
 */
static void check_changes(unsigned int source)
{
	struct host host;
	struct mover back;
	pthread_t thread;

	open_host(&host, FP_SCHEDULE_NORMAL);
	back = (struct mover) { host.worker, BULK_DECAP, FIRST, source };
	HOLDS(pthread_create(&thread, NULL, move_always, &back) == 0);
	move_always(&(struct mover) { host.worker, FIRST, BULK_DECAP, source });
	pthread_join(thread, NULL);
	HOLDS(host.worker->lane[FIRST].held == host.worker->sources);
	HOLDS(host.worker->lane[BULK_DECAP].held == 0);
	close_host(&host);
}

/* What the kernel behind the TUN gets; the numbers of one flow must rise. */
struct reader {
	struct host *host;
	_Atomic bool ended;
	_Atomic uint32_t last;
};

static void *read_in_order(void *argument)
{
	struct reader *reader = argument;
	uint8_t packet[2048];

	while (!reader->ended) {
		ssize_t got = read(reader->host->tun[0], packet, sizeof(packet));
		uint32_t number;

		if (got <= 0) {
			sched_yield();
			continue;
		}
		memcpy(&number, packet + got - sizeof(number), sizeof(number));
		HOLDS(number > reader->last);
		reader->last = number;
	}
	return NULL;
}

/* Send one packet more of a flow to a receive socket, as a peer does. */
static void send_sized(const struct host *host, uint32_t *number, uint16_t port, int socket,
		       size_t payload)
{
	struct spec spec = { .udp = true,
			     .source_node = 2,
			     .destination_node = 1,
			     .source_port = port,
			     .payload = payload };
	struct vxlan_push push = { .vxlan = vxlan_header_of(1),
				   .eth = { .destination = { 2, 0, 0, 0, 0, 1 },
					    .source = { 2, 0, 0, 0, 0, 2 },
					    .type = { { 0x08, 0 } } } };
	uint8_t datagram[LARGE + 2048], *packet = datagram + sizeof(push);
	size_t length = build(&spec, packet);

	memcpy(datagram, &push, sizeof(push));
	++*number;
	memcpy(packet + length - sizeof(*number), number, sizeof(*number));
	memset(packet + 26, 0, 2); /* no UDP checksum */
	sendto(host->send, datagram, sizeof(push) + length, 0,
	       (const struct sockaddr *)&host->address[socket], sizeof(host->address[socket]));
}

static void send_one(const struct host *host, uint32_t *number, uint16_t port, int socket)
{
	send_sized(host, number, port, socket, PAYLOAD);
}

static void send_next(const struct host *host, uint32_t *number)
{
	send_one(host, number, 0, 0);
}

/* Load moves a socket to the thread for bulk, silence back, and no packet overtakes another. */
static void check_adaptive(void)
{
	struct host host;
	struct reader reader = { .host = &host };
	pthread_t thread;
	uint32_t number = 0;

	open_host(&host, FP_SCHEDULE_NORMAL);
	HOLDS(fp_worker_start(host.worker, 3) == 0);
	HOLDS(pthread_create(&thread, NULL, read_in_order, &reader) == 0);
	for (int cycle = 0; cycle < CYCLES; cycle++) {
		while (fp_worker_threads(host.worker) != 2)
			send_next(&host, &number);
		for (int more = 0; more < MORE; more++)
			send_next(&host, &number);
		while (fp_worker_threads(host.worker) != 1)
			usleep(1000);
	}
	for (uint32_t sent = number; reader.last <= sent;)
		send_next(&host, &number);
	reader.ended = true;
	pthread_join(thread, NULL);
	HOLDS(fp_worker_error(host.worker) == 0);
	close_host(&host);
}

/* Return: the id of the thread of this name, or 0 without one */
static int id_of(const char *thread)
{
	char path[300], name[16] = "";
	DIR *tasks = opendir("/proc/self/task");
	struct dirent *task;
	int id = 0;

	HOLDS(tasks);
	while ((task = readdir(tasks))) {
		FILE *comm;

		snprintf(path, sizeof(path), "/proc/self/task/%s/comm", task->d_name);
		comm = fopen(path, "r");
		if (!comm)
			continue;
		if (fgets(name, sizeof(name), comm) && strncmp(name, thread, strlen(thread)) == 0)
			id = atoi(task->d_name);
		fclose(comm);
	}
	closedir(tasks);
	return id;
}

/* Return: the nice value of the thread of this name, or less than any without one */
static int nice_of(const char *thread)
{
	int id = id_of(thread);

	return id ? getpriority(PRIO_PROCESS, (id_t)id) : NICE_MIN - 1;
}

/* Return: the state of the thread of this name (proc(5)), or 0 without one */
static char state_of(const char *thread)
{
	char path[64], state = 0;
	FILE *stat;

	snprintf(path, sizeof(path), "/proc/self/task/%d/stat", id_of(thread));
	stat = fopen(path, "r");
	if (stat && fscanf(stat, "%*d (%*[^)]) %c", &state) != 1)
		state = 0;
	if (stat)
		fclose(stat);
	return state;
}

/* What a thread is well raised for: several flows with little each, or large messages. */
static void send_mixed(const struct host *host, uint32_t *number)
{
	send_one(host, number, 0, 0);
	send_one(host, number, 0, 1);
}

static void send_large(const struct host *host, uint32_t *number)
{
	send_sized(host, number, 0, 0, LARGE);
}

/* A thread is well raised while it has what it is to be, and one small flow is not that. */
static void check_priority(int threads, const char *thread,
			   void (*send)(const struct host *host, uint32_t *number))
{
	struct host host;
	uint32_t number = 0;
	int own = getpriority(PRIO_PROCESS, 0);

	HOLDS(own - BOOSTED_NICE_STEPS >= NICE_MIN);
	open_host(&host, FP_SCHEDULE_RAISED);
	HOLDS(fp_worker_start(host.worker, threads) == 0);
	while (nice_of(thread) != own - NICE_STEPS)
		usleep(1000);
	for (int cycle = 0; cycle < 2; cycle++) {
		/* So slowly that the thread keeps what it has, or gets it back. */
		for (; nice_of(thread) != own - BOOSTED_NICE_STEPS; usleep(500))
			send(&host, &number);
		while (nice_of(thread) != own - NICE_STEPS)
			send_next(&host, &number);
		for (int more = 0; more < MORE; more++)
			send_next(&host, &number);
		HOLDS(nice_of(thread) == own - NICE_STEPS);
	}
	HOLDS(fp_worker_error(host.worker) == 0);
	HOLDS(fp_worker_schedule_error(host.worker) == 0);
	close_host(&host);
}

/* A local sender's super-packets are given away, and raise the thread that has them until they end.
 */
static void check_super_packets(void)
{
	struct spec spec = { .udp = true,
			     .source_node = 1,
			     .destination_node = 2,
			     .payload = SEGMENTS * UDP_SEGMENT_BYTES,
			     .partial = true };
	uint8_t packet[2048];
	struct iovec iov[] = { { (void *)&udp_super_packet, sizeof(udp_super_packet) },
			       { packet, build(&spec, packet) } };
	int own = getpriority(PRIO_PROCESS, 0);
	struct fp_route route;
	struct host host;

	open_host(&host, FP_SCHEDULE_RAISED);
	route = route_of(2, ntohs(host.address[0].sin_port));
	HOLDS(fp_route_replace(host.ctx, &route) == 0);
	HOLDS(fp_worker_start(host.worker, 3) == 0);
	while (nice_of("fp-encap") != own - BOOSTED_NICE_STEPS) {
		/* A burst that keeps the first thread busy; it takes as much as its queue holds. */
		for (int i = 0; i < BURST && writev(host.tun[0], iov, 2) > 0; i++)
			;
	}
	while (nice_of("fp-encap") != own - NICE_STEPS)
		usleep(1000);
	HOLDS(fp_worker_error(host.worker) == 0);
	close_host(&host);
}

/* Return: whether a thread of this name runs or is ready to, and does so at each of a few looks */
static bool is_awake(const char *thread)
{
	for (int look = 0; look < LOOKS; look++) {
		if (state_of(thread) != 'R')
			return false;
		usleep(2000);
	}
	return true;
}

/* A thread polls for a while after a packet, and then sleeps. */
static void check_polling(void)
{
	struct host host;
	uint8_t packet[2048];
	uint32_t number = 0;
	bool awake = false;

	open_host(&host, FP_SCHEDULE_NORMAL);
	host.worker->poll_ns = POLL_MS * 1000000ULL;
	HOLDS(fp_worker_start(host.worker, 3) == 0);
	/* While the machine stalls, the time to poll may pass before the first look. */
	for (int times = 0; !awake && times < LOOKS; times++) {
		send_next(&host, &number);
		while (read(host.tun[0], packet, sizeof(packet)) <= 0)
			usleep(100);
		awake = is_awake("fp-first");
	}
	HOLDS(awake);
	while (state_of("fp-first") != 'S')
		usleep(1000);
	HOLDS(fp_worker_error(host.worker) == 0);
	close_host(&host);
}

void check_handover(void)
{
	check_changes(0);
	check_changes(1);
	check_adaptive();
	check_priority(2, "fp-decap", send_large);
	check_priority(3, "fp-first", send_mixed);
	check_super_packets();
	check_polling();
}
