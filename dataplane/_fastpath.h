/* SPDX-License-Identifier: Apache-2.0 */
#ifndef PYFLANNEL_FASTPATH_H
#define PYFLANNEL_FASTPATH_H

#include <stddef.h>
#include <stdint.h>

#include "_fastpath_abi.h"

#endif
