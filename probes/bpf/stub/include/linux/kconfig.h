/* SPDX-License-Identifier: GPL-2.0 */
/* bcc's helpers.h asks for these two; a kernel that loads BPF programs has them. */
#define CONFIG_BPF_SYSCALL 1
#define CONFIG_BPF_EVENTS 1
