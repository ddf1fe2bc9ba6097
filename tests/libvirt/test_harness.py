"""The libvirtd of the tests stands apart from the machine's."""

from tests.libvirt.conftest import NewDomain
from tests.libvirt.daemon import Libvirtd


def test_a_domain_goes_on_while_libvirtd_is_restarted(libvirtd: Libvirtd, domain: NewDomain) -> None:
    vm = domain("vm")
    vm.start()
    libvirtd.restart()
    assert libvirtd.virsh("list", "--name") == "vm"
    assert vm.state() == "running (booted)"
    vm.goes_on()
