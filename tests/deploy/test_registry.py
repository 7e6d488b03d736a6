"""The registry: who may take part, one key a device, and a file that is never half written."""

import threading

import pytest

from alignfed.deploy.pki import make_device_key
from alignfed.deploy.registry import RegistryView, load_registry, update_registry
from alignfed.errors import DeploymentError

KEYS = [make_device_key()[1] for _ in range(9)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "registry.json"


def add(path, name, client_id, key):
    return update_registry(path, lambda known: known.with_device(name, client_id, key))


def test_a_registry_reads_back_what_was_written(path):
    add(path, "a", 0, KEYS[0] + " somebody@somewhere")
    written = update_registry(path, lambda known: known.with_node("a", 2**64 - 1))
    assert load_registry(path) == written
    assert written.by_key(KEYS[0]).name == "a"
    assert written.client_of(2**64 - 1) == 0
    assert path.stat().st_mode & 0o077 == 0


def test_name_client_key_and_node_belong_to_one_active_device_each(path):
    add(path, "a", 0, KEYS[0])
    for name, client_id, key, words in [
        ("a", 1, KEYS[1], "exists already"),
        ("b", 0, KEYS[1], "client 0 is device a already; take client 1"),
        ("b", 1, KEYS[0], "a key stands for one device only"),
        ("../b", 1, KEYS[1], "must be at most 64 letters"),
        ("b", -1, KEYS[1], "must be 0 or more"),
        ("b", 1, "ssh-rsa AAAA", "no public key"),
    ]:
        with pytest.raises(DeploymentError, match=words):
            add(path, name, client_id, key)
    add(path, "b", 1, KEYS[1])
    update_registry(path, lambda known: known.with_node("a", 7))
    with pytest.raises(DeploymentError, match="node 7 is device a already"):
        update_registry(path, lambda known: known.with_node("b", 7))


def test_a_revoked_device_is_no_client_frees_its_name_and_never_its_key(path):
    add(path, "a", 0, KEYS[0])
    update_registry(path, lambda known: known.with_node("a", 7))
    revoked = update_registry(path, lambda known: known.without("a", 12.0))
    assert revoked.client_of(7) is None
    assert revoked.by_node(7).revoked
    with pytest.raises(DeploymentError, match="which is revoked"):
        add(path, "a", 0, KEYS[0])
    with pytest.raises(DeploymentError, match="is revoked; add it anew"):
        update_registry(path, lambda known: known.without("a", 13.0))
    again = add(path, "a", 0, KEYS[1])
    assert again.named("a").public_key == KEYS[1]


def test_an_unknown_device_is_named_with_the_nearest_known(path):
    add(path, "phone-1", 0, KEYS[0])
    with pytest.raises(DeploymentError, match="did you mean 'phone-1'"):
        load_registry(path).named("fone-1")


def test_a_view_sees_a_revocation_at_once(path):
    add(path, "a", 0, KEYS[0])
    update_registry(path, lambda known: known.with_node("a", 7))
    view = RegistryView(path)
    assert view.current().client_of(7) == 0
    update_registry(path, lambda known: known.without("a", 1.0))
    assert view.current().client_of(7) is None


def test_writers_at_the_same_time_lose_nothing(path):
    threads = [
        threading.Thread(target=add, args=(path, f"d{number}", number, key))
        for number, key in enumerate(KEYS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(load_registry(path).devices) == len(KEYS)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 1, "devices": [{}]}'])
def test_a_damaged_registry_lets_nobody_in(path, text):
    path.write_text(text)
    with pytest.raises(DeploymentError, match="damaged"):
        RegistryView(path).current()
