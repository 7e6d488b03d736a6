"""Keys and certificates: real handshakes, real ssh-keygen formats, files nobody else can read."""

import datetime
import shutil
import socket
import ssl
import subprocess
import threading

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from alignfed.deploy import pki
from alignfed.errors import DeploymentError

NOW = datetime.datetime.now(datetime.UTC)


@pytest.fixture(scope="module")
def authority():
    return pki.make_authority("alignfed test", NOW)


def handshake(folder, authority, issuer, hosts, dialled):
    """Return the peer's certificate, or raise what the client raises."""
    certificate, key = pki.issue_certificate(issuer, hosts, NOW)
    pki.write_public(folder / "s.crt", pki.certificate_text(certificate), replace=True)
    pki.write_secret(folder / "s.key", pki.key_text(key), replace=True)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "s.crt", folder / "s.key")
    client = ssl.create_default_context(cadata=pki.certificate_text(authority.certificate).decode())
    ours, theirs = socket.socketpair()

    def answer():
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except (ssl.SSLError, OSError):
            theirs.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=dialled) as connection:
            return connection.getpeercert()
    finally:
        ours.close()
        thread.join()


@pytest.mark.parametrize("dialled", ["fl.example.org", "192.0.2.10", "::1"])
def test_a_client_that_trusts_the_authority_accepts_every_named_host(tmp_path, authority, dialled):
    hosts = ("fl.example.org", "192.0.2.10", "::1")
    assert handshake(tmp_path, authority, authority, hosts, dialled)


def test_a_client_refuses_another_host_and_another_authority(tmp_path, authority):
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(tmp_path, authority, authority, ("a.example",), "b.example")
    stranger = pki.make_authority("alignfed test", NOW)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, authority, stranger, ("a.example",), "a.example")


def test_a_server_certificate_signs_nothing(tmp_path, authority):
    certificate, key = pki.issue_certificate(authority, ("a.example",), NOW)
    pretender = pki.Authority(certificate, key)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, authority, pretender, ("a.example",), "a.example")


def test_flower_reads_the_devices_key_and_knows_it_by_the_same_bytes():
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve

    private, line = pki.make_device_key()
    key = load_ssh_private_key(private, None)
    assert uses_nist_ec_curve(key.public_key())
    ours = pki.flower_public_key(pki.read_public_key(line, "line"))
    assert ours == public_key_to_bytes(key.public_key())


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_ssh_keygen_shows_the_same_fingerprint(tmp_path):
    _, line = pki.make_device_key()
    (tmp_path / "k.pub").write_text(line + "\n")
    shown = subprocess.run(
        ["ssh-keygen", "-l", "-f", tmp_path / "k.pub"], capture_output=True, text=True, check=True
    )
    assert pki.fingerprint(line) in shown.stdout


def test_a_key_of_another_kind_is_refused_with_the_command_that_makes_a_right_one():
    line = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f"
    with pytest.raises(DeploymentError, match=r"type ssh-ed25519.*ssh-keygen -t ecdsa -b 384"):
        pki.read_public_key(line, "node.pub")


def test_secrets_are_closed_to_others_and_never_overwritten_unasked(tmp_path):
    path = tmp_path / "new" / "key"
    pki.write_secret(path, b"one")
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(DeploymentError, match="not overwritten"):
        pki.write_secret(path, b"two")
    assert path.read_bytes() == b"one"
    pki.write_secret(path, b"three", replace=True)
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_authority_is_read_back_and_a_wrong_pair_refused(tmp_path, authority):
    pki.write_public(tmp_path / "ca.crt", pki.certificate_text(authority.certificate))
    pki.write_secret(tmp_path / "ca.key", pki.key_text(authority.key))
    found = pki.read_authority(tmp_path / "ca.crt", tmp_path / "ca.key")
    assert found.certificate == authority.certificate
    assert found.key.private_numbers() == authority.key.private_numbers()
    other = pki.make_authority("other", NOW)
    pki.write_secret(tmp_path / "other.key", pki.key_text(other.key))
    with pytest.raises(DeploymentError, match="is not the key of"):
        pki.read_authority(tmp_path / "ca.crt", tmp_path / "other.key")
    with pytest.raises(DeploymentError, match="bring it back"):
        pki.read_authority(tmp_path / "ca.crt", tmp_path / "none.key")


def test_an_impossible_host_is_refused(authority):
    with pytest.raises(DeploymentError, match="neither a host name nor an address"):
        pki.issue_certificate(authority, ("a..b",), NOW)


def test_days_left_are_counted_from_the_given_present(authority):
    certificate, _ = pki.issue_certificate(authority, ("a.example",), NOW)
    assert pki.days_left(certificate, NOW) == pytest.approx(pki.SERVER_DAYS, abs=0.01)
    assert pki.days_left(certificate, NOW + datetime.timedelta(days=800)) < 0
