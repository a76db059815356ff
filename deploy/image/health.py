"""The image's health check: asks the server of this container over gRPC whether it lives.

    python health.py [SERVICE]

SERVICE is `liveness`, which stays SERVING while a server drains so that nobody kills it for that, or
`readiness`. Exit status 0 if it serves, 1 if not. It reads the server's own variables, since a setting that
was given as a flag is not known here. Where clients must show a certificate, the server's own is shown,
unless HEALTH_TLS_CERT and HEALTH_TLS_KEY name another.
"""

import os
import sys
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

SECONDS = 5.0
# Where to call a server that listens on all addresses.
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def name_in(certificate: x509.Certificate) -> str:
    """A name that the certificate is good for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ""
    found = [*names.get_values_for_type(x509.DNSName), *names.get_values_for_type(x509.IPAddress)]
    return str(found[0]).replace("*", "health") if found else ""


def open_channel(address: str) -> grpc.Channel:
    options: list[tuple[str, Any]] = [("grpc.enable_http_proxy", 0)]  # none lies between it and itself
    if not os.environ.get("TENUTO_TLS_CERT"):
        return grpc.insecure_channel(address, options)
    # Trusted is the certificate that the server was given: who signed it is a question for its clients.
    chain = Path(os.environ["TENUTO_TLS_CERT"]).read_bytes()
    options.append(("grpc.ssl_target_name_override", name_in(x509.load_pem_x509_certificates(chain)[0])))
    shown: tuple[bytes | None, bytes | None] = (None, None)
    if os.environ.get("TENUTO_TLS_CLIENT_CA"):
        key = os.environ.get("HEALTH_TLS_KEY") or os.environ["TENUTO_TLS_KEY"]
        own = os.environ.get("HEALTH_TLS_CERT") or os.environ["TENUTO_TLS_CERT"]
        shown = Path(key).read_bytes(), Path(own).read_bytes()
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(chain, *shown), options)


def main(service: str = "liveness") -> int:
    host = os.environ.get("TENUTO_HOST", "127.0.0.1")
    host = LOOPBACK.get(host, host)
    address = f"{f'[{host}]' if ':' in host else host}:{os.environ.get('TENUTO_PORT', '8001')}"
    with open_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call,unused-ignore]
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=SECONDS)
        except grpc.RpcError as error:
            print(f"{address}: {error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    print(f"{address}: {status}")
    return 0 if status == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
