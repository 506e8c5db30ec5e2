/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "node.h"

#include <arpa/inet.h>
#include <netinet/udp.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

const struct vnet_header udp_super_packet = { .flags = VNET_NEEDS_CHECKSUM,
					      .gso_type = VNET_GSO_UDP,
					      .gso_size = UDP_SEGMENT_BYTES,
					      .header_length = 28,
					      .checksum_start = 20,
					      .checksum_offset = 6 };

int udp_socket(struct sockaddr_in *address, uint32_t host)
{
	socklen_t length = sizeof(*address);
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
	int bytes = 4 << 20;

	*address = (struct sockaddr_in) { .sin_family = AF_INET };
	address->sin_addr.s_addr = htonl(INADDR_LOOPBACK + host);
	setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof(bytes));
	HOLDS(fd >= 0 && bind(fd, (struct sockaddr *)address, sizeof(*address)) == 0);
	HOLDS(getsockname(fd, (struct sockaddr *)address, &length) == 0);
	return fd;
}

void open_node(struct node *node, uint8_t number, int offload)
{
	struct sockaddr_in unused;
	int one = 1, bytes = 4 << 20;
	struct fp_config config = config_of(number, FP_SPOOF_ENFORCE);
	struct fp_io io = {
		.tun_count = 1,
		.receive_count = 1,
		.send_count = 1,
		.segment = offload & GSO,
		.coalesce_tcp = offload & TSO,
		.coalesce_udp = offload & USO,
	};

	HOLDS(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, node->tun) == 0);
	for (int i = 0; i < 2; i++)
		setsockopt(node->tun[i], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
	node->receive = udp_socket(&node->address, 0);
	node->send = udp_socket(&unused, 0);
	if (offload & GRO)
		HOLDS(setsockopt(node->receive, IPPROTO_UDP, UDP_GRO, &one, sizeof(one)) == 0);
	node->ctx = fp_ctx_new(&config);
	HOLDS(node->ctx);
	io.tun = &node->tun[1];
	io.tun_write = node->tun[1];
	io.receive = &node->receive;
	io.send = &node->send;
	node->worker = fp_worker_new(node->ctx, &io);
	HOLDS(node->worker);
}

void route_to(struct node *node, uint8_t number, const struct node *peer)
{
	struct fp_route route = route_of(number, ntohs(peer->address.sin_port));

	HOLDS(fp_route_replace(node->ctx, &route) == 0);
}

void close_node(struct node *node)
{
	fp_worker_free(node->worker);
	fp_ctx_free(node->ctx);
	close(node->tun[0]);
	close(node->tun[1]);
	close(node->receive);
	close(node->send);
}

void put(const struct node *node, const struct vnet_header *vnet, uint8_t *packet, size_t length)
{
	struct iovec iov[] = { { (void *)vnet, sizeof(*vnet) }, { packet, length } };

	HOLDS(writev(node->tun[0], iov, 2) == (ssize_t)(sizeof(*vnet) + length));
}
