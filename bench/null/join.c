// Datagrams of the wire into super-packets for the TUN.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>

#include "null.h"

static void set_length(uint8_t *packet, size_t length)
{
	struct iphdr *ip = (struct iphdr *)packet;
	uint32_t sum = 0;
	uint16_t word;

	ip->tot_len = htons((uint16_t)length);
	ip->check = 0;
	for (size_t i = 0; i < ip->ihl * 4u; i += 2) {
		memcpy(&word, packet + i, 2);
		sum += word;
	}
	sum = (sum & 0xffff) + (sum >> 16);
	ip->check = (uint16_t) ~(sum + (sum >> 16));
}

/**
 * write_now() - Write a super-packet and empty the group
 * @d:		decapsulation, whose group has its vnet header
 *
 * What the TUN has no room for, or gets while it is still down (EIO), is dropped.
 */
void write_now(struct decap *d)
{
	if (writev(d->tun, d->group->vectors, (int)d->group->count) < 0 && errno != EAGAIN &&
	    errno != EIO)
		fail("writev");
	d->group->count = 0;
}

/**
 * flush() - Have the joined segments written to the TUN as one packet
 * @d:		decapsulation
 */
void flush(struct decap *d)
{
	struct group *group = d->group;

	if (!group->count)
		return;
	group->vnet = (struct virtio_net_hdr) { .flags = group->first.flags,
						.csum_start = group->first.csum_start,
						.csum_offset = group->first.csum_offset };
	if (group->first.gso_size) {
		set_length(group->packet, group->bytes);
		if (group->count > 2) {
			group->vnet.gso_type = group->first.gso_type;
			group->vnet.gso_size = group->first.gso_size;
			group->vnet.hdr_len =
				(uint16_t)(group->vectors[1].iov_len - group->vnet.gso_size);
		}
	}
	group->vectors[0] = (struct iovec) { &group->vnet, VNET_BYTES };
	d->write(d);
}

/**
 * continues() - Tell whether a datagram is the next segment of the group
 * @group:	the group
 * @tag:	of the datagram
 * @packet:	its IP packet
 *
 * Return: whether it is
 */
static bool continues(const struct group *group, const struct tag *tag, const uint8_t *packet)
{
	const struct tcphdr *first, *tcp;

	if (!group->count || group->count == GROUP || !tag->gso_size ||
	    tag->super != group->first.super)
		return false;
	if (tag->index != ANY_PLACE)
		return tag->index == group->next;
	first = (const struct tcphdr *)(group->packet + tag->csum_start);
	tcp = (const struct tcphdr *)(packet + tag->csum_start);
	return ntohl(tcp->seq) - ntohl(first->seq) ==
	       group->bytes - tag->csum_start - 4u * first->doff;
}

/**
 * join() - Take a datagram into the group it continues, or begin a new one
 * @d:		decapsulation
 * @datagram:	its bytes
 * @length:	how many
 */
static void join(struct decap *d, uint8_t *datagram, size_t length)
{
	struct group *group = d->group;
	uint8_t *packet = datagram + TAG_BYTES;
	struct tag tag;
	size_t header;

	if (length <= TAG_BYTES + sizeof(struct iphdr))
		return;
	memcpy(&tag, datagram, sizeof(tag));
	length -= TAG_BYTES;
	if (continues(group, &tag, packet)) {
		struct tcphdr *tcp = (struct tcphdr *)(packet + tag.csum_start);
		struct tcphdr *first = (struct tcphdr *)(group->packet + tag.csum_start);

		header = tag.csum_start + 4u * tcp->doff;
		first->fin |= tcp->fin;
		first->psh |= tcp->psh;
		group->vectors[group->count++] =
			(struct iovec) { packet + header, length - header };
		group->bytes += length - header;
		group->next++;
		return;
	}
	flush(d);
	group = d->group;
	group->first = tag;
	group->next = (uint16_t)(tag.index + 1);
	group->packet = packet;
	group->bytes = length;
	group->vectors[1] = (struct iovec) { packet, length };
	group->count = 2; // the vnet header's vector is the first
}

/**
 * join_message() - Take the datagrams of one message
 * @d:		decapsulation
 * @bytes:	the message; stays as it is until what it went into is written
 * @length:	its bytes
 * @datagram:	bytes of each datagram but the last
 */
void join_message(struct decap *d, uint8_t *bytes, size_t length, size_t datagram)
{
	for (size_t at = 0; at < length; at += datagram)
		join(d, bytes + at, length - at < datagram ? length - at : datagram);
}
