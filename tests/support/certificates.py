"""A certificate authority of the tests' own, and a server that it vouches for."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from pathlib import Path


def certificate(directory: Path, *, self_signed: bool = False) -> ssl.SSLContext:
    """A server context for loopback; ``ca.pem`` is what its clients must trust."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def make(subject: str, *, ca: bool, issuer: x509.Name | None = None, by=None):
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, subject)])
        now = datetime.datetime.now(datetime.UTC)
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer or name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([address]), False)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), True)
        )
        return key, builder.sign(by or key, hashes.SHA256())

    key, made = make("authority", ca=True)
    pem = serialization.Encoding.PEM
    (directory / "ca.pem").write_bytes(made.public_bytes(pem))
    if not self_signed:
        key, made = make("127.0.0.1", ca=False, issuer=made.subject, by=key)
    (directory / "cert.pem").write_bytes(made.public_bytes(pem))
    (directory / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    return context
