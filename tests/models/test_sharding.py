"""A base model spread over processes: each holds its part, all compute what one would, and it is the same model."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import processes
from models import share
from prefixkit.errors import UnsupportedModelError
from prefixkit.models import sharding


@pytest.mark.parametrize("count", [2, 3])
def test_processes_hold_a_model_together(count: int, tiny_llama_dir: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}

    def hold(rank: int) -> Any:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        done = processes.run(share.main, str(tiny_llama_dir), environ=shared | own)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(hold, range(count)))
    layers, rest = found[0]["whole"]
    assert all(each["sharded"] and each["whole"] == [layers, rest] for each in found)
    assert sum(each["held"][0] for each in found) == layers
    assert max(each["held"][0] for each in found) < 0.6 * layers
    assert all(each["held"][1] == rest for each in found)
    assert max(each["difference"] for each in found) < 1e-5
    assert all(each["before"] == each["after"] == found[0]["before"] for each in found)


def test_alone_a_process_holds_all(make_tiny_llama: Any) -> None:
    model = make_tiny_llama()
    sharding.shard(model)
    assert not sharding.is_sharded(model)


def test_what_cannot_be_sharded_is_refused(make_tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding.processes, "count", lambda: 2)
    model = make_tiny_llama()
    model.lm_head.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="is quantised or offloaded, and cannot be sharded as well"):
        sharding.shard(model)
    bare = make_tiny_llama()
    bare.model.layers = nn.ModuleList()
    with pytest.raises(UnsupportedModelError, match="has no layers to shard one by one; set model.shard to false"):
        sharding.shard(bare)
