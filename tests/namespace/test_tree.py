"""The tree: interface and invariants."""

import stat
from errno import EEXIST, ENAMETOOLONG

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs.errors import CommandError, StateError
from ckptfs.migration.capabilities import CAPABILITIES
from ckptfs.migration.parameters import PARAMETERS
from ckptfs.namespace import tree as nodes
from ckptfs.namespace.status import BlockStatus
from ckptfs.namespace.tree import Node, NodeKind, Tree, ram_xattrs


def names(tree: Tree, directory: Node) -> list[str]:
    return [node.name.decode() for node in tree.list(directory.inode)]


def mode(tree: Tree, path: str) -> int:
    node: Node | None = nodes.ROOT
    for name in path.split("/"):
        assert node is not None
        node = tree.lookup(node.inode, name.encode())
    assert node is not None
    return tree.mode(node)


def test_the_root() -> None:
    tree = Tree([])
    root = ["ctl", "status", "status.json", "events", "ram", "pages", "parameters", "capabilities"]
    assert names(tree, nodes.ROOT) == root
    tree.has_vmstate = True
    assert sorted(names(tree, nodes.ROOT)) == sorted([*root, "vmstate"])


def test_vmstate_is_there_only_with_device_state() -> None:
    tree = Tree([])
    assert tree.lookup(nodes.ROOT.inode, b"vmstate") is None
    assert tree.node(nodes.VMSTATE.inode) is None
    tree = Tree([], has_vmstate=True)
    assert tree.lookup(nodes.ROOT.inode, b"vmstate") is tree.node(nodes.VMSTATE.inode) is nodes.VMSTATE


def test_a_save_image_is_there_only_where_the_domain_is_known() -> None:
    tree = Tree([], has_vmstate=True)
    assert tree.lookup(nodes.ROOT.inode, b"libvirt-save") is None
    tree.has_save_image = True
    assert tree.lookup(nodes.ROOT.inode, b"libvirt-save") is nodes.SAVE_IMAGE


def test_blocks() -> None:
    tree = Tree(["pc.ram", "/rom@etc/acpi"])
    assert names(tree, nodes.RAM) == names(tree, nodes.PAGES) == ["pc.ram", "%2From@etc%2Facpi"]
    node = tree.lookup(nodes.RAM.inode, b"%2From@etc%2Facpi")
    assert node is not None
    assert (node.kind, node.subject) == (NodeKind.RAM, "/rom@etc/acpi")


def test_a_block_can_be_added_and_changes_no_other_inode() -> None:
    tree = Tree(["a", "b"])
    before = tree.list(nodes.RAM.inode)
    node = tree.add_block("c")
    assert tree.list(nodes.RAM.inode) == [*before, node]
    with pytest.raises(StateError) as caught:
        tree.add_block("a")
    assert caught.value.errno == EEXIST
    with pytest.raises(CommandError):
        tree.add_block("")
    assert tree.list(nodes.RAM.inode) == [*before, node]


def test_parameters_and_capabilities_have_a_file_each() -> None:
    tree = Tree([])
    assert names(tree, nodes.PARAMETERS_DIR) == list(PARAMETERS)
    assert names(tree, nodes.CAPABILITIES_DIR) == list(CAPABILITIES)


def test_modes() -> None:
    tree = Tree(["pc.ram"], has_vmstate=True)
    for path in ("ram", "pages", "parameters", "capabilities"):
        assert mode(tree, path) == stat.S_IFDIR | 0o700
    for path in ("ctl", "ram/pc.ram", "parameters/direct-io", "capabilities/multifd"):
        assert mode(tree, path) == stat.S_IFREG | 0o600
    for path in ("status", "status.json", "events", "vmstate", "pages/pc.ram"):
        assert mode(tree, path) == stat.S_IFREG | 0o400


def test_a_umask_opens_up() -> None:
    tree = Tree(["pc.ram"], umask=0o027)
    assert stat.S_IMODE(mode(tree, "ram")) == 0o750
    assert stat.S_IMODE(mode(tree, "ram/pc.ram")) == 0o640


def test_ram_of_a_read_only_mount_cannot_be_written() -> None:
    tree = Tree(["pc.ram"], read_only=True)
    assert stat.S_IMODE(mode(tree, "ram/pc.ram")) == 0o400
    assert stat.S_IMODE(mode(tree, "ctl")) == 0o600


def test_dots() -> None:
    tree = Tree([])
    assert tree.lookup(nodes.RAM.inode, b".") is nodes.RAM
    assert tree.lookup(nodes.RAM.inode, b"..") is nodes.ROOT
    assert tree.lookup(nodes.ROOT.inode, b"..") is nodes.ROOT


@pytest.mark.parametrize("name", [b"", b"x", b"RAM", b"ram/", b"\xff", b"a" * 255])
def test_what_is_not_there(name: bytes) -> None:
    tree = Tree(["pc.ram"])
    assert tree.lookup(nodes.ROOT.inode, name) is None
    assert tree.lookup(nodes.CTL.inode, name) is None
    assert tree.lookup(12345678, name) is None
    assert tree.node(12345678) is None


@given(st.sets(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)), st.booleans())
def test_every_node_is_found_by_name_and_by_inode(idstrs: set[str], has_vmstate: bool) -> None:
    tree = Tree(idstrs, has_vmstate=has_vmstate)
    directories, seen = [nodes.ROOT], {nodes.ROOT.inode}
    for directory in directories:
        children = tree.list(directory.inode)
        assert tree.link_count(directory) == 2 + sum(child.is_directory for child in children)
        for node in children:
            assert node.inode not in seen
            seen.add(node.inode)
            assert tree.lookup(directory.inode, node.name) is tree.node(node.inode) is node
            assert node.parent_inode == directory.inode
        directories += [child for child in children if child.is_directory]
    assert len(seen) == 9 + has_vmstate + len(PARAMETERS) + len(CAPABILITIES) + 2 * len(idstrs)


def test_extended_attributes() -> None:
    assert ram_xattrs(BlockStatus("/a\udcff", 4096, 10, 1, 2, 3, 4)) == {
        b"user.ckptfs.idstr": b"/a\xff",
        b"user.ckptfs.page_size": b"4096",
        b"user.ckptfs.page_count": b"10",
        b"user.ckptfs.used_length": b"40960",
        b"user.ckptfs.zero_pages": b"1",
        b"user.ckptfs.checkpoint_pages": b"2",
        b"user.ckptfs.read_pages": b"3",
        b"user.ckptfs.written_pages": b"4",
    }


def test_a_name_that_no_directory_can_hold() -> None:
    tree = Tree(["pc.ram"])
    for directory in (nodes.ROOT, nodes.RAM):
        assert tree.lookup(directory.inode, b"x" * 255) is None
        with pytest.raises(CommandError) as caught:
            tree.lookup(directory.inode, b"x" * 256)
        assert caught.value.errno == ENAMETOOLONG
