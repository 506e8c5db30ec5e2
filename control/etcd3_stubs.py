"""The messages and methods of etcd's v3 API, taken from the `etcd3` package's generated stubs.

etcd3 0.12.0 is generated code that protobuf >= 4 refuses to import, and importing the package
starts its own client. The serialized descriptors inside its `*_pb2.py` files are sound, so this
module reads them without importing anything, puts them into a descriptor pool of its own and lets
protobuf make the classes. It knows nothing of channels, endpoints or errors.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from pyflannel.dataplane.refusal import Refusal

PACKAGE = "etcdserverpb"
_FILES = ("kv", "auth", "rpc")  # in the order of their imports of each other


def _serialized_descriptor(source: str) -> bytes:
    """Find the literal `serialized_pb=…` of a generated module; ValueError if there is none."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "serialized_pb":
            value = node.value
            literal = value.args[0] if isinstance(value, ast.Call) else value
            content = ast.literal_eval(literal)
            return content if isinstance(content, bytes) else content.encode("latin-1")
    raise ValueError("there is no serialized descriptor")


@cache
def _pool() -> descriptor_pool.DescriptorPool:
    """Read the descriptors once; Refusal if the etcd3 package is missing or another version."""
    spec = importlib.util.find_spec("etcd3")
    if spec is None or spec.origin is None:
        raise Refusal("the Python package etcd3 is missing: install etcd3==0.12.0")
    folder = Path(spec.origin).parent / "etcdrpc"
    pool = descriptor_pool.DescriptorPool()
    for name in _FILES:
        try:
            serialized = _serialized_descriptor((folder / f"{name}_pb2.py").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise Refusal(
                f"the Python package etcd3 has no usable {name}_pb2.py ({error}): "
                "install etcd3==0.12.0"
            ) from error
        pool.Add(descriptor_pb2.FileDescriptorProto.FromString(serialized))
    return pool


@cache
def message(name: str) -> Any:
    """Return the class of a message, e.g. `RangeRequest`; KeyError if etcd's API has none."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"{PACKAGE}.{name}"))


@cache
def _method(service: str, name: str) -> Any:
    return _pool().FindServiceByName(f"{PACKAGE}.{service}").methods_by_name[name]


def call(channel: Any, service: str, name: str) -> Any:
    """Bind a method, e.g. `("KV", "Range")`, to a grpc.aio channel: unary or both ways a stream."""
    method = _method(service, name)
    make = channel.stream_stream if method.client_streaming else channel.unary_unary
    return make(
        f"/{PACKAGE}.{service}/{name}",
        request_serializer=message_factory.GetMessageClass(method.input_type).SerializeToString,
        response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
    )
