// Encapsulation by a packet socket on the underlay, which takes GSO frames (PACKET_VNET_HDR).
//
// What it may save: UDP_SEGMENT computes the outer checksum while it copies, and where the device
// has no checksum offload the kernel computes it again for each datagram; a packet socket copies
// only. With the ring not even that is copied, as the frame's pages are what is sent.
// Decapsulation stays with the UDP socket.
//
// The kernel hands a frame of the ring back once it let go of the super-packet, also where segments
// still name its pages (a device with scatter-gather): the ring is sound on this wire only, which
// copies while it cuts.

#define _GNU_SOURCE
#include <linux/if_packet.h>
#include <sys/mman.h>

#include "outer.h"

#ifndef VIRTIO_NET_HDR_GSO_UDP_L4
#define VIRTIO_NET_HDR_GSO_UDP_L4 5
#endif

enum {
	FRAMES = 64,
	FRAME = SLOT + 4096,
	FRAME_START = TPACKET2_HDRLEN - sizeof(struct sockaddr_ll), // of what is sent
	MAX_RING_MESSAGE = 17 * 4096 - 256, // a frame of the ring is at most 17 pages
};

struct vnet_outer {
	struct virtio_net_hdr vnet;
	struct outer outer;
} __attribute__((packed));

_Static_assert(sizeof(struct vnet_outer) == VNET_BYTES + sizeof(struct outer), "as it is written");

enum { SLOT_IN_FRAME = FRAME_START + sizeof(struct vnet_outer) };

struct packet_sender {
	struct encap encap;
	int wire;
	struct outer outer; // of every message, but for lengths
	uint8_t *slots;
	struct vnet_outer outers[ARENA];
	struct iovec vectors[ARENA][1 + 2 * MAX_SEGMENTS];
	struct mmsghdr mmsg[ARENA];
	uint8_t *ring, *gathered;
	size_t next; // frame of the ring
};

/**
 * set_outer() - Write the headers of a message
 * @s:		the sender
 * @to:		where
 * @message:	the message
 */
static void set_outer(const struct packet_sender *s, struct vnet_outer *to,
		      const struct message *message)
{
	struct vnet_outer head = {
		.vnet = { .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM,
			  .hdr_len = sizeof(struct outer),
			  .csum_start = offsetof(struct outer, udp),
			  .csum_offset = offsetof(struct udphdr, check) },
		.outer = s->outer,
	};

	set_lengths(&head.outer, message->bytes);
	head.outer.udp.check = pseudo_sum(&head.outer);
	if (message->segments > 1) {
		head.vnet.gso_type = VIRTIO_NET_HDR_GSO_UDP_L4;
		head.vnet.gso_size = (uint16_t)message->segment;
	}
	memcpy(to, &head, sizeof(head));
}

static void encapsulate(void *sender)
{
	struct packet_sender *s = sender;
	struct encap *e = &s->encap;
	size_t sent = 0;

	read_packets(e, s->slots, SLOT, READS);
	for (size_t i = 0; i < e->message_count; i++) {
		struct message *message = &e->messages[i];

		set_outer(s, &s->outers[i], message);
		s->vectors[i][0] = (struct iovec) { &s->outers[i], sizeof(s->outers[i]) };
		memcpy(&s->vectors[i][1], message->vectors,
		       message->vector_count * sizeof(struct iovec));
		s->mmsg[i].msg_hdr = (struct msghdr) { .msg_iov = s->vectors[i],
						       .msg_iovlen = 1 + message->vector_count };
	}
	while (sent < e->message_count) {
		int done =
			sendmmsg(s->wire, s->mmsg + sent, (unsigned)(e->message_count - sent), 0);

		sent += done > 0 ? (size_t)done : 1;
	}
	start_turn(e);
}

static struct packet_sender *open_sender(const struct options *options, int udp)
{
	static struct packet_sender s;
	struct sockaddr_ll address = { .sll_family = AF_PACKET }; // protocol 0: receives nothing
	int on = 1;

	encap_init(&s.encap, options);
	s.slots = malloc((size_t)READS * SLOT);
	if (!s.slots)
		fail("memory");
	address.sll_ifindex = open_outer(&s.outer, options, udp);
	s.wire = socket_in_netns(NULL, AF_PACKET, SOCK_RAW);
	if (setsockopt(s.wire, SOL_PACKET, PACKET_VNET_HDR, &on, sizeof(on)) ||
	    bind(s.wire, (struct sockaddr *)&address, sizeof(address)))
		fail("packet socket");
	return &s;
}

void run_packet(const struct options *options)
{
	int udp = open_wire(options);

	forward_received(options, udp, encapsulate, open_sender(options, udp));
}

static struct tpacket2_hdr *free_frame(const struct packet_sender *s, size_t taken)
{
	struct tpacket2_hdr *frame = NULL;

	if (taken < FRAMES)
		frame = (struct tpacket2_hdr *)(s->ring + (s->next + taken) % FRAMES * FRAME);
	if (frame && __atomic_load_n(&frame->tp_status, __ATOMIC_ACQUIRE) != TP_STATUS_AVAILABLE)
		fail("a frame that was sent is not free");
	return frame;
}

/**
 * send_frames() - Send the frames that are ready
 * @s:		the sender
 * @count:	how many; 0 afterwards
 *
 * When this returns, the kernel has let go of them.
 */
static void send_frames(struct packet_sender *s, size_t *count)
{
	if (*count && send(s->wire, NULL, 0, 0) < 0)
		fail("send of the ring");
	s->next = (s->next + *count) % FRAMES;
	*count = 0;
}

static void encapsulate_in_ring(void *sender)
{
	struct packet_sender *s = sender;
	struct encap *e = &s->encap;
	size_t ready = 0, bytes = 0;

	while (ready < FRAMES / 2 && bytes < READ_BYTES - MAX_DATAGRAM) {
		uint8_t *slot = (uint8_t *)free_frame(s, ready) + SLOT_IN_FRAME;
		bool gapped;
		ssize_t got = read_packet(e, slot, &gapped);

		if (got < 1)
			break;
		bytes += (size_t)got;
		take_packet(e, slot, (size_t)got, gapped);
		if (e->messages->vector_count > 1 || e->messages->vectors->iov_base != slot ||
		    e->message_count > 1)
			gather_messages(e, s->gathered);
		for (size_t i = 0; i < e->message_count; i++) {
			struct tpacket2_hdr *frame = free_frame(s, ready);
			struct message *message = &e->messages[i];
			uint8_t *start = (uint8_t *)frame + SLOT_IN_FRAME;

			if (message->vectors->iov_base != start)
				memcpy(start, message->vectors->iov_base, message->bytes);
			set_outer(s, (struct vnet_outer *)(start - sizeof(struct vnet_outer)),
				  message);
			frame->tp_len = (uint32_t)(sizeof(struct vnet_outer) + message->bytes);
			__atomic_store_n(&frame->tp_status, TP_STATUS_SEND_REQUEST,
					 __ATOMIC_RELEASE);
			if (++ready == FRAMES)
				send_frames(s, &ready);
		}
		start_turn(e);
	}
	send_frames(s, &ready);
}

void run_packet_ring(const struct options *options)
{
	struct tpacket_req request = { .tp_block_size = FRAME,
				       .tp_block_nr = FRAMES,
				       .tp_frame_size = FRAME,
				       .tp_frame_nr = FRAMES };
	int version = TPACKET_V2, udp = open_wire(options);
	struct packet_sender *s = open_sender(options, udp);

	s->encap.max_message = MAX_RING_MESSAGE;
	s->gathered = malloc(2 * READ_BYTES);
	if (!s->gathered)
		fail("memory");
	if (setsockopt(s->wire, SOL_PACKET, PACKET_VERSION, &version, sizeof(version)) ||
	    setsockopt(s->wire, SOL_PACKET, PACKET_TX_RING, &request, sizeof(request)))
		fail("PACKET_TX_RING");
	s->ring =
		mmap(NULL, (size_t)FRAME * FRAMES, PROT_READ | PROT_WRITE, MAP_SHARED, s->wire, 0);
	if (s->ring == MAP_FAILED)
		fail("mmap");
	forward_received(options, udp, encapsulate_in_ring, s);
}
