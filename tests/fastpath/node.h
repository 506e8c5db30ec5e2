/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A node with one worker over sockets of an ordinary user: a TUN queue hands over and takes one
 * packet at a time, and so does a pair of SOCK_SEQPACKET sockets.
 */
#ifndef PYFLANNEL_TESTS_NODE_H
#define PYFLANNEL_TESTS_NODE_H

#include <netinet/in.h>

#include "check.h"
#include "vnet.h"

/* Offloads of a node. */
enum { TSO = 1, USO = 2, GSO = 4, GRO = 8, EVERY = 15 };

struct node {
	struct fp_ctx *ctx;
	struct fp_worker *worker;
	int tun[2]; /* the test's end, the worker's end */
	int receive, send;
	struct sockaddr_in address;
};

#define UDP_SEGMENT_BYTES 20
/* What stands before an IPv4 packet of UDP that is to be cut into such segments. */
extern const struct vnet_header udp_super_packet;

/* Open a socket of the @host-th address behind that of loopback, and tell its own. */
int udp_socket(struct sockaddr_in *address, uint32_t host);

void open_node(struct node *node, uint8_t number, int offload);
void close_node(struct node *node);
void route_to(struct node *node, uint8_t number, const struct node *peer);
void put(const struct node *node, const struct vnet_header *vnet, uint8_t *packet, size_t length);

#endif
