"""The certificates between a router and its nodes: an own authority, one certificate for the broker, trust in no other.

No public authority has a word in it, and no name or address: a node trusts the authority that it was given when it
joined, and before that exactly the one certificate whose fingerprint its join code holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import hashlib
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sdfleet.errors import JoinRefused, StoreUnavailable

# What every broker's certificate is made out to, wherever the broker stands.
TLS_NAME = "sdfleet"
# Of the SHA-256 of a certificate: nobody can make a second one for the same 128 bits.
FINGERPRINT_BYTES = 16
_AUTHORITY_DAYS = 365 * 30
_SERVER_DAYS = 365 * 3
_RENEW_DAYS = 60
_FETCH_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """PEM files of the broker, and the authority that nodes are to trust (PEM text). fingerprint: of the broker's."""

    certificate: Path
    key: Path
    authority: str
    fingerprint: bytes


def certificates_in(folder: Path, *, now: dt.datetime | None = None) -> Certificates:
    """Those in the folder; made where there are none, and the broker's anew in the last days that it is valid.

    The files are readable by this user alone. Raises OSError.
    """
    now = dt.datetime.now(dt.UTC) if now is None else now
    authority_file, authority_key = folder / "authority.pem", folder / "authority.key"
    server_file, server_key = folder / "broker.pem", folder / "broker.key"
    if not (authority_file.exists() and authority_key.exists()):
        key = ec.generate_private_key(ec.SECP256R1())
        write_private(authority_key, _pem_of(key))
        write_private(authority_file, _authority(key, now).public_bytes(serialization.Encoding.PEM))
        server_file.unlink(missing_ok=True)
    authority = x509.load_pem_x509_certificate(authority_file.read_bytes())
    if not (server_file.exists() and server_key.exists()) or _is_ending(server_file, now):
        signer = serialization.load_pem_private_key(authority_key.read_bytes(), password=None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        key = ec.generate_private_key(ec.SECP256R1())
        write_private(server_key, _pem_of(key))
        certificate = _server(key, authority, signer, now)
        write_private(server_file, certificate.public_bytes(serialization.Encoding.PEM))
    certificate = x509.load_pem_x509_certificate(server_file.read_bytes())
    return Certificates(
        certificate=server_file,
        key=server_key,
        authority=authority_file.read_text(encoding="ascii"),
        fingerprint=fingerprint_of(certificate.public_bytes(serialization.Encoding.DER)),
    )


def fingerprint_of(der: bytes) -> bytes:
    """What a join code holds of a certificate: the first 16 bytes of its SHA-256."""
    return hashlib.sha256(der).digest()[:FINGERPRINT_BYTES]


def trusting(authority: str) -> ssl.SSLContext:
    """For a client: only a broker whose certificate this authority (PEM) has signed. Raises JoinRefused."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(cadata=authority)
    except (ssl.SSLError, ValueError) as exc:
        raise JoinRefused("the certificate authority that this machine was given cannot be read") from exc
    return context


def trusting_only(der: bytes) -> ssl.SSLContext:
    """For a client: exactly this certificate, whoever has signed it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=der)
    return context


async def certificate_at(host: str, port: int) -> bytes:
    """The certificate (DER) that a broker shows, believed by nobody yet. Raises StoreUnavailable."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        async with asyncio.timeout(_FETCH_S):
            _, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=TLS_NAME)
    except (OSError, TimeoutError) as exc:
        raise StoreUnavailable(
            f"nobody answers at {host}:{port}: {str(exc) or 'no answer in time'}",
            hint="is the router running, and does its firewall let this port in?",
        ) from exc
    try:
        shown: bytes | None = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_FETCH_S):
                await writer.wait_closed()
    if shown is None:
        raise StoreUnavailable(f"the broker at {host}:{port} shows no certificate")
    return shown


def write_private(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, on disk when this returns, readable by this user alone. Raises OSError."""
    temporary = path.with_name(path.name + ".new")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _is_ending(path: Path, now: dt.datetime) -> bool:
    ends = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    return ends - now < dt.timedelta(days=_RENEW_DAYS)


def _named(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _begun(subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _valid(builder: x509.CertificateBuilder, now: dt.datetime, days: int) -> x509.CertificateBuilder:
    # A node whose clock is a day behind still finds it valid.
    begins = now - dt.timedelta(days=2)
    return builder.not_valid_before(begins).not_valid_after(now + dt.timedelta(days=days))


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True, key_cert_sign=signs_certificates, crl_sign=signs_certificates, key_encipherment=False,
        content_commitment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
        decipher_only=False,
    )  # fmt: skip


def _authority(key: ec.EllipticCurvePrivateKey, now: dt.datetime) -> x509.Certificate:
    name = _named("sdfleet router's authority")
    builder = _begun(name, name, key.public_key())
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    return _valid(builder, now, _AUTHORITY_DAYS).sign(key, hashes.SHA256())


def _server(
    key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    signer: ec.EllipticCurvePrivateKey,
    now: dt.datetime,
) -> x509.Certificate:
    builder = _begun(_named(TLS_NAME), authority.subject, key.public_key())
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(TLS_NAME)]), critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    builder = builder.add_extension(issuer, critical=False)
    return _valid(builder, now, _SERVER_DAYS).sign(signer, hashes.SHA256())
