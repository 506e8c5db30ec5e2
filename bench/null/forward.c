// Who waits for what, in designs whose calls do not wait themselves.

#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>

#include "null.h"

struct waiting {
	int tun;
	const struct sides *sides;
};

static void *encapsulate_forever(void *waiting)
{
	struct waiting *w = waiting;

	for (;;) {
		poll(&(struct pollfd) { w->tun, POLLIN, 0 }, 1, -1);
		w->sides->encapsulate(w->sides->sender);
	}
	return NULL;
}

/**
 * forward() - Forward in both directions for ever
 * @options:	the TUN and how many threads
 * @sides:	the two directions
 */
void forward(const struct options *options, const struct sides *sides)
{
	struct waiting w = { options->tun, sides };
	pthread_t thread;

	if (options->threads == 2) {
		if (pthread_create(&thread, NULL, encapsulate_forever, &w))
			fail("pthread_create");
		for (;;)
			sides->decapsulate(sides->receiver, true);
	}
	for (;;) {
		struct pollfd ready[2] = { { w.tun, POLLIN, 0 }, { sides->wire, POLLIN, 0 } };

		poll(ready, 2, -1);
		if (ready[0].revents)
			sides->encapsulate(sides->sender);
		if (ready[1].revents)
			sides->decapsulate(sides->receiver, false);
	}
}
