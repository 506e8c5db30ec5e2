/* SPDX-License-Identifier: Apache-2.0 */
#ifndef PYFLANNEL_DECAP_H
#define PYFLANNEL_DECAP_H

#include <sys/socket.h>

#include "verdict.h"
#include "gro.h"

#define SUSPECTS 64
#define RECEIVES 64

/* One message that came in. */
struct receive {
	struct iovec iov;
	struct sockaddr_storage from;
	union {
		char bytes[3 * CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
};

/* A socket that datagrams come in by. */
struct receive_socket {
	int fd;
	unsigned int slots; /* to receive into next time */
};

/* The way from the wire to the TUN. One thread at a time is in it. */
struct decap_side {
	struct fp_ctx *ctx;
	struct fib_reader reader;
	bool registered; /* as a reader */
	int tun_fd;
	uint64_t received_ms; /* when the present batch came */
	uint64_t bulk_ms; /* when messages were large last */
	uint8_t *arena;
	struct receive receive[RECEIVES];
	struct mmsghdr message[RECEIVES];
	struct sender_cache cache;
	struct gro gro;
	struct fp_counters counters;
	_Atomic unsigned int suspects_head, suspects_tail;
	struct fp_suspect suspect[SUSPECTS];
};

int decap_open(struct decap_side *side, struct fp_ctx *ctx, const struct fp_io *io);
void decap_close(struct decap_side *side);
int decap_turn(struct decap_side *side, struct receive_socket *socket, unsigned int batches);
void receive_socket_init(struct receive_socket *socket, int fd);
size_t decap_take_suspects(struct decap_side *side, struct fp_suspect *into, size_t capacity);

#endif
