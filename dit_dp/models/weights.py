"""One set of weights under two sets of names: the reference DiT's and diffusers' `DiTTransformer2DModel`'s.

Shapes: T tokens, D width.

Three differences are more than a name. diffusers has a time and label embedder in every block where the
reference has one; it keeps query, key and value apart; and it computes its fixed positions instead of storing
them. The order of shift, scale and gate, of the final shift and scale and of the unpatching is the same.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dit_dp.errors import UsageError
from dit_dp.models.embedders import sincos_positions

_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_EMBEDDERS = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
_QKV = ("to_q", "to_k", "to_v")
_KINDS = ("weight", "bias")


def reference_to_diffusers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the reference's weights to diffusers' names.

    The one embedder is copied into every block. The result loads strictly into a `DiTTransformer2DModel` of
    the same sizes whose label table has as many rows (`num_embeds_ada_norm` is K for a table of K + 1). The
    output is the same only under the reference's numerics; see `use_reference_numerics_`.

    Args:
        state_dict: The reference's names, as `DiT.state_dict()` gives them.

    Returns:
        diffusers' names; every tensor has its own memory.

    Raises:
        UsageError: A missing or unknown name, or positions that are not the fixed table, which diffusers
            cannot hold.
    """
    source = _Source(state_dict, _count_blocks(state_dict, "blocks."))
    result = {}
    for ours, theirs in _TOP.items():
        for kind in _KINDS:
            result[f"{theirs}.{kind}"] = source.take(f"{ours}.{kind}")
    for block in range(source.num_blocks):
        ours_prefix, theirs_prefix = f"blocks.{block}.", f"transformer_blocks.{block}."
        for ours, theirs in _EMBEDDERS.items():
            result[f"{theirs_prefix}norm1.emb.{theirs}"] = source.take(ours)
        for kind in _KINDS:
            for ours, theirs in _BLOCK.items():
                result[f"{theirs_prefix}{theirs}.{kind}"] = source.take(f"{ours_prefix}{ours}.{kind}")
            parts = source.take(f"{ours_prefix}attn.qkv.{kind}").chunk(3)
            for name, part in zip(_QKV, parts, strict=True):
                result[f"{theirs_prefix}attn1.{name}.{kind}"] = part.clone()
    _check_fixed_positions(source.take("pos_embed"))
    source.check_all_taken()
    return result


def diffusers_to_reference(state_dict: Mapping[str, Tensor], *, latent_size: int) -> dict[str, Tensor]:
    """Rename diffusers' weights to the reference's names.

    Args:
        state_dict: diffusers' names, as `DiTTransformer2DModel.state_dict()` gives them.
        latent_size: Side of the model's input in positions; the position table is not in diffusers' file and
            is computed for it.

    Returns:
        The reference's names, position table included; every tensor has its own memory.

    Raises:
        UsageError: A missing or unknown name, or embedders that differ between blocks (after training a
            diffusers model they do), which the reference, having one, cannot hold.
    """
    source = _Source(state_dict, _count_blocks(state_dict, "transformer_blocks."))
    result = {}
    for ours, theirs in _TOP.items():
        for kind in _KINDS:
            result[f"{ours}.{kind}"] = source.take(f"{theirs}.{kind}")
    for ours, theirs in _EMBEDDERS.items():
        result[ours] = _shared_by_all_blocks(source, theirs)
    for block in range(source.num_blocks):
        ours_prefix, theirs_prefix = f"blocks.{block}.", f"transformer_blocks.{block}."
        for kind in _KINDS:
            for ours, theirs in _BLOCK.items():
                result[f"{ours_prefix}{ours}.{kind}"] = source.take(f"{theirs_prefix}{theirs}.{kind}")
            parts = [source.take(f"{theirs_prefix}attn1.{name}.{kind}") for name in _QKV]
            result[f"{ours_prefix}attn.qkv.{kind}"] = torch.cat(parts)
    source.check_all_taken()
    projection = result["x_embedder.proj.weight"]  # (D, C, p, p)
    positions = sincos_positions(projection.shape[0], latent_size // projection.shape[-1])
    result["pos_embed"] = positions.to(dtype=projection.dtype, device=projection.device)
    return result


def use_reference_numerics_(model: nn.Module) -> nn.Module:
    """Give a `DiTTransformer2DModel` the reference's two constants, in place.

    diffusers' defaults are a LayerNorm epsilon of 1e-5 before the MLP and a frequency spacing of
    1/(F/2 - 1); the reference has 1e-6 and 1/(F/2). With the same weights the outputs differ visibly
    otherwise.

    Args:
        model: The diffusers model.

    Returns:
        The same model.
    """
    for name, module in model.named_modules():
        if name.endswith(".norm3"):
            module.eps = 1e-6
        elif name.endswith(".time_proj"):
            module.downscale_freq_shift = 0
    return model


class _Source:
    """A state dict that is used up name by name, so that nothing is lost unseen."""

    def __init__(self, state_dict: Mapping[str, Tensor], num_blocks: int) -> None:
        self._tensors = state_dict
        self._taken: set[str] = set()
        self.num_blocks = num_blocks

    def take(self, name: str) -> Tensor:
        """Return a copy of one tensor, or raise `UsageError` naming what is missing."""
        if name not in self._tensors:
            raise UsageError.for_value("state_dict", "a mapping", f"one with the name {name!r}", "it is missing")
        self._taken.add(name)
        return self._tensors[name].detach().clone()

    def check_all_taken(self) -> None:
        """Raise `UsageError` if a name has no counterpart."""
        unknown = sorted(set(self._tensors) - self._taken)
        if unknown:
            shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
            raise UsageError(f"state_dict: names without a counterpart in a DiT: {shown}")


def _count_blocks(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    """Return the number of blocks; raise `UsageError` if there is none."""
    pattern = re.compile(rf"{re.escape(prefix)}(\d+)\.")
    numbers = {int(match[1]) for name in state_dict if (match := pattern.match(name))}
    if not numbers:
        raise UsageError.for_value("state_dict", f"{len(state_dict)} names", f"names that begin with {prefix}0.")
    return max(numbers) + 1


def _shared_by_all_blocks(source: _Source, name: str) -> Tensor:
    """Return an embedder's tensor of block 0, or raise `UsageError` naming a block that has another."""
    first = source.take(f"transformer_blocks.0.norm1.emb.{name}")
    for block in range(1, source.num_blocks):
        if not torch.equal(first, source.take(f"transformer_blocks.{block}.norm1.emb.{name}")):
            raise UsageError(
                f"state_dict: {name} of transformer_blocks.{block}.norm1.emb differs from block 0's; "
                "accepted: equal embedders, the reference has one for all blocks; keep the diffusers model"
            )
    return first


def _check_fixed_positions(positions: Tensor) -> None:
    """Raise `UsageError` unless the table (1, T, D) is the fixed one; half precision may have rounded it."""
    _, num_tokens, width = positions.shape
    fixed = sincos_positions(width, round(num_tokens**0.5)).to(positions)
    if fixed.shape != positions.shape or not torch.allclose(positions, fixed, rtol=0, atol=1e-2):
        raise UsageError(
            "state_dict: pos_embed is not the fixed sine-cosine table of a square grid; diffusers computes "
            "that table and cannot hold another"
        )
