// Reads the options, opens the TUN and runs a design; null.h says what for.

#define _GNU_SOURCE
#include <getopt.h>

#include "null.h"

static const struct {
	const char *name;
	void (*run)(const struct options *options);
} designs_of_io[] = {
	{ "calls", run_calls },
	{ "unconnected", run_unconnected },
	{ "zerocopy", run_zerocopy },
	{ "uring", run_uring },
	{ "uring-sqpoll", run_uring_sqpoll },
	{ "packet", run_packet },
	{ "packet-ring", run_packet_ring },
	{ "tunnel", run_tunnel },
	{ "xdp", run_xdp },
};

static int usage(void)
{
	fputs("null_forwarder: --local=ADDRESS --peer=ADDRESS --design=gather|flat|gaps "
	      "--io=calls|unconnected|zerocopy|uring|uring-sqpoll|packet|packet-ring|tunnel|xdp "
	      "--threads=1|2 "
	      "--queue=PACKETS\n",
	      stderr);
	return 2;
}

int main(int argc, char **argv)
{
	static const struct option names[] = {
		{ "local", 1, 0, 'l' },	  { "peer", 1, 0, 'p' },	 { "design", 1, 0, 'd' },
		{ "io", 1, 0, 'i' },	  { "threads", 1, 0, 'j' },	 { "queue", 1, 0, 'q' },
		{ "address", 1, 0, 'x' }, { "peer-address", 1, 0, 'x' }, { 0 },
	};
	static const char *const designs[] = { "gather", "flat", "gaps" };
	struct options options = { .local = "", .peer = "", .threads = 2 };
	const char *design = "gather", *io = "calls";
	int name, queue = 5000;

	while ((name = getopt_long(argc, argv, "", names, NULL)) != -1) {
		switch (name) {
		case 'l':
			options.local = optarg;
			break;
		case 'p':
			options.peer = optarg;
			break;
		case 'd':
			design = optarg;
			break;
		case 'i':
			io = optarg;
			break;
		case 'j':
			options.threads = atoi(optarg);
			break;
		case 'q':
			queue = atoi(optarg);
			break;
		case 'x': // given to every yardstick; this one does not look at addresses
			break;
		default:
			return usage();
		}
	}
	while (options.design <= GAPS && strcmp(design, designs[options.design]))
		options.design++;
	if (options.design > GAPS || options.threads < 1 || options.threads > 2)
		return usage();
	options.tun =
		open_tun("bench0", IFF_TUN | IFF_VNET_HDR, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO_ECN);
	set_queue("bench0", queue);
	for (size_t i = 0; i < sizeof(designs_of_io) / sizeof(designs_of_io[0]); i++)
		if (!strcmp(io, designs_of_io[i].name))
			designs_of_io[i].run(&options);
	return usage();
}
