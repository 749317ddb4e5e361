// SPDX-License-Identifier: GPL-2.0
/*
 * /dev/lab-pages: memory as some drivers hand it out, and ways to break the rules for it.
 *
 * mmap() maps one allocation of a higher order that is not compound: the first page's reference
 * count is 1, that of the others 0, as with TTM's pages. The mapping is VM_PFNMAP. The pages
 * are kept for ever unless "free" is written.
 *
 * Read from the file descriptor: the first page's pfn. Written to it:
 *   free         give the pages back to the kernel, whoever maps them (CVE-2021-22543's shape)
 *   hold ADDR N  take one more reference of each of the N pages at ADDR of the writer
 *   drop         give those references back; closing the file does it too
 */
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#define HELD_MAX 4096

struct lab_file {
	struct mutex lock;
	struct page *block;
	unsigned int order;
	struct page **held;
	int held_count;
};

static int lab_open(struct inode *inode, struct file *file)
{
	struct lab_file *lab = kzalloc(sizeof(*lab), GFP_KERNEL);

	if (!lab)
		return -ENOMEM;
	mutex_init(&lab->lock);
	file->private_data = lab;
	return 0;
}

static int lab_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct lab_file *lab = file->private_data;
	unsigned long size = vma->vm_end - vma->vm_start;
	int error = -EBUSY;

	mutex_lock(&lab->lock);
	if (lab->block)
		goto out;
	error = -ENOMEM;
	lab->order = get_order(size);
	lab->block = alloc_pages(GFP_KERNEL | __GFP_ZERO, lab->order);
	if (!lab->block)
		goto out;
	error = remap_pfn_range(vma, vma->vm_start, page_to_pfn(lab->block), size,
				vma->vm_page_prot);
out:
	mutex_unlock(&lab->lock);
	return error;
}

static void lab_drop(struct lab_file *lab)
{
	while (lab->held_count)
		put_page(lab->held[--lab->held_count]);
	kvfree(lab->held);
	lab->held = NULL;
}

static int lab_hold(struct lab_file *lab, unsigned long address, unsigned int count)
{
	if (lab->held || !count || count > HELD_MAX)
		return -EINVAL;
	lab->held = kvcalloc(count, sizeof(*lab->held), GFP_KERNEL);
	if (!lab->held)
		return -ENOMEM;
	lab->held_count = get_user_pages_fast(address, count, 0, lab->held);
	if (lab->held_count == count)
		return 0;
	lab->held_count = max(lab->held_count, 0);
	lab_drop(lab);
	return -EFAULT;
}

static int lab_command(struct lab_file *lab, const char *words)
{
	unsigned long address;
	unsigned int count;

	if (sysfs_streq(words, "free")) {
		if (!lab->block)
			return -EINVAL;
		__free_pages(lab->block, lab->order);
		lab->block = NULL;
		return 0;
	}
	if (sysfs_streq(words, "drop")) {
		lab_drop(lab);
		return 0;
	}
	if (sscanf(words, "hold %li %u", &address, &count) == 2)
		return lab_hold(lab, address, count);
	return -EINVAL;
}

static ssize_t lab_write(struct file *file, const char __user *user, size_t size, loff_t *pos)
{
	struct lab_file *lab = file->private_data;
	char words[64] = "";
	int error;

	if (size >= sizeof(words))
		return -EINVAL;
	if (copy_from_user(words, user, size))
		return -EFAULT;
	mutex_lock(&lab->lock);
	error = lab_command(lab, words);
	mutex_unlock(&lab->lock);
	return error ?: size;
}

/* The block's first pfn: no other file tells it of a VM_PFNMAP mapping. */
static ssize_t lab_read(struct file *file, char __user *user, size_t size, loff_t *pos)
{
	struct lab_file *lab = file->private_data;
	char words[32];
	int length;

	mutex_lock(&lab->lock);
	length = scnprintf(words, sizeof(words), "%lu\n", lab->block ? page_to_pfn(lab->block) : 0);
	mutex_unlock(&lab->lock);
	return simple_read_from_buffer(user, size, pos, words, length);
}

static int lab_release(struct inode *inode, struct file *file)
{
	struct lab_file *lab = file->private_data;

	lab_drop(lab);
	kfree(lab);
	return 0;
}

static const struct file_operations lab_operations = {
	.owner = THIS_MODULE,
	.open = lab_open,
	.mmap = lab_mmap,
	.read = lab_read,
	.write = lab_write,
	.release = lab_release,
};

static struct miscdevice lab_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "lab-pages",
	.fops = &lab_operations,
	.mode = 0600,
};

module_misc_device(lab_device);
MODULE_DESCRIPTION("Pages that break rules, for pfntrace's lab");
MODULE_LICENSE("GPL");
