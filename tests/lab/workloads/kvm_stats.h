/* SPDX-License-Identifier: GPL-2.0 */
/*
 * KVM's own statistics of one VM or vCPU, as a JSON object: the second witness
 * of every count in the lab. Since Linux cb082bfab59a ("KVM: stats: Add fd-based
 * API to read binary stats data") (v5.14) they are readable from the fd itself.
 */
#ifndef LAB_KVM_STATS_H
#define LAB_KVM_STATS_H

#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* Write the scalar statistics behind the VM or vCPU fd, or null without them. */
static inline void kvm_stats_json(FILE *out, int fd)
{
	struct kvm_stats_header header;
	int stats_fd = ioctl(fd, KVM_GET_STATS_FD, NULL);
	const char *comma = "";

	if (stats_fd < 0 || pread(stats_fd, &header, sizeof(header), 0) != sizeof(header)) {
		fputs("null", out);
		return;
	}
	size_t desc_size = sizeof(struct kvm_stats_desc) + header.name_size;
	struct kvm_stats_desc *desc = calloc(1, desc_size + 1);

	fputc('{', out);
	for (uint32_t i = 0; desc && i < header.num_desc; i++) {
		uint64_t value;

		if (pread(stats_fd, desc, desc_size, header.desc_offset + i * desc_size) !=
		    (ssize_t)desc_size)
			break;
		if (desc->size != 1)	/* a histogram */
			continue;
		if (pread(stats_fd, &value, sizeof(value), header.data_offset + desc->offset) !=
		    sizeof(value))
			break;
		fprintf(out, "%s\"%s\":%llu", comma, desc->name, (unsigned long long)value);
		comma = ",";
	}
	fputc('}', out);
	free(desc);
	syscall(3 /* close, whatever the linker made of it */, stats_fd);
}

#endif
