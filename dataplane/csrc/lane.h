/* SPDX-License-Identifier: Apache-2.0 */
#ifndef PYFLANNEL_LANE_H
#define PYFLANNEL_LANE_H

#include "decap.h"
#include "encap.h"

#define TUN_QUEUES_MAX 255 /* the kernel has 256 (MAX_TAP_QUEUES), one of them detached */
#define RECEIVE_SOCKETS_MAX 64
#define SOURCES_MAX (TUN_QUEUES_MAX + RECEIVE_SOCKETS_MAX)

/* Keys of an epoll set, beside the numbers of sources: send sockets that were full, and the end. */
#define KEY_SEND SOURCES_MAX
#define KEY_STOP (SOURCES_MAX + 1)
#define EVENTS (KEY_STOP + SEND_SOCKETS_MAX) /* as many can be ready */

/* Where packets come from: a TUN queue, or a receive socket. It is in one lane at a time. */
struct source {
	unsigned int number;
	struct tun_queue *queue; /* NULL: it is a receive socket */
	struct receive_socket *socket; /* NULL: it is a TUN queue */
	size_t packets; /* moved since its lane looked last */
};

/* What one thread, or the caller's event loop, has in its hands. */
struct lane {
	struct source *source; /* of the worker, by number */
	unsigned int sources; /* of the worker */
	int epoll_fd; /* -1 before lane_open() */
	_Atomic unsigned int held; /* sources in this lane */
	_Atomic bool has[SOURCES_MAX];
	bool muted[SOURCES_MAX]; /* TUN queues that are not waited for */
	bool stopped; /* lane_wait() saw the stop signal */
	struct source *queue; /* ready, and served longest ago; or NULL */
	unsigned int sockets; /* ready */
	struct source *socket[RECEIVE_SOCKETS_MAX];
	struct encap_side encap;
	struct decap_side decap;
};

int lane_open(struct lane *lane, struct fp_ctx *ctx, const struct fp_io *io, struct source *source,
	      unsigned int sources);
void lane_close(struct lane *lane);
int lane_add(struct lane *lane, struct source *source);
int lane_move(struct lane *from, struct lane *to, struct source *source);
int lane_wait(struct lane *lane, int timeout_ms);
int lane_turn(struct lane *lane, unsigned int batches);

#endif
