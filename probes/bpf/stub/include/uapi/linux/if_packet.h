/* SPDX-License-Identifier: GPL-2.0 */
/* Empty on purpose: bcc includes this name, its own copies hold what is needed. */
