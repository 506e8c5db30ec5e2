// Frames of the underlay for designs that pass the kernel's UDP by.
//
// They know neither routes nor neighbours: both ends are on one link, and the kernel is asked once
// for the peer's MAC address.

#define _GNU_SOURCE
#include <ifaddrs.h>
#include <linux/if_arp.h>

#include "outer.h"

static uint32_t add_words(uint32_t sum, const void *start, size_t bytes)
{
	uint16_t word;

	for (size_t i = 0; i < bytes; i += sizeof(word)) {
		memcpy(&word, (const uint8_t *)start + i, sizeof(word));
		sum += word;
	}
	return sum;
}

static uint16_t fold(uint32_t sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)(sum + (sum >> 16));
}

/**
 * set_lengths() - Write the lengths of a frame, and the checksum of its IP header
 * @outer:	its headers, complete but for these; the UDP checksum becomes 0, "none"
 * @payload:	bytes behind them; a frame of more than 65535 is cut before anyone reads its lengths
 */
void set_lengths(struct outer *outer, size_t payload)
{
	outer->udp.len = htons((uint16_t)(sizeof(outer->udp) + payload));
	outer->udp.check = 0;
	outer->ip.tot_len = htons((uint16_t)(sizeof(outer->ip) + sizeof(outer->udp) + payload));
	outer->ip.check = 0;
	outer->ip.check = (uint16_t)~fold(add_words(0, &outer->ip, sizeof(outer->ip)));
}

/**
 * pseudo_sum() - Compute what a UDP checksum field holds before the kernel completes it
 * @outer:	headers with lengths
 *
 * Return: the sum of the pseudo-header, in network order
 */
uint16_t pseudo_sum(const struct outer *outer)
{
	return fold(add_words(htons(IPPROTO_UDP) + outer->udp.len, &outer->ip.saddr, 8));
}

/**
 * find_link() - Find the device of an address
 * @options:	the addresses
 * @request:	gets its name
 */
static void find_link(const struct options *options, struct ifreq *request)
{
	struct sockaddr_in local = parse_address(options->local, 0);
	struct ifaddrs *all;

	if (getifaddrs(&all))
		fail("getifaddrs");
	for (struct ifaddrs *at = all; at; at = at->ifa_next) {
		struct sockaddr_in *address = (struct sockaddr_in *)at->ifa_addr;

		if (address && address->sin_family == AF_INET &&
		    address->sin_addr.s_addr == local.sin_addr.s_addr)
			snprintf(request->ifr_name, sizeof(request->ifr_name), "%s", at->ifa_name);
	}
	freeifaddrs(all);
}

/**
 * open_outer() - Make the headers that all frames begin with
 * @outer:	where
 * @options:	the addresses
 * @udp:	a socket that is connected to the peer
 *
 * Waits until the kernel knows the peer's MAC address.
 *
 * Return: index of the underlay's device
 */
int open_outer(struct outer *outer, const struct options *options, int udp)
{
	struct sockaddr_in local = parse_address(options->local, WIRE_PORT);
	struct sockaddr_in peer = parse_address(options->peer, WIRE_PORT);
	struct arpreq arp = { 0 };
	struct ifreq link = { 0 };

	find_link(options, &link);
	if (ioctl(udp, SIOCGIFHWADDR, &link))
		fail("SIOCGIFHWADDR");
	memcpy(outer->ethernet.h_source, link.ifr_hwaddr.sa_data, ETH_ALEN);
	memcpy(&arp.arp_pa, &peer, sizeof(peer));
	memcpy(arp.arp_dev, link.ifr_name, sizeof(arp.arp_dev) - 1);
	do {
		send(udp, "", 0, 0);
		usleep(10000);
	} while (ioctl(udp, SIOCGARP, &arp) || !(arp.arp_flags & ATF_COM));
	memcpy(outer->ethernet.h_dest, arp.arp_ha.sa_data, ETH_ALEN);
	outer->ethernet.h_proto = htons(ETH_P_IP);
	outer->ip = (struct iphdr) { .version = 4,
				     .ihl = 5,
				     .ttl = 64,
				     .protocol = IPPROTO_UDP,
				     .saddr = local.sin_addr.s_addr,
				     .daddr = peer.sin_addr.s_addr };
	outer->udp.source = outer->udp.dest = htons(WIRE_PORT);
	if (ioctl(udp, SIOCGIFINDEX, &link))
		fail("SIOCGIFINDEX");
	return link.ifr_ifindex;
}
