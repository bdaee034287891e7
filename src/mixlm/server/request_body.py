"""The body of a request, as bytes: read within limits, and unpacked."""

from __future__ import annotations

import asyncio
import zlib

from starlette.requests import ClientDisconnect, Request

from mixlm.server.api_errors import ApiError
from mixlm.server.limits import ServerLimits


async def read_body(request: Request, limits: ServerLimits) -> bytes:
    """Return the body. Raises ApiError if it is not JSON by its type, too large, or too slow."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        # This also keeps out pages of other origins: browsers send them JSON only with permission.
        raise ApiError(415, "the body must be JSON: send Content-Type: application/json", code="unsupported_type")
    maximum, seconds = limits.max_body_bytes, limits.body_timeout
    too_large = ApiError(413, f"the body has more than {maximum} bytes", code="body_too_large")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > maximum:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                data += part
                if len(data) > maximum:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:g} s", code="body_too_slow") from None
    except ClientDisconnect:
        raise ApiError(400, "the client disconnected", code="gone") from None
    return _decoded(bytes(data), request.headers.get("content-encoding", ""), maximum)


def _decoded(data: bytes, encoding: str, maximum: int) -> bytes:
    """Return a body without its content encoding. Raises ApiError for one that is unknown, spoiled or too large."""
    if encoding.strip().lower() in ("", "identity"):
        return data
    if encoding.strip().lower() not in ("gzip", "x-gzip"):
        message = f"the content encoding {encoding[:40]!r} is unknown: send gzip, or none"
        raise ApiError(415, message, code="unsupported_encoding")
    decoder = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        decoded = decoder.decompress(data, maximum + 1)
    except zlib.error:
        raise ApiError(400, "the body is not gzip, as its content encoding says", code="invalid_encoding") from None
    if len(decoded) > maximum:
        raise ApiError(413, f"the body has more than {maximum} bytes", code="body_too_large")
    if not decoder.eof or decoder.unused_data:
        raise ApiError(400, "the body is not one complete gzip stream", code="invalid_encoding")
    return decoded
