// Encapsulation by a TAP that takes super-packets with their outer headers (since Linux 6.17).
//
// The kernel forwards what is written there to the peer, and cuts it right before the underlay's
// device, as it does with those of its own tunnels. What that may save: no message for each 64
// segments, no headers for each of them, and the outer checksum is made of the inner one without
// another look at the payload. All segments of a super-packet have one tag, so it tells no place.
// Decapsulation stays with the UDP socket.

#define _GNU_SOURCE
#include <errno.h>

#include "outer.h"

#ifndef VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV4
#define VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV4 0x20
#define VIRTIO_NET_HDR_F_UDP_TUNNEL_CSUM 8
#endif

#ifndef TUN_F_UDP_TUNNEL_GSO
#define TUN_F_UDP_TUNNEL_GSO 0x80
#endif

#define TAP "bench1"

struct tunnel_vnet { // struct virtio_net_hdr_v1_hash_tunnel of newer headers
	struct virtio_net_hdr vnet;
	uint8_t unused[10];
	uint16_t outer_transport, inner_network; // offsets from the start of the frame
};

struct head {
	struct tunnel_vnet vnet;
	struct outer outer;
	uint8_t tag[TAG_BYTES];
};

_Static_assert(sizeof(struct head) == 24 + sizeof(struct outer) + TAG_BYTES, "as it is written");

enum { TUNNEL_BYTES = sizeof(struct outer) + TAG_BYTES };

struct tunnel_sender {
	int tun, tap;
	struct outer outer; // of every frame, but for lengths
	uint32_t super;
	uint8_t *slot;
};

/**
 * set_head() - Write what stands before a packet
 * @s:		the sender
 * @head:	where, zeroed
 * @vnet:	of the packet
 * @length:	of the packet, in bytes
 */
static void set_head(struct tunnel_sender *s, struct head *head, const struct virtio_net_hdr *vnet,
		     size_t length)
{
	struct tag tag = tag_of(vnet, s->super++);
	struct virtio_net_hdr *all = &head->vnet.vnet;

	tag.index = ANY_PLACE;
	memcpy(head->tag, &tag, sizeof(tag));
	head->outer = s->outer;
	set_lengths(&head->outer, TAG_BYTES + length);
	head->outer.udp.check = pseudo_sum(&head->outer);
	if (vnet->gso_type == VIRTIO_NET_HDR_GSO_NONE) {
		all->flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
		all->csum_start = offsetof(struct outer, udp);
		all->csum_offset = offsetof(struct udphdr, check);
		return;
	}
	*all = *vnet;
	all->flags |= VIRTIO_NET_HDR_F_UDP_TUNNEL_CSUM;
	all->gso_type |= VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV4;
	all->hdr_len += TUNNEL_BYTES;
	all->csum_start += TUNNEL_BYTES;
	head->vnet.outer_transport = offsetof(struct outer, udp);
	head->vnet.inner_network = TUNNEL_BYTES;
}

static void encapsulate(void *sender)
{
	struct tunnel_sender *s = sender;
	uint8_t *packet = s->slot + sizeof(struct head);

	for (size_t bytes = 0; bytes < READ_BYTES - MAX_DATAGRAM;) {
		ssize_t got = read(s->tun, packet - VNET_BYTES, SLOT - sizeof(struct head));
		struct virtio_net_hdr vnet;
		struct head head = { 0 };

		if (got <= VNET_BYTES)
			return;
		got -= VNET_BYTES;
		bytes += (size_t)got;
		memcpy(&vnet, packet - VNET_BYTES, sizeof(vnet));
		set_head(s, &head, &vnet, (size_t)got);
		memcpy(s->slot, &head, sizeof(head));
		if (write(s->tap, s->slot, sizeof(head) + (size_t)got) < 0 && errno != EAGAIN)
			fail("write of a frame with outer headers");
	}
}

static void set_sysctl(const char *name, const char *value)
{
	char path[64];
	int fd;

	snprintf(path, sizeof(path), "/proc/sys/net/ipv4/%s", name);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, value, strlen(value)) < 0)
		fail(path);
	close(fd);
}

/**
 * open_tap() - Make a TAP whose frames the host forwards, though they have its own address
 * @mac:	gets where they have to go
 *
 * Return: the descriptor
 */
static int open_tap(uint8_t *mac)
{
	unsigned int offloads =
		TUN_F_CSUM | TUN_F_TSO4 | TUN_F_UDP_TUNNEL_GSO; // older kernels refuse
	int fd = open_tun(TAP, IFF_TAP | IFF_VNET_HDR, offloads);
	int bytes = sizeof(struct tunnel_vnet);
	struct ifreq link = { 0 };

	if (ioctl(fd, TUNSETVNETHDRSZ, &bytes))
		fail("TUNSETVNETHDRSZ");
	ask_device(TAP, SIOCGIFHWADDR, &link);
	memcpy(mac, link.ifr_hwaddr.sa_data, ETH_ALEN);
	ask_device(TAP, SIOCSIFFLAGS, &(struct ifreq) { .ifr_flags = IFF_UP });
	set_sysctl("ip_forward", "1");
	set_sysctl("conf/" TAP "/accept_local", "1");
	set_sysctl("conf/" TAP "/rp_filter", "0");
	set_sysctl("conf/all/rp_filter", "0"); // the larger one of the two counts
	return fd;
}

void run_tunnel(const struct options *options)
{
	static struct tunnel_sender s;
	int udp = open_wire(options);

	s.tun = options->tun;
	s.slot = malloc(SLOT);
	if (!s.slot)
		fail("memory");
	open_outer(&s.outer, options, udp);
	s.tap = open_tap(s.outer.ethernet.h_dest);
	forward_received(options, udp, encapsulate, &s);
}
