"""The 39 POST cases of fmz-vectors.json through HTTP, NATS, a worker and the paper exchange."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.host import Host
from tests.shape import mismatch

VECTORS = [
    vector
    for vector in msgspec.json.decode((Path(__file__).parent / "data" / "fmz-vectors.json").read_bytes())
    if vector["http"]["method"] == "POST"
]
# The vector of an unknown method is the only one whose text is documented besides: the sample plugin's wording.
TEXTS = {"unknown-method": "no_such_method not support"}


def test_there_are_39_cases() -> None:
    assert len(VECTORS) == 39


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
async def test_a_documented_request_gets_the_documented_shape(vector: dict[str, Any], host: Host) -> None:
    http = vector["http"]
    reply = await host.post(http["path"], msgspec.json.encode(http["body"]), http["headers"])
    assert mismatch(reply, vector["expect"]) == ""
    if vector["name"] in TEXTS:
        assert reply["error"] == TEXTS[vector["name"]]
