"""A frozen base model spread over the processes of a run, each of which holds a part of every layer (FSDP).

torch's `fully_shard` (FSDP2; Zhao et al., 2023) gathers a layer's weights before it runs, forwards or backwards, and
lets go of them afterwards. As nothing frozen has a gradient, nothing comes back. Embeddings, the last norm and the head
stay whole everywhere, so that the loss can be computed in chunks. All processes must run the model together.
"""

from torch import nn
from transformers import PreTrainedModel

from prefixkit import processes
from prefixkit.compat import checkpointed_layers, is_shard
from prefixkit.errors import UnsupportedModelError
from prefixkit.models.hardware import choose_device
from prefixkit.models.quantised import is_quantised
from prefixkit.models.weights import is_offloaded


def shard(model: PreTrainedModel) -> None:
    """Spread the layers of a frozen model over the processes there are; with one process there is nothing to do.

    Args:
        model: all of it, the same in every process; afterwards each holds its part of the layers.

    Raises:
        UnsupportedModelError: it is quantised or offloaded, or has no layers transformers would know as such.
    """
    if processes.count() == 1:
        return
    name, layers = type(model).__name__, checkpointed_layers(model)
    if is_quantised(model) or is_offloaded(model):
        raise UnsupportedModelError(f"{name}: is quantised or offloaded, and cannot be sharded as well; leave one out")
    if not layers:
        raise UnsupportedModelError(f"{name}: has no layers to shard one by one; set model.shard to false")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = choose_device()
    mesh = init_device_mesh(device.type, (processes.count(),))
    for layer in layers:  # each goes where it runs in parts: the whole model need not fit there
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    model.to(device)  # type: ignore[arg-type]


def is_sharded(model: nn.Module) -> bool:
    """Whether other processes hold parts of a model."""
    return any(map(is_shard, model.parameters()))
