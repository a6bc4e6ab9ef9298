"""Cases of one's own, with the fixture ``migsim_vm``: pytest -p migsim.pytest_plugin [--migsim-backend all]."""


def test_the_last_page_of_a_slot_is_reported(migsim_vm):
    vm = migsim_vm()
    vm.slot(65)
    vm.vcpus(1)
    vm.store([64], value=1)
    assert vm.get(65) == {64}
    assert vm.get(65) == set()


def test_a_ring_keeps_the_order_of_stores(migsim_vm):
    vm = migsim_vm()
    vm.ring(16384)
    vm.slot(8)
    vm.vcpus(1)
    vm.store([5, 2, 7], value=1)
    assert [offset for _, offset in vm.harvest()] == [5, 2, 7]
    assert vm.reset() == 3
