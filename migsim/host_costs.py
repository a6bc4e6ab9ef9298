"""A scenario's host profile, applied: the price of KVM's ioctls, and the closed loop of a run (`migsim.meters`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from migsim.guest.memory import layout
from migsim.guest.workload import SEQUENTIAL, Workload
from migsim.meters import Meters, RamCounters, Switched
from migsim.migration.postcopy import QUEUED_BYTES, FaultCosts, fault_latency_ns
from migsim.perf.memstress import Memstress
from migsim.perf.migration_thread import clear_cost, enable_ns
from migsim.perf.pools import Pools
from migsim.perf.postcopy_faults import PostcopyFaults
from migsim.perf.profile import HostProfile, ProfileError, load_profile
from migsim.perf.rules import default_kernel, rules_for
from migsim.perf.slowdown import ClosedLoop
from migsim.qemu_costs import ASSUMED_NS
from migsim.scenario import Scenario, ScenarioError
from migsim.units import NS_PER_S, PAGE_SIZE

__all__ = ["HostCosts"]

BACKING_PAGES: Final[Mapping[str, int]] = {"4K": 1, "2M": 512, "1G": 262144}
_BACKING_SOURCE: Final = {"4K": "anonymous", "2M": "anonymous_hugetlb_2mb", "1G": "anonymous_hugetlb_1gb"}
_MANUAL: Final = {"off": 0, "enable": 1, "initially-set": 3}


class HostCosts:
    """The host profile of a scenario. Raises ScenarioError (field host.profile) when there is no such profile."""

    def __init__(self, scenario: Scenario) -> None:
        try:
            self.profile: HostProfile = load_profile(scenario.host.profile)
        except ProfileError as error:
            raise ScenarioError("host.profile", str(error), value=scenario.host.profile) from None
        guest, kvm = scenario.guest, scenario.kvm
        self.scenario = scenario
        self.kvm = kvm.accel == "kvm"
        self.rules = rules_for(kvm.mmu, default_kernel(kvm.mmu))
        self.pml = kvm.pml and kvm.vendor == "intel"  # AMD has none in the kernels read
        self.clear = clear_cost(self.rules, self.profile, guest.vcpus, pml=self.pml)

    @property
    def _manual(self) -> int:
        """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 as QEMU sets it: never beside dirty rings (accel/kvm/kvm-all.c)."""
        kvm = self.scenario.kvm
        return 0 if kvm.dirty_ring_size else _MANUAL[kvm.manual_dirty_log_protect]

    @property
    def _armed_at_enable(self) -> bool:
        """Does enabling the log arm every page: without INITIALLY_SET, and until 5.10 under huge leaves with it."""
        huge = self.rules.protects_huge_at_enable and self.scenario.guest.backing != "4K"
        return self._manual != _MANUAL["initially-set"] or huge

    def priced(self) -> dict[str, float]:
        """ns of the operations qemu_costs knows, where this host's profile says something about them."""
        own = {
            op.replace("-", "_"): self.profile.ns(op)
            for op in self.profile.costs
            if op.startswith(("qemu-", "multifd-"))
        }
        if not self.kvm:
            return own
        setup = {"qemu_setup": own.get("qemu_setup", ASSUMED_NS["qemu_setup"]) + self.enable_ns()}
        return {**own, **setup, **self._ioctl_ns()}

    def _ioctl_ns(self) -> dict[str, float]:
        """CLEAR, and a GET that re-arms as it takes: the same work for a page, the same flush after it."""
        clear = self.clear
        out = {
            "kvm_clear": clear.call_ns, "kvm_clear_stopped": clear.stopped_call_ns, "kvm_clear_page": clear.page_ns,
            "kvm_clear_leaf": clear.leaf_ns, "kvm_clear_table": clear.table_ns,
        }  # fmt: skip
        if not self.scenario.kvm.lazy_clear:
            out |= {"kvm_get": clear.call_ns, "kvm_get_page": clear.written_page_ns}
        return out

    def enable_ns(self) -> int:
        """KVM_MEM_LOG_DIRTY_PAGES on every slot: what it does to the populated part, and the bitmaps of all of it."""
        guest, kvm = self.scenario.guest, self.scenario.kvm
        slots = sum(len(found) for _, _, found in layout(guest.memory, guest.numa_nodes, guest.machine))
        per_vcpu = -(-guest.populated_pages // guest.vcpus) * PAGE_SIZE
        counts, _ = Memstress(
            vcpus=guest.vcpus, memory_per_vcpu=max(per_vcpu, PAGE_SIZE), mmu=kvm.mmu, slots=slots, pml=self.pml,
            backing=_BACKING_SOURCE[guest.backing], manual=self._manual,
            eager_page_split=kvm.eager_page_split,
        ).enable()  # fmt: skip
        return enable_ns(counts, self.profile)

    def meters(self, workload: Workload, ram: RamCounters, operations: Mapping[str, int]) -> Meters:
        """The closed loop of a run. `operations`: the meter's totals, from which `ram` learns what its CLEARs split."""
        guest, kvm = self.scenario.guest, self.scenario.kvm
        if self.kvm and self.rules.eager_split and kvm.eager_page_split:  # else CLEAR splits none, and faults do
            ram.split_tables = lambda: operations.get("huge_page_split", 0)
        pools = Pools(
            workload.first.astype(np.float64), workload.end.astype(np.float64), workload.law == SEQUENTIAL,
            float(guest.pages), BACKING_PAGES[guest.backing], self.rules, pml=self.pml, eager=kvm.eager_page_split,
            protected=self.kvm and self._armed_at_enable,
        )  # fmt: skip
        loop = ClosedLoop(self.profile, guest.vcpus, self.rules, pools, self.clear, kvm.dirty_ring_size)
        return Meters(loop, workload, ram, self.kvm, self._switched(workload, ram))

    def _switched(self, workload: Workload, ram: RamCounters) -> Switched:
        """How post-copy's faults begin: called at the switch, when what is missing is known."""

        def start() -> PostcopyFaults:
            ends = zip(workload.first.tolist(), workload.end.tolist(), strict=True)
            missing = np.array([ram.dirty_between(first, end) for first, end in ends], dtype=np.float64)
            latency_ns, answer_ns = self._fault_ns()
            # a huge page comes whole: random writes meet so many fewer pages, a sweep pays once in so many writes
            unit, sweeps = BACKING_PAGES[self.scenario.guest.backing], workload.law == SEQUENTIAL
            pages = (workload.end - workload.first).astype(np.float64)
            return PostcopyFaults(
                self.scenario.guest.vcpus, np.where(sweeps, pages, pages / unit), missing / unit, sweeps, latency_ns,
                answer_ns,
            )  # fmt: skip

        return start

    def _fault_ns(self) -> tuple[float, float]:
        """ns of one missing page with nobody else asking, and of these the source's answer.

        A channel of its own (postcopy-preempt), or a limit the link is faster than, leaves nothing queued before it.
        """
        scenario, own = self.scenario, self.priced()
        m, link = scenario.migration, scenario.link
        wire_ns = PAGE_SIZE * NS_PER_S / link.bandwidth
        page_ns = max(own.get("qemu_postcopy_page", ASSUMED_NS["qemu_postcopy_page"]), wire_ns)
        request_ns = own.get("qemu_postcopy_request", ASSUMED_NS["qemu_postcopy_request"])
        free = "postcopy-preempt" in m.capabilities or 0 < m.max_postcopy_bandwidth < link.bandwidth
        queued = 0.0 if free else QUEUED_BYTES / PAGE_SIZE * wire_ns / page_ns
        latency_ns = fault_latency_ns(FaultCosts(request_ns, page_ns, queued), link.latency) - page_ns
        return latency_ns, page_ns * BACKING_PAGES[scenario.guest.backing]
