// Both directions by an AF_XDP socket in copy mode.
//
// What it saves: the kernel's segmentation and coalescing, its UDP and IP, and every pass for the
// outer checksum, which is 0 as in the kernel's own vxlan. What it costs: work for each frame, as
// there is neither UDP_SEGMENT nor UDP_GRO. The TUN is read with gaps so that each segment lies in
// a chunk of its own; one copy brings it to the wire.

#define _GNU_SOURCE
#include <linux/bpf.h>
#include <linux/if_link.h>
#include <linux/if_xdp.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "outer.h"

enum {
	CHUNK = 2048,
	RING = 4096, // entries of each ring, and chunks for what is received
	SLOTS = 32,
	SLOT_CHUNKS = MAX_SEGMENTS,
	COPIES = 2 * ARENA, // chunks for segments that a guess did not fit
	COPY_AREA = SLOTS * SLOT_CHUNKS,
	RECEIVE_AREA = COPY_AREA + COPIES,
	CHUNKS = RECEIVE_AREA + RING,
	HEADER = sizeof(struct outer), // before a segment in its chunk
};

struct ring {
	uint32_t *producer, *consumer;
	void *entries;
	uint32_t at; // next entry of ours
};

struct xdp {
	struct encap encap;
	struct decap decap;
	struct group group;
	int socket;
	uint8_t *memory;
	struct outer outer;
	struct ring fill, completion, rx, tx;
	size_t copies; // chunks used in this turn
};

static int bpf(int command, union bpf_attr *attributes)
{
	int result = (int)syscall(SYS_bpf, command, attributes, sizeof(*attributes));

	if (result < 0)
		fail("bpf");
	return result;
}

/**
 * steer() - Have the device give our datagrams to the socket
 * @x:		the forwarder
 * @link:	index of the device
 *
 * The program: IPv4, UDP, destination WIRE_PORT -> the socket; all else -> the kernel.
 */
static void steer(const struct xdp *x, int link)
{
	uint32_t key = 0;
	union bpf_attr map = {
		.map_type = BPF_MAP_TYPE_XSKMAP, .key_size = 4, .value_size = 4, .max_entries = 1
	};
	int sockets = bpf(BPF_MAP_CREATE, &map);
	struct bpf_insn code[] = {
		{ BPF_LDX | BPF_MEM | BPF_W, 2, 1, offsetof(struct xdp_md, data), 0 },
		{ BPF_LDX | BPF_MEM | BPF_W, 3, 1, offsetof(struct xdp_md, data_end), 0 },
		{ BPF_ALU64 | BPF_MOV | BPF_X, 4, 2, 0, 0 },
		{ BPF_ALU64 | BPF_ADD | BPF_K, 4, 0, 0, HEADER },
		{ BPF_JMP | BPF_JGT | BPF_X, 4, 3, 11, 0 },
		{ BPF_LDX | BPF_MEM | BPF_H, 5, 2, offsetof(struct ethhdr, h_proto), 0 },
		{ BPF_JMP | BPF_JNE | BPF_K, 5, 0, 9, htons(ETH_P_IP) },
		{ BPF_LDX | BPF_MEM | BPF_B, 5, 2, ETH_HLEN + offsetof(struct iphdr, protocol), 0 },
		{ BPF_JMP | BPF_JNE | BPF_K, 5, 0, 7, IPPROTO_UDP },
		{ BPF_LDX | BPF_MEM | BPF_H, 5, 2, offsetof(struct outer, udp.dest), 0 },
		{ BPF_JMP | BPF_JNE | BPF_K, 5, 0, 5, htons(WIRE_PORT) },
		{ BPF_LD | BPF_IMM | BPF_DW, 1, BPF_PSEUDO_MAP_FD, 0, sockets },
		{ 0 },
		{ BPF_ALU64 | BPF_MOV | BPF_K, 2, 0, 0, 0 },
		{ BPF_ALU64 | BPF_MOV | BPF_K, 3, 0, 0, XDP_PASS },
		{ BPF_JMP | BPF_CALL, 0, 0, 0, BPF_FUNC_redirect_map },
		{ BPF_JMP | BPF_EXIT, 0, 0, 0, 0 },
		{ BPF_ALU64 | BPF_MOV | BPF_K, 0, 0, 0, XDP_PASS },
		{ BPF_JMP | BPF_EXIT, 0, 0, 0, 0 },
	};
	union bpf_attr program = { .prog_type = BPF_PROG_TYPE_XDP,
				   .insns = (uintptr_t)code,
				   .insn_cnt = sizeof(code) / sizeof(code[0]),
				   .license = (uintptr_t) "GPL",
				   .expected_attach_type = BPF_XDP };
	union bpf_attr element = { .map_fd = (uint32_t)sockets,
				   .key = (uintptr_t)&key,
				   .value = (uintptr_t)&x->socket };
	union bpf_attr attach = { 0 };

	// The jumps to the end count from where they stand.
	for (int i = 0; i < 11; i++)
		if ((code[i].code & 0x07) == BPF_JMP)
			code[i].off = (int16_t)(17 - i - 1);
	attach.link_create.prog_fd = (uint32_t)bpf(BPF_PROG_LOAD, &program);
	attach.link_create.target_ifindex = (uint32_t)link;
	attach.link_create.attach_type = BPF_XDP;
	attach.link_create.flags = XDP_FLAGS_DRV_MODE;
	bpf(BPF_MAP_UPDATE_ELEM, &element);
	bpf(BPF_LINK_CREATE, &attach); // lasts as long as the program
}

static void map_ring(const struct xdp *x, struct ring *ring, uint64_t page,
		     const struct xdp_ring_offset *offsets, size_t entry)
{
	uint8_t *start = mmap(NULL, offsets->desc + RING * entry, PROT_READ | PROT_WRITE,
			      MAP_SHARED | MAP_POPULATE, x->socket, (off_t)page);
	if (start == MAP_FAILED)
		fail("mmap of a ring");
	ring->producer = (uint32_t *)(start + offsets->producer);
	ring->consumer = (uint32_t *)(start + offsets->consumer);
	ring->entries = start + offsets->desc;
}

static void open_socket(struct xdp *x, int link)
{
	size_t bytes = (size_t)CHUNKS * CHUNK;
	struct xdp_umem_reg region = { .len = bytes, .chunk_size = CHUNK };
	struct sockaddr_xdp address = { .sxdp_family = AF_XDP,
					.sxdp_flags = XDP_COPY,
					.sxdp_ifindex = (uint32_t)link };
	static const int rings[] = { XDP_UMEM_FILL_RING, XDP_UMEM_COMPLETION_RING, XDP_RX_RING,
				     XDP_TX_RING };
	struct xdp_mmap_offsets offsets;
	socklen_t length = sizeof(offsets);
	int entries = RING;

	x->socket = socket_in_netns(NULL, AF_XDP, SOCK_RAW);
	x->memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	region.addr = (uintptr_t)x->memory;
	if (x->memory == MAP_FAILED ||
	    setsockopt(x->socket, SOL_XDP, XDP_UMEM_REG, &region, sizeof(region)))
		fail("XDP_UMEM_REG");
	for (int i = 0; i < 4; i++)
		if (setsockopt(x->socket, SOL_XDP, rings[i], &entries, sizeof(entries)))
			fail("ring of AF_XDP");
	if (getsockopt(x->socket, SOL_XDP, XDP_MMAP_OFFSETS, &offsets, &length))
		fail("XDP_MMAP_OFFSETS");
	map_ring(x, &x->fill, XDP_UMEM_PGOFF_FILL_RING, &offsets.fr, sizeof(uint64_t));
	map_ring(x, &x->completion, XDP_UMEM_PGOFF_COMPLETION_RING, &offsets.cr, sizeof(uint64_t));
	map_ring(x, &x->rx, XDP_PGOFF_RX_RING, &offsets.rx, sizeof(struct xdp_desc));
	map_ring(x, &x->tx, XDP_PGOFF_TX_RING, &offsets.tx, sizeof(struct xdp_desc));
	if (bind(x->socket, (struct sockaddr *)&address, sizeof(address)))
		fail("bind of AF_XDP");
	for (uint32_t i = 0; i < RING; i++)
		((uint64_t *)x->fill.entries)[i] = (uint64_t)(RECEIVE_AREA + i) * CHUNK;
	x->fill.at = RING;
	__atomic_store_n(x->fill.producer, RING, __ATOMIC_RELEASE);
}

/**
 * send_frames() - Send what this turn collected and wait until its chunks are free
 * @x:		the forwarder
 */
static void send_frames(struct xdp *x)
{
	struct encap *e = &x->encap;

	for (size_t i = 0; i < e->message_count; i++) {
		struct message *message = &e->messages[i];

		for (size_t j = 0; j < message->vector_count; j++) {
			struct iovec *part = &message->vectors[j];
			size_t length = part->iov_len;
			uint8_t *start = part->iov_base;

			if (start < x->memory || start >= x->memory + (size_t)CHUNKS * CHUNK ||
			    (size_t)(start - x->memory) % CHUNK != HEADER) {
				// Header and payload lie apart; they are one frame.
				start = x->memory + (COPY_AREA + x->copies++) * (size_t)CHUNK +
					HEADER;
				memcpy(start, part->iov_base, part->iov_len);
				if (length < message->segment && j + 1 < message->vector_count) {
					part++, j++;
					memcpy(start + length, part->iov_base, part->iov_len);
					length += part->iov_len;
				}
			}
			memcpy(start - HEADER, &x->outer, HEADER);
			set_lengths((struct outer *)(start - HEADER), length);
			((struct xdp_desc *)x->tx.entries)[x->tx.at++ % RING] =
				(struct xdp_desc) { .addr = (uint64_t)(start - HEADER - x->memory),
						    .len = (uint32_t)(HEADER + length) };
		}
	}
	__atomic_store_n(x->tx.producer, x->tx.at, __ATOMIC_RELEASE);
	// A call sends 32 frames. On a veth a frame is complete once the other end has it.
	while (__atomic_load_n(x->completion.producer, __ATOMIC_ACQUIRE) != x->tx.at)
		sendto(x->socket, NULL, 0, MSG_DONTWAIT, NULL, 0);
	__atomic_store_n(x->completion.consumer, x->tx.at, __ATOMIC_RELEASE);
	x->copies = 0;
	start_turn(e);
}

static void encapsulate(void *forwarder)
{
	struct xdp *x = forwarder;

	read_packets(&x->encap, x->memory + HEADER, SLOT_CHUNKS * CHUNK, SLOTS);
	send_frames(x);
}

static void decapsulate(void *forwarder, bool wait)
{
	struct xdp *x = forwarder;
	struct xdp_desc *frames = x->rx.entries;
	uint32_t begin = x->rx.at, end;

	if (wait)
		poll(&(struct pollfd) { x->socket, POLLIN, 0 }, 1, -1);
	end = __atomic_load_n(x->rx.producer, __ATOMIC_ACQUIRE);
	for (; x->rx.at != end; x->rx.at++) {
		struct xdp_desc *frame = &frames[x->rx.at % RING];

		if (frame->len > HEADER)
			join_message(&x->decap, x->memory + frame->addr + HEADER,
				     frame->len - HEADER, frame->len - HEADER);
	}
	flush(&x->decap);
	for (uint32_t i = begin; i != end; i++)
		((uint64_t *)x->fill.entries)[x->fill.at++ % RING] =
			frames[i % RING].addr / CHUNK * CHUNK;
	__atomic_store_n(x->rx.consumer, end, __ATOMIC_RELEASE);
	__atomic_store_n(x->fill.producer, x->fill.at, __ATOMIC_RELEASE);
}

void run_xdp(const struct options *options)
{
	static struct xdp x;
	int link = open_outer(&x.outer, options, open_wire(options));

	encap_init(&x.encap, options);
	x.encap.stride = CHUNK;
	x.encap.room = SLOT_CHUNKS * CHUNK - HEADER;
	x.decap = (struct decap) { .group = &x.group, .write = write_now, .tun = options->tun };
	open_socket(&x, link);
	steer(&x, link);
	forward(options, &(struct sides) { x.socket, encapsulate, &x, decapsulate, &x });
}
