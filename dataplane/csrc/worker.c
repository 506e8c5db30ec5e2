/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DOC: A worker moves batches between one TUN queue and the UDP sockets.
 *
 * Its descriptors stand in an epoll set of its own, made here: an event loop waits for that one
 * descriptor to become readable and calls fp_worker_turn(), which does a bounded amount of work
 * and never blocks. What is left over makes the descriptor readable again at once.
 *
 * When a socket's send buffer is full the batch stays where it is, the TUN is not read and the
 * worker waits for the socket to become writable: the queue is then the TUN's, and nothing is
 * lost here. Datagrams keep the order in which their packets were read, for each socket and so for
 * each flow.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "context.h"

#define BATCH 64
#define BATCHES_PER_TURN 4
#define SLOT_BYTES (64 * 1024 + 64)
#define SOCKETS_MAX 64
#define VNET_HEADER_BYTES 12

/* Keys of the epoll set; a blocked send socket's key is its index. */
#define EPOLL_TUN UINT64_MAX
#define EPOLL_UNDERLAY (UINT64_MAX - 1)

/* Datagrams that wait to be sent from one socket, in order. */
struct send_queue {
	int fd;
	unsigned int first;
	unsigned int count;
	bool blocked;
	struct mmsghdr message[BATCH];
};

/* One datagram on its way out. */
struct departure {
	struct iovec iov;
	struct sockaddr_storage to;
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
};

/* One datagram that came in. */
struct arrival {
	struct iovec iov;
	struct sockaddr_storage from;
	union {
		char bytes[CMSG_SPACE(sizeof(int)) + CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
};

struct fp_worker {
	struct fp_ctx *ctx;
	struct fp_worker *next;
	struct fib_reader reader;
	int epoll_fd;
	int tun_fd;
	int receive_fd;
	unsigned int sockets;
	unsigned int blocked; /* send queues that wait for room */
	uint8_t *encap_slots;
	uint8_t *decap_slots;
	struct departure departure[BATCH];
	struct arrival arrival[BATCH];
	struct mmsghdr incoming[BATCH];
	struct fp_counters counters;
	_Atomic unsigned int suspects_head, suspects_tail;
	struct fp_suspect suspect[SUSPECTS];
	struct send_queue queue[];
};

static void drop(struct fp_worker *worker, int reason)
{
	count_up(&worker->counters.drops[reason], 1);
}

static void add(_Atomic uint64_t *counter, uint64_t by)
{
	atomic_fetch_add_explicit(counter, by, memory_order_relaxed);
}

/* Keep a sample for the operator's log, unless the ring is full or it repeats the last one. */
static void note_suspect(struct fp_worker *worker, int reason, const struct inet_address *source,
			 const struct decap *decap)
{
	unsigned int head = atomic_load_explicit(&worker->suspects_head, memory_order_relaxed);
	unsigned int tail = atomic_load_explicit(&worker->suspects_tail, memory_order_acquire);
	struct fp_suspect *last = &worker->suspect[(head - 1) % SUSPECTS];
	struct fp_suspect *suspect = &worker->suspect[head % SUSPECTS];

	if (head - tail == SUSPECTS)
		return;
	if (head != tail && last->reason == reason &&
	    memcmp(last->outer_source, source, sizeof(*source)) == 0)
		return;
	suspect->reason = reason;
	memcpy(suspect->outer_source, source, sizeof(*source));
	memcpy(suspect->mac, decap->mac, ETH_ALEN);
	memcpy(suspect->inner_source, &decap->inner_source, sizeof(decap->inner_source));
	atomic_store_explicit(&worker->suspects_head, head + 1, memory_order_release);
}

/* Return: the drop reason for a failed send */
static int send_drop(int err)
{
	switch (err) {
	case ENETUNREACH:
	case EHOSTUNREACH:
	case ENETDOWN:
	case ENODEV:
	case EADDRNOTAVAIL:
		return FP_DROP_SEND_UNREACHABLE;
	case EPERM:
	case EACCES:
		return FP_DROP_SEND_DENIED;
	case EMSGSIZE:
		return FP_DROP_SEND_SIZE;
	case ENOBUFS:
	case ENOMEM:
		return FP_DROP_SEND_BUFFER;
	default:
		return FP_DROP_SEND_ERROR;
	}
}

static void watch(struct fp_worker *worker, int operation, int fd, uint32_t events, uint64_t key)
{
	struct epoll_event event = { .events = events, .data.u64 = key };

	epoll_ctl(worker->epoll_fd, operation, fd, &event);
}

static void set_blocked(struct fp_worker *worker, unsigned int index, bool blocked)
{
	struct send_queue *queue = &worker->queue[index];

	if (queue->blocked == blocked)
		return;
	queue->blocked = blocked;
	if (blocked) {
		watch(worker, EPOLL_CTL_ADD, queue->fd, EPOLLOUT, index);
		count_up(&worker->counters.send_blocked, 1);
		if (worker->blocked++ == 0)
			watch(worker, EPOLL_CTL_MOD, worker->tun_fd, 0, EPOLL_TUN);
	} else {
		watch(worker, EPOLL_CTL_DEL, queue->fd, 0, index);
		if (--worker->blocked == 0)
			watch(worker, EPOLL_CTL_MOD, worker->tun_fd, EPOLLIN, EPOLL_TUN);
	}
}

/* Send what a queue holds, until it is empty or its socket has no room. */
static void flush_queue(struct fp_worker *worker, unsigned int index)
{
	struct send_queue *queue = &worker->queue[index];
	struct fp_traffic *total = &worker->counters.traffic;

	while (queue->first < queue->count) {
		int sent = sendmmsg(queue->fd, queue->message + queue->first,
				    queue->count - queue->first, MSG_DONTWAIT);

		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0 && errno == EAGAIN) {
			set_blocked(worker, index, true);
			return;
		}
		if (sent < 0) {
			drop(worker, send_drop(errno));
			queue->first++;
			continue;
		}
		for (int i = 0; i < sent; i++)
			count_up(&total->encap_bytes, queue->message[queue->first + i].msg_len -
							      sizeof(struct vxlan_push));
		count_up(&total->encap_packets, (uint64_t)sent);
		queue->first += (unsigned int)sent;
	}
	queue->first = queue->count = 0;
	set_blocked(worker, index, false);
}

static socklen_t underlay_sockaddr(const struct fib_entry *peer, struct sockaddr_storage *to)
{
	if (inet_is_ipv4(&peer->underlay)) {
		struct sockaddr_in *in = (struct sockaddr_in *)to;

		*in = (struct sockaddr_in) { .sin_family = AF_INET, .sin_port = htons(peer->port) };
		memcpy(&in->sin_addr, peer->underlay.octet + 12, 4);
		return sizeof(*in);
	} else {
		struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)to;

		*in6 = (struct sockaddr_in6) { .sin6_family = AF_INET6,
					       .sin6_port = htons(peer->port) };
		memcpy(&in6->sin6_addr, &peer->underlay, 16);
		return sizeof(*in6);
	}
}

/* Put the packet in @slot on the queue of its flow. */
static void enqueue(struct fp_worker *worker, unsigned int slot, const struct encap *encap)
{
	struct departure *departure = &worker->departure[slot];
	unsigned int index = encap->hash % worker->sockets;
	struct send_queue *queue = &worker->queue[index];
	struct msghdr *header = &queue->message[queue->count++].msg_hdr;
	uint8_t *datagram = worker->encap_slots + (size_t)slot * SLOT_BYTES;

	memcpy(datagram, &encap->peer->push, sizeof(encap->peer->push));
	departure->iov = (struct iovec) { datagram, sizeof(encap->peer->push) + encap->length };
	*header = (struct msghdr) {
		.msg_name = &departure->to,
		.msg_namelen = underlay_sockaddr(encap->peer, &departure->to),
		.msg_iov = &departure->iov,
		.msg_iovlen = 1,
	};
	if (encap->outer_tos) {
		bool ipv4 = departure->to.ss_family == AF_INET;
		struct cmsghdr *control = &departure->control.align;
		int tos = encap->outer_tos;

		control->cmsg_level = ipv4 ? IPPROTO_IP : IPPROTO_IPV6;
		control->cmsg_type = ipv4 ? IP_TOS : IPV6_TCLASS;
		control->cmsg_len = CMSG_LEN(sizeof(tos));
		memcpy(CMSG_DATA(control), &tos, sizeof(tos));
		header->msg_control = control;
		header->msg_controllen = CMSG_SPACE(sizeof(tos));
	}
	add(&encap->peer->traffic->encap_packets, 1);
	add(&encap->peer->traffic->encap_bytes, encap->length);
}

/* Read up to a batch from the TUN and send it. Return: packets read, 0 when there are no more */
static unsigned int encap_batch(struct fp_worker *worker)
{
	unsigned int read = 0;
	uint8_t vnet[VNET_HEADER_BYTES];

	while (read < BATCH) {
		uint8_t *slot = worker->encap_slots + (size_t)read * SLOT_BYTES;
		uint8_t *packet = slot + sizeof(struct vxlan_push);
		struct iovec iov[2] = {
			{ vnet, sizeof(vnet) },
			{ packet, SLOT_BYTES - sizeof(struct vxlan_push) },
		};
		ssize_t length = readv(worker->tun_fd, iov, 2);
		struct encap encap;

		if (length < 0 && errno == EINTR)
			continue;
		if (length < 0)
			break;
		if (length < VNET_HEADER_BYTES) {
			drop(worker, FP_DROP_ENCAP_MALFORMED);
			continue;
		}
		encap_packet(worker->ctx, packet, (size_t)length - VNET_HEADER_BYTES, &encap);
		if (encap.drop >= 0)
			drop(worker, encap.drop);
		else
			enqueue(worker, read, &encap);
		read++;
	}
	if (read) {
		count_up(&worker->counters.encap_batches, 1);
		for (unsigned int i = 0; i < worker->sockets; i++) {
			if (worker->queue[i].count)
				flush_queue(worker, i);
		}
	}
	return read;
}

static void write_tun(struct fp_worker *worker, const struct decap *decap)
{
	uint8_t vnet[VNET_HEADER_BYTES] = { 0 };
	struct iovec iov[2] = { { vnet, sizeof(vnet) }, { decap->packet, decap->length } };
	struct fp_traffic *total = &worker->counters.traffic;
	ssize_t written;

	do
		written = writev(worker->tun_fd, iov, 2);
	while (written < 0 && errno == EINTR);
	if (written < 0) {
		drop(worker, errno == EIO ? FP_DROP_TUN_DOWN : FP_DROP_TUN_WRITE);
		return;
	}
	count_up(&total->decap_packets, 1);
	count_up(&total->decap_bytes, decap->length);
	if (decap->sender) {
		add(&decap->sender->traffic->decap_packets, 1);
		add(&decap->sender->traffic->decap_bytes, decap->length);
	}
}

static uint8_t outer_tos(struct msghdr *header)
{
	for (struct cmsghdr *c = CMSG_FIRSTHDR(header); c; c = CMSG_NXTHDR(header, c)) {
		if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_TOS)
			return *CMSG_DATA(c);
		if (c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_TCLASS) {
			int tclass;

			memcpy(&tclass, CMSG_DATA(c), sizeof(tclass));
			return (uint8_t)tclass;
		}
	}
	return 0;
}

static struct inet_address outer_source(const struct sockaddr_storage *from)
{
	struct inet_address address;

	if (from->ss_family == AF_INET)
		return inet_from_ipv4(
			(const uint8_t *)&((const struct sockaddr_in *)from)->sin_addr);
	memcpy(&address, &((const struct sockaddr_in6 *)from)->sin6_addr, sizeof(address));
	return address;
}

/* Receive up to a batch and write it to the TUN. Return: datagrams received */
static unsigned int decap_batch(struct fp_worker *worker)
{
	int received;

	for (unsigned int i = 0; i < BATCH; i++) {
		struct arrival *arrival = &worker->arrival[i];

		worker->incoming[i].msg_hdr = (struct msghdr) {
			.msg_name = &arrival->from,
			.msg_namelen = sizeof(arrival->from),
			.msg_iov = &arrival->iov,
			.msg_iovlen = 1,
			.msg_control = &arrival->control,
			.msg_controllen = sizeof(arrival->control),
		};
	}
	received = recvmmsg(worker->receive_fd, worker->incoming, BATCH, MSG_DONTWAIT, NULL);
	if (received <= 0)
		return 0;
	count_up(&worker->counters.decap_batches, 1);
	for (int i = 0; i < received; i++) {
		struct arrival *arrival = &worker->arrival[i];
		struct inet_address source = outer_source(&arrival->from);
		struct decap decap;

		decap_datagram(worker->ctx, arrival->iov.iov_base, worker->incoming[i].msg_len,
			       &source, outer_tos(&worker->incoming[i].msg_hdr), &decap);
		if (decap.drop >= 0) {
			drop(worker, decap.drop);
			if (decap.sender)
				add(&decap.sender->traffic->drops, 1);
		} else {
			write_tun(worker, &decap);
		}
		if (decap.spoofed >= 0)
			count_up(&worker->counters.spoofed[decap.spoofed], 1);
		if (decap.spoofed >= 0 || decap.drop == FP_DROP_UNKNOWN_VTEP ||
		    decap.drop == FP_DROP_VTEP_MAC || decap.drop == FP_DROP_INNER_SOURCE)
			note_suspect(worker, decap.spoofed >= 0 ? decap.spoofed : decap.drop,
				     &source, &decap);
	}
	return (unsigned int)received;
}

/* An area of BATCH slots; pages that no packet reaches are never touched. */
static uint8_t *slots_new(void)
{
	void *area = mmap(NULL, (size_t)BATCH * SLOT_BYTES, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	return area == MAP_FAILED ? NULL : area;
}

/**
 * fp_worker_new() - Make a worker; the descriptors stay the caller's and must be non-blocking
 * @ctx:        Context, which must outlive the worker
 * @tun_fd:     TUN queue with IFF_VNET_HDR and a header of 12 bytes, without offloads
 * @receive_fd: UDP socket with IP_RECVTOS
 * @send_fds:   UDP sockets to send from; the flow's hash chooses one
 * @send_count: 1..64
 *
 * Return: the worker, or NULL with errno set
 */
struct fp_worker *fp_worker_new(struct fp_ctx *ctx, int tun_fd, int receive_fd, const int *send_fds,
				size_t send_count)
{
	struct fp_worker *worker;

	if (send_count < 1 || send_count > SOCKETS_MAX) {
		errno = EINVAL;
		return NULL;
	}
	worker = calloc(1, sizeof(*worker) + send_count * sizeof(worker->queue[0]));
	if (!worker)
		return NULL;
	worker->ctx = ctx;
	worker->tun_fd = tun_fd;
	worker->receive_fd = receive_fd;
	worker->sockets = (unsigned int)send_count;
	for (size_t i = 0; i < send_count; i++)
		worker->queue[i].fd = send_fds[i];
	worker->encap_slots = slots_new();
	worker->decap_slots = slots_new();
	worker->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	fib_reader_add(ctx->fib, &worker->reader);
	pthread_mutex_lock(&ctx->lock);
	worker->next = ctx->workers;
	ctx->workers = worker;
	pthread_mutex_unlock(&ctx->lock);
	if (!worker->encap_slots || !worker->decap_slots || worker->epoll_fd < 0)
		goto fail;
	for (unsigned int i = 0; i < BATCH; i++)
		worker->arrival[i].iov =
			(struct iovec) { worker->decap_slots + (size_t)i * SLOT_BYTES, SLOT_BYTES };
	struct epoll_event tun = { .events = EPOLLIN, .data.u64 = EPOLL_TUN };
	struct epoll_event underlay = { .events = EPOLLIN, .data.u64 = EPOLL_UNDERLAY };

	if (epoll_ctl(worker->epoll_fd, EPOLL_CTL_ADD, tun_fd, &tun) ||
	    epoll_ctl(worker->epoll_fd, EPOLL_CTL_ADD, receive_fd, &underlay))
		goto fail;
	return worker;
fail:;
	int err = errno;

	fp_worker_free(worker);
	errno = err;
	return NULL;
}

/** fp_worker_free() - Free a worker that is in no turn; its counters stay with the context */
void fp_worker_free(struct fp_worker *worker)
{
	struct fp_ctx *ctx = worker->ctx;

	pthread_mutex_lock(&ctx->lock);
	for (struct fp_worker **link = &ctx->workers; *link; link = &(*link)->next) {
		if (*link == worker) {
			*link = worker->next;
			break;
		}
	}
	worker_add_counters(worker, &ctx->gone);
	pthread_mutex_unlock(&ctx->lock);
	fib_reader_remove(ctx->fib, &worker->reader);
	if (worker->epoll_fd >= 0)
		close(worker->epoll_fd);
	if (worker->encap_slots)
		munmap(worker->encap_slots, (size_t)BATCH * SLOT_BYTES);
	if (worker->decap_slots)
		munmap(worker->decap_slots, (size_t)BATCH * SLOT_BYTES);
	free(worker);
}

/** fp_worker_fd() - The descriptor that is readable when a turn has work */
int fp_worker_fd(const struct fp_worker *worker)
{
	return worker->epoll_fd;
}

/**
 * fp_worker_turn() - Do what is ready, at most BATCHES_PER_TURN batches each way
 * @worker: Worker
 *
 * Return: packets read and received, or -EBADFD when the TUN device is gone
 */
int fp_worker_turn(struct fp_worker *worker)
{
	struct epoll_event event[SOCKETS_MAX + 2];
	int ready = epoll_wait(worker->epoll_fd, event, SOCKETS_MAX + 2, 0);
	bool tun = false, underlay = false;
	unsigned int packets = 0;

	fib_enter(worker->ctx->fib, &worker->reader);
	for (int i = 0; i < ready; i++) {
		if (event[i].data.u64 == EPOLL_TUN) {
			/* tun_chr_poll() reports an error only when the device is gone. */
			if (event[i].events & EPOLLERR) {
				fib_leave(&worker->reader);
				return -EBADFD;
			}
			tun = true;
		} else if (event[i].data.u64 == EPOLL_UNDERLAY) {
			underlay = true;
		} else {
			flush_queue(worker, (unsigned int)event[i].data.u64);
		}
	}
	for (unsigned int i = 0; i < BATCHES_PER_TURN && (tun || underlay); i++) {
		unsigned int count;

		if (underlay) {
			count = decap_batch(worker);
			packets += count;
			underlay = count == BATCH;
		}
		if (tun && !worker->blocked) {
			count = encap_batch(worker);
			packets += count;
			tun = count == BATCH;
		}
	}
	fib_leave(&worker->reader);
	return (int)packets;
}

/** worker_add_counters() - Add a worker's counters to @into; both are arrays of uint64_t */
void worker_add_counters(const struct fp_worker *worker, struct fp_counters *into)
{
	const uint64_t *from = (const uint64_t *)&worker->counters;
	uint64_t *sum = (uint64_t *)into;

	static_assert(sizeof(*into) % sizeof(*sum) == 0, "fp_counters holds counters only");
	for (size_t i = 0; i < sizeof(*into) / sizeof(*sum); i++)
		sum[i] += __atomic_load_n(from + i, __ATOMIC_RELAXED);
}

/** worker_take_suspects() - Move up to @capacity samples out. Return: how many */
size_t worker_take_suspects(struct fp_worker *worker, struct fp_suspect *into, size_t capacity)
{
	unsigned int head = atomic_load_explicit(&worker->suspects_head, memory_order_acquire);
	unsigned int tail = atomic_load_explicit(&worker->suspects_tail, memory_order_relaxed);
	size_t count = 0;

	while (tail != head && count < capacity)
		into[count++] = worker->suspect[tail++ % SUSPECTS];
	atomic_store_explicit(&worker->suspects_tail, tail, memory_order_release);
	return count;
}

/** worker_next() - The next worker of the same context, or NULL */
struct fp_worker *worker_next(const struct fp_worker *worker)
{
	return worker->next;
}
