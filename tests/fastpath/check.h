/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The parts of the check program (check.c), and the inputs that they make: repeatable, from a seed.
 */
#ifndef PYFLANNEL_TESTS_CHECK_H
#define PYFLANNEL_TESTS_CHECK_H

#include "_fastpath.h"
#include "inet.h"
#include "invariants.h"

/* A packet to be built; zeroes stand for a plain IPv4 TCP segment without payload. */
struct spec {
	bool ipv6, udp;
	uint8_t source_node, destination_node;
	uint16_t source_port;
	uint8_t tos, flags;
	uint16_t id, fragment, window, urgent;
	uint32_t sequence;
	unsigned int ip_options, tcp_options; /* words */
	size_t payload;
	uint8_t fill; /* of the payload */
	bool partial;
};

struct input {
	size_t size;
	uint8_t bytes[65536];
};

uint32_t random_below(uint32_t limit);
void random_seed(uint64_t seed);

struct fp_config config_of(uint8_t node, int anti_spoofing);
struct fp_route route_of(uint8_t node, uint16_t port);
uint16_t naive_sum(const uint8_t *bytes, size_t length, uint32_t sum);
size_t build(const struct spec *spec, uint8_t *packet);
size_t headers_of(const struct spec *spec);

void make_segment_input(struct input *input);
void make_coalesce_input(struct input *input);
void make_decap_input(struct input *input);

void check_backlog(void);
void check_checksum(void);
void check_fib(void);
void check_handover(void);
void check_room(void);
void check_suspects(void);
void check_wire(void);
void check_worker(void);

#endif
