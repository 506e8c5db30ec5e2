// Both directions by io_uring: multishot reads and receives into provided buffers, sends and writes
// submitted together.
//
// A turn takes the completions that are there, submits what follows from them, waits until the
// kernel no longer needs its memory, and gives the buffers back. Sends and writes finish while they
// are submitted, unless a socket buffer is full.

#define _GNU_SOURCE
#include <errno.h>
#include <liburing.h>
#include <netinet/udp.h>
#include <pthread.h>

#include "null.h"

enum {
	READ_MULTISHOT = 49, // IORING_OP_READ_MULTISHOT, Linux 6.7
	BUFFERS = 64, // a power of two
	ENTRIES = 2048,
	GROUPS = 256, // super-packets written in one turn
};

enum kind { READ, RECEIVE, SEND, WRITE };

// The thread that owns a ring enters the kernel, and finds completions there.
static const struct io_uring_params entered = { .flags = IORING_SETUP_SINGLE_ISSUER |
							 IORING_SETUP_DEFER_TASKRUN };

// A thread of the kernel watches the ring, and sleeps once it saw nothing for so many ms.
static const struct io_uring_params watched = {
	.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_SQPOLL, .sq_thread_idle = 1
};

struct buffers {
	struct io_uring_buf_ring *ring;
	uint8_t *memory;
	enum kind kind; // also the group's number
	uint16_t used[BUFFERS]; // in this turn
	size_t used_count;
	bool armed;
};

struct uring {
	struct io_uring ring;
	struct io_uring_params parameters;
	struct encap encap;
	struct decap decap;
	int tun, wire;
	unsigned int underway; // sends and writes
	struct buffers reads, receives;
	struct msghdr receive; // what a multishot receive asks for
	struct msghdr sends[ARENA];
	union {
		struct cmsghdr align;
		uint8_t bytes[CMSG_SPACE(sizeof(uint16_t))];
	} control[ARENA];
	struct group groups[GROUPS];
	size_t group_count;
	struct io_uring_cqe later[ENTRIES]; // completions that came while a turn waited
	size_t later_count;
};

static void open_buffers(struct uring *u, struct buffers *buffers, enum kind kind)
{
	struct io_uring_buf_reg registration = { .ring_entries = BUFFERS, .bgid = kind };

	buffers->kind = kind;
	buffers->memory = malloc((size_t)BUFFERS * SLOT);
	if (!buffers->memory ||
	    posix_memalign((void **)&buffers->ring, 4096, BUFFERS * sizeof(struct io_uring_buf)))
		fail("memory");
	registration.ring_addr = (uint64_t)(uintptr_t)buffers->ring;
	if (io_uring_register_buf_ring(&u->ring, &registration, 0))
		fail("io_uring_register_buf_ring");
	io_uring_buf_ring_init(buffers->ring);
	for (uint16_t i = 0; i < BUFFERS; i++)
		buffers->used[buffers->used_count++] = i;
}

/**
 * give_back() - Let the kernel fill the buffers of this turn again
 * @buffers:	the buffers
 */
static void give_back(struct buffers *buffers)
{
	// A packet is read behind room for its tag, of which the vnet header takes the end.
	size_t room = buffers->kind == READ ? TAG_BYTES - VNET_BYTES : 0;

	for (size_t i = 0; i < buffers->used_count; i++)
		io_uring_buf_ring_add(buffers->ring,
				      buffers->memory + (size_t)buffers->used[i] * SLOT + room,
				      (unsigned)(SLOT - room), buffers->used[i],
				      io_uring_buf_ring_mask(BUFFERS), (int)i);
	io_uring_buf_ring_advance(buffers->ring, (int)buffers->used_count);
	buffers->used_count = 0;
}

static struct io_uring_sqe *next_entry(struct uring *u, enum kind kind)
{
	struct io_uring_sqe *entry = io_uring_get_sqe(&u->ring);

	if (!entry) {
		io_uring_submit(&u->ring);
		entry = io_uring_get_sqe(&u->ring);
	}
	if (!entry)
		fail("io_uring_get_sqe");
	memset(entry, 0, sizeof(*entry));
	entry->user_data = kind;
	return entry;
}

static void arm_read(struct uring *u)
{
	struct io_uring_sqe *entry = next_entry(u, READ);

	io_uring_prep_rw(READ_MULTISHOT, entry, u->tun, NULL, 0, (uint64_t)-1);
	entry->flags = IOSQE_BUFFER_SELECT;
	entry->buf_group = READ;
	entry->user_data = READ;
	u->reads.armed = true;
}

static void arm_receive(struct uring *u)
{
	struct io_uring_sqe *entry = next_entry(u, RECEIVE);

	u->receive = (struct msghdr) { .msg_controllen = CMSG_SPACE(sizeof(int)) };
	io_uring_prep_recvmsg_multishot(entry, u->wire, &u->receive, 0);
	entry->flags = IOSQE_BUFFER_SELECT;
	entry->buf_group = RECEIVE;
	entry->user_data = RECEIVE;
	u->receives.armed = true;
}

/**
 * finish() - Submit what is prepared and wait until sends and writes are done
 * @u:		the ring
 */
static void finish(struct uring *u)
{
	struct encap *e = &u->encap;

	for (size_t i = 0; i < e->message_count; i++) {
		struct message *message = &e->messages[i];
		struct io_uring_sqe *entry = next_entry(u, SEND);

		u->sends[i] = (struct msghdr) { .msg_iov = message->vectors,
						.msg_iovlen = message->vector_count };
		if (message->segments > 1)
			set_segment_size(&u->sends[i], &u->control[i], message->segment);
		io_uring_prep_sendmsg(entry, u->wire, &u->sends[i], 0);
		entry->user_data = SEND;
		u->underway++;
	}
	if (u->underway)
		io_uring_submit(&u->ring);
	while (u->underway) {
		struct io_uring_cqe *completion;

		if (io_uring_wait_cqe(&u->ring, &completion))
			continue;
		if (completion->user_data >= SEND)
			u->underway--;
		else
			u->later[u->later_count++] = *completion;
		io_uring_cqe_seen(&u->ring, completion);
	}
	start_turn(e);
	u->group_count = 0;
	u->decap.group = &u->groups[0];
	u->decap.group->count = 0;
}

/**
 * write_group() - Prepare the write of a super-packet
 * @d:		decapsulation
 */
static void write_group(struct decap *d)
{
	struct uring *u = d->context;
	struct io_uring_sqe *entry = next_entry(u, WRITE);

	io_uring_prep_writev(entry, u->tun, d->group->vectors, (unsigned)d->group->count, 0);
	entry->user_data = WRITE;
	u->underway++;
	if (++u->group_count == GROUPS)
		finish(u);
	d->group = &u->groups[u->group_count];
	d->group->count = 0;
}

/**
 * take() - Take a packet or a message that came
 * @u:		the ring
 * @completion:	says which
 */
static void take(struct uring *u, const struct io_uring_cqe *completion)
{
	struct buffers *buffers = completion->user_data == READ ? &u->reads : &u->receives;
	unsigned int number = completion->flags >> IORING_CQE_BUFFER_SHIFT;
	uint8_t *memory;

	if (!(completion->flags & IORING_CQE_F_MORE))
		buffers->armed = false;
	// The socket reports what ICMP said about a send; the receive is armed again.
	if (completion->res < 0 && completion->res != -ENOBUFS && buffers->kind == READ) {
		errno = -completion->res;
		fail("read");
	}
	if (!(completion->flags & IORING_CQE_F_BUFFER))
		return;
	memory = buffers->memory + (size_t)number * SLOT;
	buffers->used[buffers->used_count++] = (uint16_t)number;
	if (buffers->kind == READ) {
		if (is_full(&u->encap))
			finish(u);
		if (completion->res > VNET_BYTES)
			take_packet(&u->encap, memory, (size_t)completion->res - VNET_BYTES, false);
	} else {
		struct io_uring_recvmsg_out *out =
			io_uring_recvmsg_validate(memory, completion->res, &u->receive);
		size_t length = io_uring_recvmsg_payload_length(out, completion->res, &u->receive);
		struct msghdr head = { .msg_control = (uint8_t *)(out + 1),
				       .msg_controllen = out->controllen };

		join_message(&u->decap, io_uring_recvmsg_payload(out, &u->receive), length,
			     gro_size(&head, length));
	}
}

static void turn(struct uring *u)
{
	struct io_uring_cqe taken[2 * BUFFERS];
	struct io_uring_cqe *completion;
	size_t count = 0;

	if (!u->later_count)
		io_uring_submit_and_wait(&u->ring, 1);
	else
		io_uring_submit(&u->ring);
	while (count < u->later_count && count < 2 * BUFFERS) {
		taken[count] = u->later[count];
		count++;
	}
	memmove(u->later, u->later + count, (u->later_count - count) * sizeof(u->later[0]));
	u->later_count -= count;
	while (count < 2 * BUFFERS && !io_uring_peek_cqe(&u->ring, &completion)) {
		taken[count++] = *completion;
		io_uring_cqe_seen(&u->ring, completion);
	}
	for (size_t i = 0; i < count; i++)
		take(u, &taken[i]);
	flush(&u->decap);
	finish(u);
	give_back(&u->reads);
	give_back(&u->receives);
}

/**
 * run_directions() - Forward for ever
 * @u:		the ring, with TUN and socket open
 * @out:	whether packets go from the TUN to the wire
 * @in:		whether they go from the wire to the TUN
 */
static void run_directions(struct uring *u, bool out, bool in)
{
	u->decap = (struct decap) { .group = &u->groups[0], .write = write_group, .context = u };
	if (io_uring_queue_init_params(ENTRIES, &u->ring, &u->parameters))
		fail("io_uring_queue_init");
	open_buffers(u, &u->reads, READ);
	open_buffers(u, &u->receives, RECEIVE);
	give_back(&u->reads);
	give_back(&u->receives);
	for (;;) {
		if (out && !u->reads.armed)
			arm_read(u);
		if (in && !u->receives.armed)
			arm_receive(u);
		turn(u);
	}
}

static void *encapsulate_forever(void *ring)
{
	run_directions(ring, true, false);
	return NULL;
}

static void run(const struct options *options, const struct io_uring_params *parameters)
{
	static struct uring rings[2];
	pthread_t thread;
	int wire = open_wire(options);

	// A read of a non-blocking file fails with EAGAIN instead of waiting.
	if (fcntl(options->tun, F_SETFL, 0))
		fail("fcntl");
	for (int i = 0; i < options->threads; i++) {
		encap_init(&rings[i].encap, options);
		rings[i].parameters = *parameters;
		rings[i].tun = options->tun;
		rings[i].wire = wire;
	}
	if (options->threads == 2) {
		if (pthread_create(&thread, NULL, encapsulate_forever, &rings[1]))
			fail("pthread_create");
		run_directions(&rings[0], false, true);
	}
	run_directions(&rings[0], true, true);
}

void run_uring(const struct options *options)
{
	run(options, &entered);
}

void run_uring_sqpoll(const struct options *options)
{
	run(options, &watched);
}
