// Super-packets of the TUN into messages for the wire.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>

#include "null.h"

/**
 * add_segment() - Append a datagram to the messages of this turn
 * @e:		encapsulation
 * @vectors:	its parts
 * @count:	how many
 * @bytes:	its length
 */
static void add_segment(struct encap *e, const struct iovec *vectors, size_t count, size_t bytes)
{
	struct message *last = e->message_count ? &e->messages[e->message_count - 1] : NULL;

	if (!last || last->closed || bytes > last->segment || last->segments == MAX_SEGMENTS ||
	    last->bytes + bytes > e->max_message) {
		last = &e->messages[e->message_count++];
		last->vectors = &e->vectors[e->vector_count];
		last->vector_count = last->bytes = last->segments = 0;
		last->segment = bytes;
	}
	last->closed = bytes < last->segment; // only the last segment may be shorter
	last->bytes += bytes;
	last->segments++;
	for (size_t i = 0; i < count; i++) {
		struct iovec *end = last->vectors + last->vector_count - 1;

		if (last->vector_count &&
		    (uint8_t *)end->iov_base + end->iov_len == (uint8_t *)vectors[i].iov_base) {
			end->iov_len += vectors[i].iov_len;
			continue;
		}
		e->vectors[e->vector_count++] = vectors[i];
		last->vector_count++;
	}
}

static void set_header(uint8_t *start, const struct tag *tag, size_t header, size_t payload,
		       size_t offset, bool last)
{
	struct iphdr *ip = (struct iphdr *)(start + TAG_BYTES);
	struct tcphdr *tcp = (struct tcphdr *)(start + TAG_BYTES + tag->csum_start);

	memcpy(start, tag, sizeof(*tag));
	ip->tot_len = htons((uint16_t)(header + payload));
	tcp->seq = htonl(ntohl(tcp->seq) + (uint32_t)offset);
	if (!last)
		tcp->fin = tcp->psh = 0;
}

static size_t stride_of(const struct encap *e, size_t header, size_t mss)
{
	return e->stride ? e->stride : TAG_BYTES + header + mss;
}

/**
 * segment() - Cut a TCP super-packet
 * @e:		encapsulation
 * @tag:	its tag, index 0
 * @packet:	the IP packet, behind TAG_BYTES of room; with gaps, its first segment
 * @header:	bytes of its headers
 * @payload:	bytes behind them
 * @gapped:	whether the payload was read with gaps
 */
static void segment(struct encap *e, struct tag *tag, uint8_t *packet, size_t header,
		    size_t payload, bool gapped)
{
	size_t mss = tag->gso_size, stride = stride_of(e, header, mss), offset = 0;
	uint8_t original[MAX_HEADER];

	memcpy(original, packet, header);
	for (; offset < payload; offset += mss, tag->index++) {
		size_t part = payload - offset < mss ? payload - offset : mss;
		uint8_t *start = gapped ? packet - TAG_BYTES + tag->index * stride
					: e->headers[e->header_count++];
		struct iovec vectors[2] = {
			{ start, TAG_BYTES + header },
			{ gapped ? start + TAG_BYTES + header : packet + header + offset, part }
		};

		if (e->design == FLAT) {
			start = e->flat + e->flat_used;
			memcpy(start + TAG_BYTES + header, vectors[1].iov_base, part);
			e->flat_used += TAG_BYTES + header + part;
			vectors[0].iov_base = start;
			vectors[1].iov_base = start + TAG_BYTES + header;
		}
		memcpy(start + TAG_BYTES, original, header);
		set_header(start, tag, header, part, offset, offset + part == payload);
		add_segment(e, vectors, 2, TAG_BYTES + header + part);
	}
}

/**
 * read_packet() - Read a packet from the TUN
 * @e:		encapsulation
 * @slot:	where to
 * @gapped:	gets whether the payload lies with gaps of the guessed sizes
 *
 * Return: bytes read behind the vnet header, less than 1 when there was none
 */
ssize_t read_packet(struct encap *e, uint8_t *slot, bool *gapped)
{
	size_t stride = stride_of(e, e->header, e->mss), count = 1;
	uint8_t *end = slot + e->room, *next;
	struct iovec vectors[MAX_SEGMENTS + 1];
	ssize_t got;

	*gapped = false;
	if (e->design != GAPS || !e->mss) {
		got = read(e->tun, slot + TAG_BYTES - VNET_BYTES, e->room - TAG_BYTES);
		return got - VNET_BYTES;
	}
	vectors[0] =
		(struct iovec) { slot + TAG_BYTES - VNET_BYTES, VNET_BYTES + e->header + e->mss };
	for (next = slot + stride; next + stride <= end && count < MAX_SEGMENTS; next += stride)
		vectors[count++] = (struct iovec) { next + TAG_BYTES + e->header, e->mss };
	got = readv(e->tun, vectors, (int)count) - VNET_BYTES;
	*gapped = got > (ssize_t)(e->header + e->mss);
	return got;
}

/**
 * close_gaps() - Move a payload together that was read with gaps of wrong sizes
 * @e:		encapsulation
 * @packet:	the IP packet
 * @length:	its bytes
 */
static void close_gaps(const struct encap *e, uint8_t *packet, size_t length)
{
	size_t gap = stride_of(e, e->header, e->mss) - e->mss, done = e->header + e->mss;

	for (size_t i = 1; done < length; i++, done += e->mss)
		memmove(packet + done, packet + done + i * gap, e->mss);
}

/**
 * take_packet() - Add a packet to the messages of this turn
 * @e:		encapsulation, not full
 * @slot:	where it was read; stays as it is until the messages are sent
 * @length:	its bytes
 * @gapped:	whether the payload lies with gaps of the guessed sizes
 */
void take_packet(struct encap *e, uint8_t *slot, size_t length, bool gapped)
{
	uint8_t *packet = slot + TAG_BYTES;
	struct virtio_net_hdr vnet;
	struct tag tag;
	size_t header;

	e->bytes += length;
	memcpy(&vnet, packet - VNET_BYTES, sizeof(vnet));
	tag = tag_of(&vnet, e->super++);
	if (vnet.gso_type == VIRTIO_NET_HDR_GSO_NONE) {
		memcpy(slot, &tag, sizeof(tag));
		add_segment(e, &(struct iovec) { slot, TAG_BYTES + length }, 1, TAG_BYTES + length);
		return;
	}
	header = vnet.csum_start + 4u * ((struct tcphdr *)(packet + vnet.csum_start))->doff;
	if (gapped && (header != e->header || vnet.gso_size != e->mss)) {
		close_gaps(e, packet, length);
		gapped = false;
	}
	e->header = header;
	e->mss = vnet.gso_size;
	segment(e, &tag, packet, header, length - header, gapped);
}

/**
 * read_packets() - Add packets to the messages of this turn, until none is left or it is full
 * @e:		encapsulation
 * @slots:	where to; they stay as they are until the messages are sent
 * @stride:	bytes from one slot to the next
 * @count:	slots
 */
void read_packets(struct encap *e, uint8_t *slots, size_t stride, size_t count)
{
	for (size_t i = 0; i < count && !is_full(e); i++) {
		uint8_t *slot = slots + i * stride;
		bool gapped;
		ssize_t got = read_packet(e, slot, &gapped);

		if (got < 1)
			break;
		take_packet(e, slot, (size_t)got, gapped);
	}
}

/**
 * gather_messages() - Copy each message into one piece
 * @e:		encapsulation
 * @to:		room for 2 * READ_BYTES
 */
void gather_messages(struct encap *e, uint8_t *to)
{
	for (size_t i = 0; i < e->message_count; i++) {
		struct message *message = &e->messages[i];
		uint8_t *start = to;

		for (size_t j = 0; j < message->vector_count; j++) {
			struct iovec *part = &message->vectors[j];

			memcpy(to, part->iov_base, part->iov_len);
			to += part->iov_len;
		}
		message->vectors->iov_base = start;
		message->vectors->iov_len = message->bytes;
		message->vector_count = 1;
	}
}

/**
 * start_turn() - Forget the messages of the last turn
 * @e:		encapsulation
 */
void start_turn(struct encap *e)
{
	e->message_count = e->vector_count = e->header_count = e->flat_used = e->bytes = 0;
}

/**
 * encap_init() - Make an empty encapsulation ready
 * @e:		encapsulation, zeroed
 * @options:	whose design and TUN it takes
 */
void encap_init(struct encap *e, const struct options *options)
{
	e->tun = options->tun;
	e->design = options->design;
	e->max_message = MAX_DATAGRAM;
	e->room = SLOT;
	e->flat = malloc(2 * READ_BYTES);
	if (!e->flat)
		fail("memory");
}
