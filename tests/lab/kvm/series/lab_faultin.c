// SPDX-License-Identifier: GPL-2.0
/* x86's fault-in on the series' call, included by mmu.c in place of __kvm_faultin_pfn(). */
static kvm_pfn_t lab_follow(struct kvm_page_fault *fault, unsigned int flags)
{
	struct kvm_follow_pfn kfp = {
		.slot = fault->slot,
		.gfn = fault->gfn,
		.flags = flags | (fault->write ? FOLL_WRITE : 0),
		.try_map_writable = true,
		.guarded_by_mmu_notifier = true,
		LAB_ALLOW_NON_REFCOUNTED(lab_has_refcount_bit())
	};
	kvm_pfn_t pfn;

#if LAB_SERIES == 8
	if (!tdp_enabled)
		kfp.flags |= FOLL_GET;
#endif
	pfn = __kvm_follow_pfn(&kfp);
	fault->hva = kfp.hva;
	fault->map_writable = kfp.writable;
#if LAB_SERIES >= 10
	fault->accessed_page = kfp.refcounted_page;
#else
	fault->is_refcounted_page = kfp.is_refcounted_page;
#endif
	return pfn;
}

static int lab_faultin_private(struct kvm_vcpu *vcpu, struct kvm_page_fault *fault)
{
	int r = kvm_faultin_pfn_private(vcpu, fault);

	if (r != RET_PF_CONTINUE)
		return r;
#if LAB_SERIES >= 10
	fault->accessed_page = pfn_to_page(fault->pfn);
#else
	fault->is_refcounted_page = true;
#endif
	if (!lab_keeps_reference(0))
		put_page(pfn_to_page(fault->pfn));
	return r;
}

/* A page that is far away may be fetched by somebody else, while the guest does other things. */
static bool lab_fetched_elsewhere(struct kvm_vcpu *vcpu, struct kvm_page_fault *fault)
{
	bool asked;

	if (fault->prefetch || !kvm_can_do_async_pf(vcpu))
		return false;
	trace_kvm_try_async_get_page(fault->addr, fault->gfn);
	asked = kvm_find_async_pf_gfn(vcpu, fault->gfn);
	if (!asked)
		return kvm_arch_setup_async_pf(vcpu, fault);
	/* On its way already, and the guest cannot go on without: it halts. */
	trace_kvm_async_pf_repeated_fault(fault->addr, fault->gfn);
	kvm_make_request(KVM_REQ_APF_HALT, vcpu);
	return asked;
}

static int __kvm_faultin_pfn(struct kvm_vcpu *vcpu, struct kvm_page_fault *fault)
{
	if (fault->is_private)
		return lab_faultin_private(vcpu, fault);

	fault->pfn = lab_follow(fault, FOLL_NOWAIT);
	if (fault->pfn == KVM_PFN_ERR_NEEDS_IO) {
		if (lab_fetched_elsewhere(vcpu, fault))
			return RET_PF_RETRY;
		fault->pfn = lab_follow(fault, FOLL_INTERRUPTIBLE);
	}
	return RET_PF_CONTINUE;
}
