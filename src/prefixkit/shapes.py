"""Axis letters, used in every signature and shape comment.

| letter | axis | letter | axis |
|---|---|---|---|
| `b` | rows of the batch | `g` | key/value heads |
| `t` | queries | `d` | head dimension |
| `s` | keys without the prefix | `e` | model dimension |
| `p` | virtual tokens | `v` | vocabulary |
| `l` | layers | `n` | prefixes in a bank |
| `h` | query heads | `w` | reparameterisation width |

Signatures carry them with jaxtyping, for example ``Float[Tensor, "n g p d"]``; under pytest the shapes are
checked at every call (see `tests/conftest.py`).
"""
