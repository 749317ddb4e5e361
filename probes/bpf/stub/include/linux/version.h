/* SPDX-License-Identifier: GPL-2.0 */
/* bcc embeds LINUX_VERSION_CODE in programs; kernels since 5.0 ignore it. */
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE KERNEL_VERSION(5, 0, 0)
