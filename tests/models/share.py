"""One of several processes that hold a base model together: says what it holds, and what the model computes."""

import json
import sys

import torch

torch.set_num_threads(1)

from prefixkit import processes  # noqa: E402
from prefixkit.compat import own_part  # noqa: E402
from prefixkit.injection import attach  # noqa: E402
from prefixkit.models import load_base_model  # noqa: E402
from prefixkit.models.fingerprint import check_base, fingerprint, weights_hash  # noqa: E402
from prefixkit.models.inspect import inspect_model  # noqa: E402
from prefixkit.models.sharding import is_sharded, shard  # noqa: E402
from prefixkit.prefix import BaseCard, Prefix, PrefixEncoder, PrefixStates, init_random  # noqa: E402


def main() -> None:
    """Shard the model in argv[1]."""
    processes.join()
    model = load_base_model(sys.argv[1], dtype="float32").model
    before = {"fingerprint": fingerprint(model), "hash": weights_hash(model)}
    layers, rest = model.model.layers, [model.get_input_embeddings(), model.model.norm]
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    geometry = inspect_model(model).geometry
    rows = torch.randn(2, geometry.numbers_per_token, generator=torch.Generator().manual_seed(1))
    card = BaseCard(id="tiny", fingerprint=before["fingerprint"])
    prefix = Prefix.from_states(PrefixStates.from_rows(geometry, rows), base=card)
    encoder = PrefixEncoder(geometry, geometry.lengths(2))
    init_random(encoder, torch.Generator().manual_seed(2), std=1.0)

    def compute() -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        with torch.no_grad(), attach(model, [prefix, None]):
            logits = model(ids).logits
        encoder.zero_grad()
        with attach(model, encoder):
            model(ids, labels=ids, use_cache=False).loss.backward()
        return logits, [parameter.grad for parameter in encoder.parameters()]

    def held() -> list[int]:
        parts = (layers, torch.nn.ModuleList(rest))
        return [sum(own_part(weight).numel() for weight in part.parameters()) for part in parts]

    whole = held()
    logits, gradients = compute()
    shard(model)
    again, gradients_again = compute()
    check_base(model, prefix.card.base)
    after = {"fingerprint": fingerprint(model), "hash": weights_hash(model)}
    pairs = zip([logits, *gradients], [again, *gradients_again], strict=True)
    differences = [float((one - other).abs().max()) for one, other in pairs]
    print(json.dumps({"sharded": is_sharded(model), "whole": whole, "held": held(), "difference": max(differences),
                      "before": before, "after": after}))  # fmt: skip
