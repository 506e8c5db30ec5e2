// flannel's `udp` backend as a yardstick: our own re-implementation of its shape, not its source.
//
// One thread; poll on the TUN and the socket; one system call for each packet; routes in a linear
// list of which the hit moves to the front; the bare inner packet is the payload; IPv4 only; the
// TTL is decremented on both ways; an unknown destination is answered with ICMP net unreachable.
// The socket has the system's default buffers, as there.

#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <netinet/ip.h>
#include <netinet/ip_icmp.h>
#include <poll.h>
#include <stdbool.h>

#include "tun.h"
#include "udp_socket.h"

enum { PORT = 8285, ROOM = 65536, MAX_ROUTES = 10001, QUOTED = 8 };

struct route {
	uint32_t network, mask; // network order
	struct sockaddr_in next;
};

struct backend {
	int tun, wire;
	uint32_t own; // TUN address, the source of ICMP errors
	struct route routes[MAX_ROUTES];
	size_t count;
	uint8_t buffer[ROOM];
};

static uint16_t checksum(const void *start, size_t bytes)
{
	const uint8_t *at = start;
	uint32_t sum = 0;

	for (; bytes > 1; at += 2, bytes -= 2)
		sum += (uint32_t)(at[0] << 8 | at[1]);
	if (bytes)
		sum += (uint32_t)(at[0] << 8);
	sum = (sum & 0xffff) + (sum >> 16);
	return htons((uint16_t) ~(sum + (sum >> 16)));
}

/**
 * find_route() - Find the route to an address and move it to the front
 * @b:		the backend
 * @address:	in network order
 *
 * Return: the route, NULL if there is none
 */
static struct route *find_route(struct backend *b, uint32_t address)
{
	for (size_t i = 0; i < b->count; i++) {
		struct route hit = b->routes[i];

		if ((address & hit.mask) != hit.network)
			continue;
		b->routes[i] = b->routes[0];
		b->routes[0] = hit;
		return b->routes;
	}
	return NULL;
}

/**
 * decrement_ttl() - Take one hop off and mend the header checksum
 * @ip:		the header
 *
 * Return: false when the packet's time is over
 */
static bool decrement_ttl(struct iphdr *ip)
{
	if (ip->ttl <= 1)
		return false;
	ip->ttl--;
	ip->check = 0;
	ip->check = checksum(ip, ip->ihl * 4u);
	return true;
}

static void send_unreachable(struct backend *b, const struct iphdr *about, size_t length)
{
	struct {
		struct iphdr ip;
		struct icmphdr icmp;
		uint8_t quote[60 + QUOTED];
	} reply = { .ip = { .version = 4, .ihl = 5, .ttl = 8, .protocol = IPPROTO_ICMP },
		    .icmp = { .type = ICMP_DEST_UNREACH, .code = ICMP_NET_UNREACH } };
	size_t quoted = about->ihl * 4u + QUOTED;

	if (quoted > length)
		quoted = length;
	memcpy(reply.quote, about, quoted);
	reply.ip.saddr = b->own;
	reply.ip.daddr = about->saddr;
	reply.ip.tot_len = htons((uint16_t)(sizeof(reply.ip) + sizeof(reply.icmp) + quoted));
	reply.ip.check = checksum(&reply.ip, sizeof(reply.ip));
	reply.icmp.checksum = checksum(&reply.icmp, sizeof(reply.icmp) + quoted);
	if (write(b->tun, &reply, ntohs(reply.ip.tot_len)) < 0 && errno != EAGAIN)
		fail("write");
}

static bool is_ipv4(const struct iphdr *ip, ssize_t length)
{
	return length >= (ssize_t)sizeof(*ip) && ip->version == 4 && ip->ihl >= 5 &&
	       ip->ihl * 4 <= length;
}

/**
 * tun_to_wire() - Move one packet
 * @b:		the backend
 *
 * Return: false when there was none
 */
static bool tun_to_wire(struct backend *b)
{
	struct iphdr *ip = (struct iphdr *)b->buffer;
	ssize_t length = read(b->tun, b->buffer, ROOM);
	struct route *route;

	if (length < 0)
		return false;
	if (!is_ipv4(ip, length))
		return true;
	route = find_route(b, ip->daddr);
	if (!route)
		send_unreachable(b, ip, (size_t)length);
	else if (decrement_ttl(ip))
		sendto(b->wire, b->buffer, (size_t)length, 0, (struct sockaddr *)&route->next,
		       sizeof(route->next));
	return true;
}

/**
 * wire_to_tun() - Move one packet
 * @b:		the backend
 *
 * Return: false when there was none
 */
static bool wire_to_tun(struct backend *b)
{
	struct iphdr *ip = (struct iphdr *)b->buffer;
	ssize_t length = recv(b->wire, b->buffer, ROOM, MSG_DONTWAIT);

	if (length < 0)
		return false;
	if (is_ipv4(ip, length) && decrement_ttl(ip) &&
	    write(b->tun, b->buffer, (size_t)length) < 0 && errno != EAGAIN)
		fail("write");
	return true;
}

static void add_route(struct backend *b, uint32_t network, uint32_t mask, const char *next)
{
	b->routes[b->count++] = (struct route) { network, mask, parse_address(next, PORT) };
}

int main(int argc, char **argv)
{
	static const struct option names[] = {
		{ "local", 1, 0, 'l' },	       { "peer", 1, 0, 'p' },  { "address", 1, 0, 'a' },
		{ "peer-address", 1, 0, 'q' }, { "peers", 1, 0, 'n' }, { 0 },
	};
	static struct backend b;
	const char *local = "", *peer = "", *own = "", *other = "";
	int name, peers = 1;

	while ((name = getopt_long(argc, argv, "", names, NULL)) != -1) {
		switch (name) {
		case 'l':
			local = optarg;
			break;
		case 'p':
			peer = optarg;
			break;
		case 'a':
			own = optarg;
			break;
		case 'q':
			other = optarg;
			break;
		case 'n':
			peers = atoi(optarg);
			break;
		default:
			return 2;
		}
	}
	for (int i = 1; i < peers && i < MAX_ROUTES - 1; i++)
		add_route(&b, htonl(0x0b000000u + ((uint32_t)i << 8)), htonl(0xffffff00u), peer);
	add_route(&b, parse_address(other, PORT).sin_addr.s_addr, htonl(0xffffffffu), peer);
	b.own = parse_address(own, PORT).sin_addr.s_addr;
	b.tun = open_tun("bench0", IFF_TUN, 0);
	b.wire = open_udp(local, PORT, false);
	for (;;) {
		struct pollfd ready[2] = { { b.tun, POLLIN, 0 }, { b.wire, POLLIN, 0 } };
		bool more = true;

		poll(ready, 2, -1);
		while (more) {
			more = ready[0].revents & POLLIN && tun_to_wire(&b);
			more |= ready[1].revents & POLLIN && wire_to_tun(&b);
		}
	}
}
