// SPDX-License-Identifier: GPL-2.0
/* kvm_vcpu_unmap() for the series' kvm_host_map, included by kvm_main.c in its place. */
void kvm_vcpu_unmap(struct kvm_vcpu *vcpu, struct kvm_host_map *map, bool dirty)
{
	if (!map || !map->hva)
		return;
	if (map->page != KVM_UNMAPPED_PAGE)
		kunmap(map->page);
	else
		memunmap(map->hva);
	if (dirty)
		kvm_vcpu_mark_page_dirty(vcpu, map->gfn);
	if (map->is_refcounted_page && dirty)
		kvm_release_page_dirty(map->page);
	else if (map->is_refcounted_page)
		kvm_release_page_clean(map->page);
	map->hva = NULL;
	map->page = NULL;
}
