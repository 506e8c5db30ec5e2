/* SPDX-License-Identifier: Apache-2.0 */
#ifndef PYFLANNEL_CHECKSUM_H
#define PYFLANNEL_CHECKSUM_H

#include "inet.h"

uint16_t checksum(const void *bytes, size_t length);
be16 checksum_replace(be16 sum, uint16_t before, uint16_t after);

#endif
