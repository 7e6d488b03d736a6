"""Keys and certificates of a deployment: one authority, server certificates, devices' keys.

All are ECDSA on P-384. Private keys are written with mode 0600 before their first byte, and no file
is overwritten unless that is asked for. Time is passed in.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import ipaddress
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from alignfed.errors import DeploymentError

AUTHORITY_DAYS = 3650
SERVER_DAYS = 730
BACKDATED = datetime.timedelta(days=1)
"""Certificates are valid from a day before they were made: clocks of devices may be slow."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority.

    Attributes:
        certificate: what everybody trusts.
        key: what signs.
    """

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make_authority(name: str, now: datetime.datetime) -> Authority:
    """Return a new authority, valid for ten years.

    Args:
        name: its common name, at most 64 characters.
        now: the present, with a time zone.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _name(name)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        _begun(subject, subject, key.public_key(), now, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA384())
    )
    return Authority(certificate, key)


def issue_certificate(
    authority: Authority, hosts: Sequence[str], now: datetime.datetime
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Return a server's certificate, valid for two years, and its new key.

    Args:
        authority: who signs.
        hosts: DNS names and IP addresses by which the server is dialled.
        now: the present, with a time zone.

    Raises:
        DeploymentError: a host is neither a name nor an address.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    issuer = authority.certificate
    certificate = (
        _begun(_name(hosts[0][:64]), issuer.subject, key.public_key(), now, SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([_alternative(host) for host in dict.fromkeys(hosts)]),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()),
            critical=False,
        )
        .sign(authority.key, hashes.SHA384())
    )
    return certificate, key


def make_device_key() -> tuple[bytes, str]:
    """Return a device's private key and its public line, both in OpenSSH format."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return private, public.decode("ascii")


def make_secret() -> bytes:
    """Return 32 random bytes as text, for a secret file."""
    return secrets.token_hex(32).encode("ascii")


def read_public_key(text: str, source: str) -> ec.EllipticCurvePublicKey:
    """Return the key in an OpenSSH line, as ``ssh-keygen -t ecdsa -b 384`` writes it.

    Args:
        text: the line; a comment at its end is ignored.
        source: where it is from, for the message.

    Raises:
        DeploymentError: it is no key, or none on P-384.
    """
    remedy = 'make one with: ssh-keygen -t ecdsa -b 384 -N "" -f node.key'
    try:
        key = serialization.load_ssh_public_key(text.strip().encode("utf-8"))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise DeploymentError(
            f"{source} is no public key in OpenSSH format ({error}); {remedy}", source=source
        ) from None
    if not (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1)):
        kind = text.split()[0]
        raise DeploymentError(
            f"{source} is a key of type {kind}; a device needs ecdsa-sha2-nistp384: {remedy}",
            source=source,
            kind=kind,
        )
    return key


def public_line(key: ec.EllipticCurvePublicKey) -> str:
    """Return a key as an OpenSSH line without comment."""
    return key.public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    ).decode("ascii")


def flower_public_key(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return a key as Flower sends and stores it: PEM, SubjectPublicKeyInfo."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def fingerprint(line: str) -> str:
    """Return the fingerprint of an OpenSSH public line, as ``ssh-keygen -l`` shows it."""
    blob = base64.b64decode(line.split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def certificate_text(certificate: x509.Certificate) -> bytes:
    """Return a certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_text(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as PEM, PKCS 8, without a password."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def read_authority(certificate: Path, key: Path) -> Authority:
    """Return the authority in two files.

    Raises:
        DeploymentError: a file is missing or unreadable, or the two do not belong together.
    """
    found = read_certificate(certificate)
    try:
        signer = serialization.load_pem_private_key(key.read_bytes(), None)
    except FileNotFoundError:
        raise DeploymentError(
            f"{key} does not exist; bring it back from where it is kept to issue certificates",
            path=str(key),
        ) from None
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise DeploymentError(f"{key} holds no private key: {error}", path=str(key)) from None
    if not isinstance(signer, ec.EllipticCurvePrivateKey) or (
        signer.public_key() != found.public_key()
    ):
        raise DeploymentError(
            f"{key} is not the key of {certificate}; put back the pair that belongs together",
            path=str(key),
        )
    return Authority(found, signer)


def read_certificate(path: Path) -> x509.Certificate:
    """Return the certificate in a PEM file.

    Raises:
        DeploymentError: the file is missing or holds none.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DeploymentError(
            f"{path} holds no certificate: {error}; alignfed deploy init or renew makes it",
            path=str(path),
        ) from None


def days_left(certificate: x509.Certificate, now: datetime.datetime) -> float:
    """Return days until a certificate ends; negative once it has ended."""
    return (certificate.not_valid_after_utc - now).total_seconds() / 86400


def write_secret(path: Path, data: bytes, *, replace: bool = False) -> None:
    """Write a file that only its owner can read, from its first byte on.

    Args:
        path: the file; its folder is made with mode 0700 if missing.
        data: what it holds.
        replace: whether an existing file may be replaced, in one step.

    Raises:
        DeploymentError: the file exists and may not be replaced, or cannot be written.
    """
    _write(path, data, 0o600, replace=replace)


def write_public(path: Path, data: bytes, *, replace: bool = False) -> None:
    """Write a file that everybody may read; otherwise as ``write_secret``.

    Raises:
        DeploymentError: the file exists and may not be replaced, or cannot be written.
    """
    _write(path, data, 0o644, replace=replace)


def _write(path: Path, data: bytes, mode: int, *, replace: bool) -> None:
    if path.exists() and not replace:
        raise DeploymentError(
            f"{path} exists already and is not overwritten; choose another directory, or remove it"
            " if nobody uses it",
            path=str(path),
        )
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DeploymentError(
            f"{path} cannot be written: {error.strerror}; make its folder writable",
            path=str(path),
        ) from error


def _begun(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    days: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host.encode("idna").decode("ascii"))
    except (UnicodeError, ValueError):
        raise DeploymentError(
            f"{host!r} is neither a host name nor an address; name the server as devices dial it,"
            " for example fl.example.org or 192.0.2.10",
            host=host,
        ) from None
