/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What Python sees of the fast path. Free of directives: cffi's cdef() and the C compiler read the
 * same text. Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d; prefix lengths count
 * from bit 0 of these 16 bytes (an IPv4 /24 is 120). Ports and VNIs are in host order.
 */

/* Why a packet was not passed on. The first group is in the order of the checks on receive. */
enum fp_drop {
	FP_DROP_SHORT,
	FP_DROP_NO_VNI_FLAG,
	FP_DROP_RESERVED_BITS,
	FP_DROP_WRONG_VNI,
	FP_DROP_UNKNOWN_VTEP,
	FP_DROP_VTEP_MAC,
	FP_DROP_LOOP,
	FP_DROP_NOT_OUR_MAC,
	FP_DROP_ETHERTYPE,
	FP_DROP_INNER_MALFORMED,
	FP_DROP_INNER_SOURCE,
	FP_DROP_ECN,
	FP_DROP_TUN_DOWN,
	FP_DROP_TUN_WRITE,
	FP_DROP_ENCAP_MALFORMED,
	FP_DROP_ENCAP_FAMILY,
	FP_DROP_ENCAP_MULTICAST,
	FP_DROP_NO_ROUTE,
	FP_DROP_SEND_UNREACHABLE,
	FP_DROP_SEND_DENIED,
	FP_DROP_SEND_SIZE,
	FP_DROP_SEND_BUFFER,
	FP_DROP_SEND_ERROR,
	FP_DROP_REASONS
};

enum fp_anti_spoofing { FP_SPOOF_OFF, FP_SPOOF_LOG, FP_SPOOF_ENFORCE };

/* Peers that send from another address than they advertise: sources in `source` own `subnet`. */
struct fp_peer_source {
	uint8_t source[16];
	uint8_t source_len;
	uint8_t subnet[16];
	uint8_t subnet_len;
};

struct fp_config {
	uint32_t vni;
	uint8_t mac[6];
	uint8_t network[16];
	uint8_t network_len;
	int anti_spoofing;
	int ignore_reserved_bits;
	int inner_ipv4;
	int inner_ipv6;
	size_t peer_sources;
	const struct fp_peer_source *peer_source;
};

struct fp_route {
	uint8_t subnet[16];
	uint8_t subnet_len;
	uint8_t mac[6];
	int has_previous_mac;
	uint8_t previous_mac[6];
	uint8_t underlay[16];
	uint16_t port;
};

struct fp_traffic {
	uint64_t encap_packets;
	uint64_t encap_bytes;
	uint64_t decap_packets;
	uint64_t decap_bytes;
};

struct fp_peer_traffic {
	uint8_t subnet[16];
	uint8_t subnet_len;
	struct fp_traffic traffic;
	uint64_t drops;
	uint64_t heard_ms; /* when a packet came last, of CLOCK_MONOTONIC; 0: never */
};

/*
 * `spoofed` counts by fp_drop what mode `log` would have dropped and passed on. A read, send, receive
 * or write is one packet or message that may hold many packets, so packets by it is the batch size.
 */
struct fp_counters {
	struct fp_traffic traffic;
	uint64_t drops[FP_DROP_REASONS];
	uint64_t spoofed[FP_DROP_REASONS];
	uint64_t congestion_marks;
	uint64_t tun_reads;
	uint64_t sends;
	uint64_t sends_unsegmented;
	uint64_t sends_blocked;
	uint64_t receives;
	uint64_t tun_writes;
};

/* One packet that failed a source check, kept for the operator's log. */
struct fp_suspect {
	int reason;
	uint8_t outer_source[16];
	uint8_t mac[6];
	uint8_t inner_source[16];
};

/*
 * How threads are scheduled: as any other; some nice steps above the daemon; or before all others,
 * which leaves them what the kernel reserves.
 */
enum fp_schedule { FP_SCHEDULE_NORMAL, FP_SCHEDULE_RAISED, FP_SCHEDULE_REALTIME };

/*
 * The descriptors of a worker and which offloads they have. All are non-blocking and stay the
 * caller's. `tun` are queues to read from; `tun_write` is written to and may be one of them.
 */
struct fp_io {
	size_t tun_count;
	const int *tun;
	int tun_write;
	size_t receive_count;
	const int *receive;
	size_t send_count;
	const int *send;
	int segment; /* sockets in `send` take UDP_SEGMENT */
	int coalesce_tcp; /* the TUN takes TCP super-packets */
	int coalesce_udp; /* the TUN takes UDP super-packets */
	unsigned int poll_us; /* threads: how long to poll after the last packet */
	int schedule; /* threads: enum fp_schedule */
};

struct fp_ctx;
struct fp_worker;

const char *fp_drop_name(int reason);

struct fp_ctx *fp_ctx_new(const struct fp_config *config);
void fp_ctx_free(struct fp_ctx *ctx);

int fp_route_replace(struct fp_ctx *ctx, const struct fp_route *route);
int fp_route_delete(struct fp_ctx *ctx, const uint8_t *subnet, uint8_t subnet_len);
int fp_route_lookup(struct fp_ctx *ctx, const uint8_t *address, struct fp_route *found);
size_t fp_route_count(struct fp_ctx *ctx);
size_t fp_peers_traffic(struct fp_ctx *ctx, struct fp_peer_traffic *into, size_t capacity);
void fp_counters_read(struct fp_ctx *ctx, struct fp_counters *into);
size_t fp_suspects_take(struct fp_ctx *ctx, struct fp_suspect *into, size_t capacity);

struct fp_worker *fp_worker_new(struct fp_ctx *ctx, const struct fp_io *io);
void fp_worker_free(struct fp_worker *worker);
int fp_worker_fd(const struct fp_worker *worker);
int fp_worker_turn(struct fp_worker *worker);
int fp_worker_start(struct fp_worker *worker, int threads);
int fp_worker_error(const struct fp_worker *worker);
int fp_worker_schedule_error(const struct fp_worker *worker);
int fp_worker_threads(const struct fp_worker *worker);
uint64_t fp_worker_silence_ms(const struct fp_worker *worker);

int fp_decap_check(struct fp_ctx *ctx, uint8_t *datagram, size_t length, const uint8_t *outer_source,
		   uint8_t outer_tos, size_t *inner_offset, size_t *inner_length);
int fp_encap_check(struct fp_ctx *ctx, const uint8_t *packet, size_t length, uint8_t *header,
		   uint8_t *outer_tos, uint32_t *flow, struct fp_route *found);

int fp_segment_check(const uint8_t *vnet, uint8_t *packet, size_t length, size_t gap,
		     size_t capacity, size_t *stride, size_t *total);
int fp_coalesce_check(int tcp, int udp, uint8_t *packets, const size_t *length, size_t count,
		      size_t hint, uint8_t *into, size_t capacity, size_t *into_length);
