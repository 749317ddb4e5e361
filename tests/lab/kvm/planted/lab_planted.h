/* SPDX-License-Identifier: GPL-2.0 */
#ifndef LAB_PLANTED_H
#define LAB_PLANTED_H
#include <linux/types.h>

/*
 * Is it this time that the planted bug happens? Every lab_every-th time, none while that is 0. A
 * yes is counted and logged with gfn and pfn: the truth that a trace is held against.
 */
bool lab_planted(u64 gfn, u64 pfn);
/* The same in two steps, for a bug that needs more than its turn to happen. */
bool lab_turn(void);
void lab_happened(u64 gfn, u64 pfn);
/* Sleep lab_sleep_ms: the window of a race, wide open. */
void lab_sleep(void);
#endif
